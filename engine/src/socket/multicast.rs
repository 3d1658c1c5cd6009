//! Multicast groups that an IP socket listens to.
//!
//! A socket does not list them. The network namespace does, and a socket says
//! for each whether it is a member.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{Kind, sys};
use crate::file::error::{Stop, refuse};
use crate::file::record::RcrSocketOption;

/// `MCAST_JOIN_GROUP` and `MCAST_MSFILTER`, linux/in.h; the same at both levels.
const JOIN_GROUP: i32 = 42;
const SOURCE_FILTER: i32 = 48;
/// `struct group_filter`: interface, group, mode, number of sources, sources.
const GROUP_AT: usize = 8;
const ADDRESS_BYTES: usize = 128;
const MODE_AT: usize = 136;
const COUNT_AT: usize = 140;
const SOURCES_AT: usize = 144;
/// More sources than the kernel allows by default.
const SOURCES_MAX: usize = 256;
const INCLUDE: u32 = 1;

/// The memberships of a socket of task `pid`, as options to set.
pub(super) fn save(fd: BorrowedFd<'_>, kind: Kind, pid: i32) -> Result<Vec<RcrSocketOption>, Stop> {
    let read =
        |file: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
    let mut options = Vec::new();
    for (interface, group) in groups4(&read("igmp")) {
        options.extend(one(fd, libc::IPPROTO_IP, interface, &group)?);
    }
    if kind.domain == libc::AF_INET6 {
        for (interface, group) in groups6(&read("igmp6")) {
            options.extend(one(fd, libc::IPPROTO_IPV6, interface, &group)?);
        }
    }
    Ok(options)
}

/// Interfaces and raw addresses in `/proc/net/igmp`.
pub(super) fn groups4(text: &str) -> Vec<(u32, Vec<u8>)> {
    let mut interface = 0;
    let mut all = Vec::new();
    for line in text.lines().skip(1) {
        let Some(first) = line.split_ascii_whitespace().next() else {
            continue;
        };
        if !line.starts_with(['\t', ' ']) {
            interface = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            let mut raw = (libc::AF_INET as u16).to_ne_bytes().to_vec();
            raw.extend_from_slice(&[0; 2]);
            raw.extend_from_slice(&group.to_ne_bytes());
            all.push((interface, raw));
        }
    }
    all
}

/// Interfaces and raw addresses in `/proc/net/igmp6`.
pub(super) fn groups6(text: &str) -> Vec<(u32, Vec<u8>)> {
    let group = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let interface = words.next()?.parse().ok()?;
        let group = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        let mut raw = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
        raw.extend_from_slice(&[0; 6]);
        raw.extend_from_slice(&group.to_be_bytes());
        Some((interface, raw))
    };
    text.lines().filter_map(group).collect()
}

/// What makes the socket a member again, if it is one.
fn one(
    fd: BorrowedFd<'_>,
    level: i32,
    interface: u32,
    group: &[u8],
) -> Result<Vec<RcrSocketOption>, Stop> {
    let mut filter = vec![0; SOURCES_AT + SOURCES_MAX * ADDRESS_BYTES];
    filter[..4].copy_from_slice(&interface.to_ne_bytes());
    filter[GROUP_AT..GROUP_AT + group.len()].copy_from_slice(group);
    filter[COUNT_AT..SOURCES_AT].copy_from_slice(&(SOURCES_MAX as u32).to_ne_bytes());
    match sys::option_about(fd, level, SOURCE_FILTER, &mut filter) {
        Ok(()) => {}
        // Not a member.
        Err(e)
            if matches!(
                e.errno,
                Errno::EADDRNOTAVAIL | Errno::EINVAL | Errno::ENOPROTOOPT
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e.into()),
    }
    let word = |at: usize| u32::from_ne_bytes(filter[at..at + 4].try_into().expect("4"));
    let (mode, sources) = (word(MODE_AT), word(COUNT_AT) as usize);
    if sources > SOURCES_MAX {
        return refuse(
            "socket with a multicast group",
            format!("it names {sources} sources, more than {SOURCES_MAX}"),
            "untag the unit",
        );
    }
    let mut options = vec![RcrSocketOption {
        level,
        name: JOIN_GROUP,
        value: filter[..MODE_AT].to_vec(),
    }];
    if mode == INCLUDE || sources > 0 {
        options.push(RcrSocketOption {
            level,
            name: SOURCE_FILTER,
            value: filter[..SOURCES_AT + sources * ADDRESS_BYTES].to_vec(),
        });
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_are_read_with_their_interfaces() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            2\teth0      :     1      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let all = groups4(text);
        assert_eq!(all[1].0, 2);
        assert_eq!(all[1].1[4..], [224, 0, 0, 251]);
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        let all = groups6(text);
        assert_eq!((all[0].0, all[0].1[8], all[0].1[23]), (1, 0xff, 1));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[0-9a-fA-F\\t\\n :]{0,200}") {
            groups4(&text);
            groups6(&text);
        }
    }
}
