//! What kind of TCP socket it is, and what stands in its way.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::super::inet::address;
use super::super::{Kind, inet_diag, lock, sys::receive_with};
use super::*;
use crate::file::error::{Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::Fate;
use crate::file::{FilePolicy, TcpPolicy};
use crate::image::schema::{InetSkEntry, SkShutdown};

/// `TCP_CLOSE` and `TCP_LISTEN`, net/tcp_states.h.
const CLOSE: u32 = 7;
pub(crate) const LISTEN: u32 = 10;
/// `IPPROTO_MPTCP`
pub(crate) const MPTCP: i32 = 262;

/// A socket as it is to be saved.
#[derive(Debug)]
pub(crate) struct Look {
    pub state: u32,
    pub backlog: u32,
    pub fate: Fate,
    pub shutdown: SkShutdown,
    pub peer: Option<Vec<u8>>,
}

/// Looks at a TCP or MPTCP socket.
pub(crate) fn look(
    file: &Examined<'_>,
    kind: Kind,
    local: &[u8],
    peer: Option<Vec<u8>>,
) -> Result<Look, Stop> {
    let seen = Seen::of(file.fd)?;
    let mut look = Look {
        state: seen.state,
        backlog: 0,
        fate: Fate::Kept,
        shutdown: SkShutdown::None,
        peer,
    };
    let close = file.policy.tcp == TcpPolicy::Close;
    match seen.state {
        LISTEN => {
            if seen.pending > 0 && !close && !file.policy.skip_in_flight {
                let n = seen.pending;
                return refuse(
                    "listening TCP socket",
                    format!("{n} connections wait to be accepted and would be lost"),
                    "try again when they are accepted, or allow them to be lost",
                );
            }
            look.backlog = seen.backlog;
        }
        CLOSE if seen.ended => {
            let left = sys::bytes_waiting(file.fd)?;
            if left > 0 && !close {
                return refuse(
                    "TCP connection that is over",
                    format!("{left} bytes of it were not read and would be lost"),
                    "try again when they are read, or allow connections to be closed",
                );
            }
            look.fate = Fate::Closed;
        }
        CLOSE => {}
        _ if close => look.fate = Fate::Closed,
        state => {
            if state == SYN_SENT {
                let netns = lock::netns_of(file.fd)?;
                let ino = file.stat.st_ino as u32;
                let netns = netns.as_ref().map(OwnedFd::as_fd);
                look.peer = inet_diag::connecting_to(netns, kind.domain, ino)?;
            }
            if seen.ended && matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2) {
                look.shutdown = SkShutdown::Read;
            }
            connection(file, kind, state, local, look.peer.as_deref())?;
        }
    }
    Ok(look)
}

/// What `struct tcp_info` (linux/tcp.h) tells of a socket.
#[derive(Debug)]
struct Seen {
    state: u32,
    /// While listening: how many connections may wait.
    backlog: u32,
    /// While listening: how many connections wait.
    pending: u32,
    /// Nothing more will be received: the peer has ended, or it was shut down.
    ended: bool,
}

impl Seen {
    fn of(fd: BorrowedFd<'_>) -> SysResult<Self> {
        let info = sys::socket_option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 144)?;
        let word = |at: usize| {
            let bytes = info.get(at..at + 4);
            bytes.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
        };
        Ok(Self {
            state: info.first().copied().unwrap_or(0).into(),
            // tcpi_sacked is the backlog's limit while listening, and
            // tcpi_unacked counts those who wait.
            backlog: word(28),
            pending: word(24),
            ended: sys::hung_up(fd)?,
        })
    }
}

/// What stands in the way of a connection that is to go on.
fn connection(
    file: &Examined<'_>,
    kind: Kind,
    state: u32,
    local: &[u8],
    peer: Option<&[u8]>,
) -> Result<(), Stop> {
    let to = peer.map_or("?".into(), sys::show_address);
    let which = format!("the connection {} to {to}", sys::show_address(local));
    if kind.protocol == MPTCP {
        return refuse(
            "MPTCP connection",
            format!("{which} has state in the kernel that cannot be read"),
            "turn multipath TCP off in the service's configuration, or allow connections to be \
             closed",
        );
    }
    if file.policy.tcp == TcpPolicy::Refuse {
        return refuse(
            "established TCP connection",
            format!("{which} would be lost"),
            "close it, or allow connections to be closed or carried",
        );
    }
    let protocol = sys::socket_option(file.fd, libc::IPPROTO_TCP, libc::TCP_ULP, 16);
    let protocol = protocol.unwrap_or_default();
    let name = String::from_utf8_lossy(&protocol);
    let name = name.trim_end_matches('\0');
    if !name.is_empty() {
        return refuse(
            "TCP connection",
            format!("{which} is handled by the kernel's {name}, whose keys cannot be read back"),
            format!("turn kernel {name} off in the service's configuration"),
        );
    }
    let peek = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    if receive_with(file.fd, &mut [0], peek).is_ok() {
        return refuse(
            "TCP connection",
            format!("an urgent byte of {which} waits to be read, which cannot be made again"),
            "try again when it was read",
        );
    }
    if !goes_on(state) || peer.is_none() {
        return refuse(
            "TCP connection",
            format!("{which} is in state {state}, which cannot be made again"),
            "try again in a moment",
        );
    }
    if !lock::possible() {
        return refuse(
            "established TCP connection",
            format!("packets of {which} cannot be kept away: the kernel has no nftables"),
            "load the module nf_tables, or allow connections to be closed",
        );
    }
    Ok(())
}

/// Connections to listeners of the tree that nobody has accepted: their other
/// end is lost, so they come back closed.
pub(crate) fn drop_unaccepted(files: &mut BTreeMap<u32, Saved>, policy: &FilePolicy) {
    if policy.tcp != TcpPolicy::Carry {
        return;
    }
    let mut connections = BTreeMap::new();
    let mut ports = BTreeSet::new();
    for isk in files.values().filter_map(|s| s.entry.isk.as_ref()) {
        if isk.proto != libc::IPPROTO_TCP as u32 {
            continue;
        }
        if isk.state == LISTEN {
            ports.insert((isk.src_port as u16).to_be_bytes());
        } else if goes_on(isk.state)
            && let Some(ends) = ends(isk)
        {
            connections.insert(ends, (isk.id, isk.state));
        }
    }
    for (ends, (id, state)) in &connections {
        let loopback = ends.peer.first() == Some(&127) || ends.peer == Ipv6Addr::LOCALHOST.octets();
        let here = loopback || ends.peer == ends.local;
        let waits = *state != SYN_SENT && !connections.contains_key(&ends.seen_by_peer());
        if !(here && waits && ports.contains(&ends.peer_port)) {
            continue;
        }
        let saved = files.get_mut(id);
        if let Some(more) = saved.and_then(|s| s.extra.socket.as_mut()) {
            more.fate = Some(Fate::Closed.into());
            more.options.clear();
        }
    }
}

/// Both ends of a connection.
fn ends(isk: &InetSkEntry) -> Option<lock::Ends> {
    lock::Ends::of(
        &address(isk.family, &isk.src_addr, isk.src_port),
        &address(isk.family, &isk.dst_addr, isk.dst_port),
    )
}
