//! IPv4 and IPv6 sockets: TCP and UDP.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{Kind, opts};
use crate::file::TcpPolicy;
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::{Fate, RcrFile, RcrSocket};
use crate::file::sys;
use crate::image::schema::{FdTypes, InetSkEntry, IpOptsEntry, TcpOptsEntry};
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
    let peer = sys::peer_address(file.fd)?;
    let mut fate = Fate::Kept;
    let (state, backlog) = match kind.protocol {
        libc::IPPROTO_TCP => match tcp_state(file.fd)? {
            Tcp {
                state: CLOSE,
                used: true,
                ..
            } => {
                // A connection that is over: there is nothing left to lose.
                fate = Fate::Closed;
                (CLOSE, 0)
            }
            Tcp {
                state: state @ (CLOSE | LISTEN),
                backlog,
                ..
            } => (state, backlog),
            Tcp { state, .. } => {
                if file.policy.tcp == TcpPolicy::Refuse {
                    let to = peer.as_deref().map_or("?".into(), sys::show_address);
                    return refuse(
                        "established TCP connection",
                        format!(
                            "the connection {} to {to} would be lost",
                            sys::show_address(&local)
                        ),
                        "close it, or allow connections to be closed",
                    );
                }
                fate = Fate::Closed;
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
    let (dst_addr, dst_port) = peer.as_deref().map(split).unwrap_or_default();
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
    /// Whether segments ever went over it.
    used: bool,
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
        // tcpi_segs_out and tcpi_segs_in.
        used: word(136) != 0 || word(140) != 0,
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
    let freebind = isk
        .ip_opts
        .as_ref()
        .and_then(|o| o.freebind)
        .unwrap_or(false);
    if let Some(local) = &more.local {
        // The address may not be configured yet this early.
        set_freebind(fd.as_fd(), isk.family, true)?;
        sys::bind(fd.as_fd(), local)?;
    }
    set_freebind(fd.as_fd(), isk.family, freebind)?;
    if isk.state == LISTEN {
        sys::listen(fd.as_fd(), isk.backlog as i32)?;
    } else if let Some(peer) = &more.peer {
        sys::connect(fd.as_fd(), peer)?;
    }
    Ok(fd)
}

fn set_freebind(fd: BorrowedFd<'_>, family: u32, on: bool) -> SysResult<()> {
    let (level, name) = if family == libc::AF_INET6 as u32 {
        (libc::IPPROTO_IPV6, IPV6_FREEBIND)
    } else {
        (libc::IPPROTO_IP, libc::IP_FREEBIND)
    };
    sys::set_socket_option(fd, level, name, &i32::from(on).to_ne_bytes())
}
