//! iptables in its older form: each table is one block of rules, read by
//! `IPT_SO_GET_ENTRIES` and put back whole by `IPT_SO_SET_REPLACE`.

use std::os::fd::{AsFd, OwnedFd};

use super::schema::XtableEntry;
use crate::file::sys;
use crate::namespace::NamespaceError;
use crate::namespace::sys::socket_question;

// linux/netfilter_ipv4/ip_tables.h; the numbers are the same for IPv6.
const SET_REPLACE: i32 = 64;
const SET_ADD_COUNTERS: i32 = 65;
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
const NAME: usize = 32;
/// `sizeof(struct ipt_getinfo)`
const INFO: usize = 84;
/// Where the rules begin in `struct ipt_get_entries`.
const ENTRIES_AT: usize = 40;
/// `sizeof(struct xt_counters)`
const COUNTERS: usize = 16;

/// How the two families differ.
struct Family {
    domain: i32,
    level: i32,
    names: &'static str,
    /// Where `next_offset` and the counters are in a rule.
    next_at: usize,
    counters_at: usize,
}

fn family(v6: bool) -> Family {
    match v6 {
        false => Family {
            domain: libc::AF_INET,
            level: libc::IPPROTO_IP,
            names: "/proc/thread-self/net/ip_tables_names",
            next_at: 90,
            counters_at: 96,
        },
        true => Family {
            domain: libc::AF_INET6,
            level: libc::IPPROTO_IPV6,
            names: "/proc/thread-self/net/ip6_tables_names",
            next_at: 142,
            counters_at: 152,
        },
    }
}

fn open(f: &Family) -> Result<OwnedFd, NamespaceError> {
    sys::socket(f.domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
        .map_err(|e| NamespaceError::call("socket", "iptables")(e.errno))
}

/// The tables in use in the namespace the calling thread is in.
pub(super) fn list() -> Result<Vec<XtableEntry>, NamespaceError> {
    let mut all = Vec::new();
    for v6 in [false, true] {
        let f = family(v6);
        // Absent where the kernel has none or the module is not loaded.
        let Ok(names) = std::fs::read_to_string(f.names) else {
            continue;
        };
        for name in names.lines().filter(|n| !n.is_empty()) {
            let fd = open(&f)?;
            let err = |call| NamespaceError::call(call, format!("iptables table {name}"));
            let mut info = vec![0; INFO];
            info[..name.len().min(NAME - 1)]
                .copy_from_slice(&name.as_bytes()[..name.len().min(NAME - 1)]);
            socket_question(&fd, f.level, GET_INFO, &mut info).map_err(err("IPT_SO_GET_INFO"))?;
            let size = word(&info, 80) as usize;
            let mut entries = vec![0; ENTRIES_AT + size];
            entries[..NAME].copy_from_slice(&info[..NAME]);
            entries[NAME..NAME + 4].copy_from_slice(&(size as u32).to_ne_bytes());
            socket_question(&fd, f.level, GET_ENTRIES, &mut entries)
                .map_err(err("IPT_SO_GET_ENTRIES"))?;
            entries.drain(..ENTRIES_AT);
            all.push(XtableEntry { v6, info, entries });
        }
    }
    Ok(all)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let b = bytes.get(at..at + 4);
    b.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
}

/// Fills the tables of the namespace the calling thread is in.
pub(super) fn restore(all: &[XtableEntry]) -> Result<(), NamespaceError> {
    for t in all {
        let f = family(t.v6);
        let name = t.info.get(..NAME).unwrap_or(&[]);
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        let shown = String::from_utf8_lossy(&name[..end]).into_owned();
        let err = |call| NamespaceError::call(call, format!("iptables table {shown}"));
        if t.info.len() != INFO || word(&t.info, 80) as usize != t.entries.len() {
            return Err(err("check of the image")(rustix::io::Errno::INVAL));
        }
        let fd = open(&f)?;
        // Asking for it makes it; it tells how many counters it gives back.
        let mut now = vec![0; INFO];
        now[..NAME].copy_from_slice(name);
        socket_question(&fd, f.level, GET_INFO, &mut now).map_err(err("IPT_SO_GET_INFO"))?;
        let old = word(&now, 76) as usize;
        let mut room = vec![0_u8; old * COUNTERS];
        let mut replace = Vec::with_capacity(96 + t.entries.len());
        replace.extend_from_slice(name);
        for at in [32, 76, 80] {
            replace.extend_from_slice(&word(&t.info, at).to_ne_bytes());
        }
        replace.extend_from_slice(&t.info[36..76]);
        replace.extend_from_slice(&(old as u32).to_ne_bytes());
        replace.extend_from_slice(&(room.as_mut_ptr() as u64).to_ne_bytes());
        replace.extend_from_slice(&t.entries);
        let set = |name: i32, bytes: &[u8], call| {
            sys::set_socket_option(fd.as_fd(), f.level, name, bytes)
                .map_err(|e| err(call)(rustix::io::Errno::from_raw_os_error(e.errno as i32)))
        };
        set(SET_REPLACE, &replace, "IPT_SO_SET_REPLACE")?;
        drop(room);
        let counters = counters(&f, &t.entries);
        let mut add = name.to_vec();
        add.extend_from_slice(&((counters.len() / COUNTERS) as u32).to_ne_bytes());
        add.extend_from_slice(&[0; 4]);
        add.extend_from_slice(&counters);
        set(SET_ADD_COUNTERS, &add, "IPT_SO_SET_ADD_COUNTERS")?;
    }
    Ok(())
}

/// The counters of all rules, one after another.
fn counters(f: &Family, entries: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while let Some(c) = rest.get(f.counters_at..f.counters_at + COUNTERS) {
        out.extend_from_slice(c);
        let next = u16::from_ne_bytes([rest[f.next_at], rest[f.next_at + 1]]);
        match rest.get(usize::from(next)..) {
            Some(r) if next != 0 => rest = r,
            _ => break,
        }
    }
    out
}
