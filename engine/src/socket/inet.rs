//! IPv4 and IPv6 sockets: TCP and UDP.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{Kind, inet_diag, lock, opts, tcp};
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::{Fate, RcrFile, RcrSocket};
use crate::file::sys;
use crate::file::{FilePolicy, TcpPolicy};
use crate::image::schema::{FdTypes, InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry};
use crate::sys::SysResult;

/// `TCP_CLOSE` and `TCP_LISTEN`, net/tcp_states.h.
const CLOSE: u32 = 7;
const LISTEN: u32 = 10;
/// `IPPROTO_MPTCP`
const MPTCP: i32 = 262;
/// `IPV6_FREEBIND`, linux/in6.h.
const IPV6_FREEBIND: i32 = 78;

/// Saves a socket. Datagrams not yet read are lost, as a network may lose them;
/// so are connections not yet accepted.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, kind: Kind) -> Result<(), Stop> {
    let local = sys::local_address(file.fd)?;
    let mut peer = sys::peer_address(file.fd)?;
    let mut shutdown = SkShutdown::None;
    let mut fate = Fate::Kept;
    let (state, backlog) = match kind.protocol {
        libc::IPPROTO_TCP => match tcp_state(file.fd)? {
            Tcp {
                state: CLOSE,
                ended: true,
                ..
            } => {
                let left = sys::bytes_waiting(file.fd)?;
                if left > 0 && file.policy.tcp != TcpPolicy::Close {
                    return refuse(
                        "TCP connection that is over",
                        format!("{left} bytes of it were not read and would be lost"),
                        "try again when they are read, or allow connections to be closed",
                    );
                }
                fate = Fate::Closed;
                (CLOSE, 0)
            }
            Tcp {
                state: LISTEN,
                pending,
                ..
            } if pending > 0 && in_flight_refused(file.policy) => {
                return refuse(
                    "listening TCP socket",
                    format!("{pending} connections wait to be accepted and would be lost"),
                    "try again when they are accepted, or allow them to be lost",
                );
            }
            Tcp {
                state: state @ (CLOSE | LISTEN),
                backlog,
                ..
            } => (state, backlog),
            Tcp { state, .. } if file.policy.tcp == TcpPolicy::Close => {
                fate = Fate::Closed;
                (state, 0)
            }
            Tcp { state, ended, .. } => {
                if state == tcp::SYN_SENT {
                    let netns = lock::netns_of(file.fd)?;
                    let ino = file.stat.st_ino as u32;
                    let netns = netns.as_ref().map(OwnedFd::as_fd);
                    peer = inet_diag::connecting_to(netns, kind.domain, ino)?;
                }
                if ended && matches!(state, tcp::ESTABLISHED | tcp::FIN_WAIT1 | tcp::FIN_WAIT2) {
                    shutdown = SkShutdown::Read;
                }
                connection_refusals(file, state, &local, peer.as_deref())?;
                (state, 0)
            }
        },
        libc::IPPROTO_UDP => (CLOSE, 0),
        MPTCP => {
            return refuse(
                "MPTCP socket",
                "multipath TCP is not carried",
                "turn multipath TCP off in the service's configuration, or untag the unit",
            );
        }
        other => {
            return refuse(
                format!("IP socket of protocol {other}"),
                "only TCP and UDP are carried",
                "untag the unit",
            );
        }
    };
    let id = saved.entry.id;
    let (src_addr, src_port) = split(&local);
    // Both have the family's length, also where there is no peer.
    let nowhere = || (vec![0; src_addr.len()], 0);
    let (dst_addr, dst_port) = peer.as_deref().map_or_else(nowhere, split);
    let int = |level, name| sys::socket_option_int(file.fd, level, name);
    let v6 = kind.domain == libc::AF_INET6;
    let tcp = kind.protocol == libc::IPPROTO_TCP;
    let freebind = int(libc::IPPROTO_IP, libc::IP_FREEBIND)? != 0;
    saved.entry.r#type = FdTypes::Inetsk.into();
    saved.entry.isk = Some(InetSkEntry {
        id,
        ino: file.stat.st_ino as u32,
        family: kind.domain as u32,
        r#type: kind.kind as u32,
        proto: kind.protocol as u32,
        state,
        src_port,
        dst_port,
        flags: file.flags(),
        backlog,
        src_addr,
        dst_addr,
        fown: file.fown()?,
        opts: opts::entry(file.fd)?,
        v6only: if v6 {
            Some(int(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)? != 0)
        } else {
            None
        },
        ip_opts: Some(IpOptsEntry {
            freebind: Some(freebind),
            ..IpOptsEntry::default()
        }),
        tcp_opts: if tcp {
            Some(TcpOptsEntry {
                cork: Some(int(libc::IPPROTO_TCP, libc::TCP_CORK)? != 0),
                nodelay: Some(int(libc::IPPROTO_TCP, libc::TCP_NODELAY)? != 0),
                keepcnt: Some(int(libc::IPPROTO_TCP, libc::TCP_KEEPCNT)? as u32),
                keepidle: Some(int(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE)? as u32),
                keepintvl: Some(int(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL)? as u32),
            })
        } else {
            None
        },
        uid: Some(file.stat.st_uid),
        shutdown: (shutdown != SkShutdown::None).then_some(shutdown.into()),
        ..InetSkEntry::default()
    });
    let bound = src_port != 0 || local.get(4..).is_some_and(|_| !is_any(&local));
    saved.extra.socket = Some(RcrSocket {
        local: bound.then_some(local),
        peer,
        // A connection that comes back closed has no more use for its options.
        options: if fate == Fate::Closed {
            Vec::new()
        } else {
            opts::save(file.fd, kind)?
        },
        fate: Some(fate.into()),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        ..RcrSocket::default()
    });
    Ok(())
}

/// What `struct tcp_info` (linux/tcp.h) tells of a socket.
#[derive(Debug)]
struct Tcp {
    state: u32,
    /// While listening: how many connections may wait.
    backlog: u32,
    /// Nothing more will be received: the peer has ended, or it was shut down.
    ended: bool,
    /// While listening: how many connections wait.
    pending: u32,
}

fn tcp_state(fd: BorrowedFd<'_>) -> SysResult<Tcp> {
    let info = sys::socket_option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 144)?;
    let word = |at: usize| {
        let bytes = info.get(at..at + 4);
        bytes.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
    };
    Ok(Tcp {
        state: info.first().copied().unwrap_or(0).into(),
        // tcpi_sacked is the backlog's limit while listening.
        backlog: word(28),
        // tcpi_unacked counts those who wait while listening.
        pending: word(24),
        ended: sys::hung_up(fd)?,
    })
}

/// Address words as in memory, and port, of a raw address.
fn split(address: &[u8]) -> (Vec<u32>, u32) {
    let port = address
        .get(2..4)
        .map_or(0, |b| u16::from_be_bytes([b[0], b[1]]).into());
    let words = match address.len() {
        16 => &address[4..8],
        28 => &address[8..24],
        _ => &[],
    };
    let words = words
        .chunks_exact(4)
        .map(|w| u32::from_ne_bytes(w.try_into().expect("4")));
    (words.collect(), port)
}

fn is_any(address: &[u8]) -> bool {
    split(address).0.iter().all(|&w| w == 0)
}

/// Whether connections that were not accepted yet stand in the way.
fn in_flight_refused(policy: &FilePolicy) -> bool {
    policy.tcp != TcpPolicy::Close && !policy.skip_in_flight
}

/// What stands in the way of a connection that is to go on.
fn connection_refusals(
    file: &Examined<'_>,
    state: u32,
    local: &[u8],
    peer: Option<&[u8]>,
) -> Result<(), Stop> {
    let to = peer.map_or("?".into(), sys::show_address);
    let which = format!("the connection {} to {to}", sys::show_address(local));
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
    if super::sys::receive_with(file.fd, &mut [0], peek).is_ok() {
        return refuse(
            "TCP connection",
            format!("an urgent byte of {which} waits to be read, which cannot be made again"),
            "try again when it was read",
        );
    }
    if !tcp::goes_on(state) || peer.is_none() {
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
pub(crate) fn settle(files: &mut BTreeMap<u32, Saved>, policy: &FilePolicy) {
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
        } else if tcp::goes_on(isk.state)
            && let Some(ends) = ends(isk)
        {
            connections.insert(ends, (isk.id, isk.state));
        }
    }
    for (ends, (id, state)) in &connections {
        let loopback = ends.peer.first() == Some(&127) || ends.peer == Ipv6Addr::LOCALHOST.octets();
        let here = loopback || ends.peer == ends.local;
        let waits = *state != tcp::SYN_SENT && !connections.contains_key(&ends.seen_by_peer());
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

/// A raw address made of what an entry says.
pub(crate) fn address(family: u32, words: &[u32], port: u32) -> Vec<u8> {
    let mut raw = (family as u16).to_ne_bytes().to_vec();
    raw.extend_from_slice(&(port as u16).to_be_bytes());
    let v6 = family == libc::AF_INET6 as u32;
    let (before, bytes, after) = if v6 { (4, 16, 4) } else { (0, 4, 8) };
    raw.resize(raw.len() + before, 0);
    let end = raw.len() + bytes;
    raw.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
    raw.resize(end, 0);
    raw.resize(end + after, 0);
    raw
}

/// Binds a socket whether its address is configured yet or not.
pub(super) fn bind_anyway(
    fd: BorrowedFd<'_>,
    isk: &InetSkEntry,
    local: &[u8],
) -> Result<(), BuildError> {
    let freebind = isk.ip_opts.as_ref().and_then(|o| o.freebind);
    set_freebind(fd, isk.family, true)?;
    sys::bind(fd, local)?;
    Ok(set_freebind(fd, isk.family, freebind.unwrap_or(false))?)
}

/// Makes the socket again.
pub(crate) fn restore(isk: &InetSkEntry, extra: Option<&RcrFile>) -> Result<OwnedFd, BuildError> {
    let none = RcrSocket::default();
    let more = extra.and_then(|e| e.socket.as_ref()).unwrap_or(&none);
    let fd = sys::socket(isk.family as i32, isk.r#type as i32, isk.proto as i32)?;
    opts::restore(fd.as_fd(), &more.options, &isk.opts)?;
    if more.fate() == Fate::Closed {
        // Reads as ended and polls as hung up, as if the peer had closed.
        sys::shutdown(fd.as_fd(), libc::SHUT_RDWR)?;
        return Ok(fd);
    }
    super::set_owner(fd.as_fd(), more.uid, more.gid)?;
    let local = match (&more.local, extra) {
        // Images of others have the address in the entry.
        (None, None) if isk.src_port != 0 => Some(address(isk.family, &isk.src_addr, isk.src_port)),
        (local, _) => local.clone(),
    };
    let reuse = reuse_address(fd.as_fd())?;
    if let Some(local) = &local {
        // Connections that have the port already come back with it.
        set_reuse_address(fd.as_fd(), 1)?;
        bind_anyway(fd.as_fd(), isk, local)?;
    }
    if isk.state == LISTEN {
        sys::listen(fd.as_fd(), isk.backlog as i32)?;
    } else if let Some(peer) = &more.peer {
        sys::connect(fd.as_fd(), peer)?;
    }
    if local.is_some() {
        set_reuse_address(fd.as_fd(), reuse)?;
    }
    Ok(fd)
}

fn reuse_address(fd: BorrowedFd<'_>) -> SysResult<i32> {
    sys::socket_option_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)
}

fn set_reuse_address(fd: BorrowedFd<'_>, on: i32) -> SysResult<()> {
    let on = on.to_ne_bytes();
    sys::set_socket_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &on)
}

pub(super) fn set_freebind(fd: BorrowedFd<'_>, family: u32, on: bool) -> SysResult<()> {
    let (level, name) = if family == libc::AF_INET6 as u32 {
        (libc::IPPROTO_IPV6, IPV6_FREEBIND)
    } else {
        (libc::IPPROTO_IP, libc::IP_FREEBIND)
    };
    sys::set_socket_option(fd, level, name, &i32::from(on).to_ne_bytes())
}
