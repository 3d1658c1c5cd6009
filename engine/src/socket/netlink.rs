//! Netlink sockets that only listen or ask now and then.

use std::os::fd::{AsFd, OwnedFd};

use super::{Kind, opts};
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::{RcrFile, RcrSocket};
use crate::file::sys;
use crate::image::schema::{FdTypes, NetlinkSkEntry};

/// `SOL_NETLINK` options, linux/netlink.h.
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// Plain switches: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, CAP_ACK, EXT_ACK, GET_STRICT_CHK.
const SWITCHES: [i32; 6] = [3, 4, 5, 10, 11, 12];

/// Saves a socket's protocol, port and groups. A conversation under way is refused.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, kind: Kind) -> Result<(), Stop> {
    let dynamic = libc::NETLINK_GENERIC;
    let known = [
        libc::NETLINK_ROUTE,
        libc::NETLINK_SOCK_DIAG,
        libc::NETLINK_KOBJECT_UEVENT,
        dynamic,
    ];
    if !known.contains(&kind.protocol) {
        return refuse(
            format!("netlink socket of protocol {}", kind.protocol),
            "its state in the kernel is not carried",
            "untag the unit",
        );
    }
    let groups = groups(file)?;
    if kind.protocol == dynamic && groups.iter().any(|&g| g != 0) {
        return refuse(
            "generic netlink socket",
            "its group numbers are handed out anew by each kernel",
            "untag the unit",
        );
    }
    if file.policy.payload && super::sys::peek(file.fd, &mut [0; 16])?.is_some() {
        return refuse(
            "netlink socket",
            "it holds messages that were not read",
            "try again when they are",
        );
    }
    let local = sys::local_address(file.fd)?;
    let mut options = opts::save(file.fd, kind)?;
    for name in SWITCHES {
        if sys::socket_option_int(file.fd, libc::SOL_NETLINK, name).is_ok_and(|v| v != 0) {
            options.push(crate::file::record::RcrSocketOption {
                level: libc::SOL_NETLINK,
                name,
                value: 1i32.to_ne_bytes().into(),
            });
        }
    }
    saved.entry.r#type = FdTypes::Netlinksk.into();
    saved.entry.nlsk = Some(Box::new(NetlinkSkEntry {
        id: saved.entry.id,
        ino: file.stat.st_ino as u32,
        protocol: kind.protocol as u32,
        state: 0,
        flags: file.flags(),
        portid: port(&local),
        groups,
        dst_portid: 0,
        dst_group: 0,
        fown: file.fown()?,
        opts: opts::entry(file.fd)?,
        ns_id: None,
    }));
    saved.extra.socket = Some(Box::new(RcrSocket {
        options,
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        // SOCK_RAW or SOCK_DGRAM; the kernel treats both alike, but shows them.
        peer: None,
        local: Some(kind.kind.to_ne_bytes().to_vec()),
        ..RcrSocket::default()
    }));
    Ok(())
}

fn groups(file: &Examined<'_>) -> Result<Vec<u32>, Stop> {
    let bytes = sys::socket_option(file.fd, libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, 256)?;
    let words = bytes
        .chunks_exact(4)
        .map(|w| u32::from_ne_bytes(w.try_into().expect("4")));
    let mut words: Vec<u32> = words.collect();
    while words.last() == Some(&0) {
        words.pop();
    }
    Ok(words)
}

/// `nl_pid` of a `sockaddr_nl`.
fn port(address: &[u8]) -> u32 {
    address
        .get(4..8)
        .map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
}

/// Makes the socket again, under its old port.
pub(crate) fn restore(nl: &NetlinkSkEntry, extra: Option<&RcrFile>) -> Result<OwnedFd, BuildError> {
    let none = RcrSocket::default();
    let more = extra.and_then(|e| e.socket.as_deref()).unwrap_or(&none);
    let kind = more
        .local
        .as_deref()
        .and_then(|b| b.try_into().ok())
        .map(i32::from_ne_bytes);
    let fd = sys::socket(
        libc::AF_NETLINK,
        kind.unwrap_or(libc::SOCK_RAW),
        nl.protocol as i32,
    )?;
    super::set_owner(fd.as_fd(), more.uid, more.gid)?;
    opts::restore(fd.as_fd(), &more.options, &nl.opts)?;
    if nl.portid != 0 {
        let mut address = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
        address.extend_from_slice(&[0; 2]);
        address.extend_from_slice(&nl.portid.to_ne_bytes());
        address.extend_from_slice(&[0; 4]);
        sys::bind(fd.as_fd(), &address)?;
    }
    for (word, bits) in nl.groups.iter().enumerate() {
        for bit in (0..32).filter(|b| bits & (1 << b) != 0) {
            let group = (word as i32 * 32 + bit + 1).to_ne_bytes();
            sys::set_socket_option(
                fd.as_fd(),
                libc::SOL_NETLINK,
                NETLINK_ADD_MEMBERSHIP,
                &group,
            )?;
        }
    }
    Ok(fd)
}
