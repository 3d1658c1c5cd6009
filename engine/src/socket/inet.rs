//! IPv4 and IPv6 sockets: TCP, UDP, UDP-Lite, ping and raw.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::tcp::{LISTEN, MPTCP};
use super::{Kind, datagram, device, multicast, opts, tcp};
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::{Fate, RcrFile, RcrSocket};
use crate::file::sys;
use crate::image::schema::{FdTypes, InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry};
use crate::sys::SysResult;

/// `TCP_CLOSE`, net/tcp_states.h; of sockets without connections too.
const CLOSE: u32 = 7;
/// `IPV6_FREEBIND`, linux/in6.h.
const IPV6_FREEBIND: i32 = 78;

/// Saves a socket. What raw and ping sockets have not read yet is lost, as a
/// network may lose it.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, kind: Kind) -> Result<(), Stop> {
    let local = sys::local_address(file.fd)?;
    let peer = sys::peer_address(file.fd)?;
    let look = match kind.protocol {
        libc::IPPROTO_TCP | MPTCP => tcp::look(file, kind, &local, peer)?,
        _ => plain(file, kind, peer)?,
    };
    let tcp::Look {
        state,
        backlog,
        fate,
        shutdown,
        peer,
    } = look;
    let id = saved.entry.id;
    let (src_addr, src_port) = split(&local);
    // Both have the family's length, also where there is no peer.
    let nowhere = || (vec![0; src_addr.len()], 0);
    let (dst_addr, dst_port) = peer.as_deref().map_or_else(nowhere, split);
    let int = |level, name| sys::socket_option_int(file.fd, level, name);
    let v6 = kind.domain == libc::AF_INET6;
    let tcp = kind.protocol == libc::IPPROTO_TCP;
    let (level, name) = freebind_option(kind.domain);
    let freebind = int(level, name)? != 0;
    saved.entry.r#type = FdTypes::Inetsk.into();
    saved.entry.isk = Some(Box::new(InetSkEntry {
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
    }));
    let bound = src_port != 0 || local.get(4..).is_some_and(|_| !is_any(&local));
    let mut more = RcrSocket {
        local: bound.then_some(local),
        peer,
        // A connection that comes back closed has no more use for its options.
        options: if fate == Fate::Closed {
            Vec::new()
        } else {
            let mut options = opts::save(file.fd, kind)?;
            if kind.kind != libc::SOCK_STREAM {
                options.extend(multicast::save(file.fd, kind, file.task.pid)?);
            }
            options
        },
        fate: Some(fate.into()),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        datagrams: datagram::save(file, kind)?,
        ..RcrSocket::default()
    };
    device::save(file.fd, &mut more, None)?;
    saved.extra.socket = Some(Box::new(more));
    Ok(())
}

/// A socket without connections: UDP, UDP-Lite, ping, raw.
fn plain(file: &Examined<'_>, kind: Kind, peer: Option<Vec<u8>>) -> Result<tcp::Look, Stop> {
    let known = [
        libc::IPPROTO_UDP,
        libc::IPPROTO_UDPLITE,
        libc::IPPROTO_ICMP,
        libc::IPPROTO_ICMPV6,
    ];
    let carried = match kind.kind {
        libc::SOCK_DGRAM => known.contains(&kind.protocol),
        libc::SOCK_RAW => true,
        _ => false,
    };
    if !carried {
        return refuse(
            format!(
                "IP socket of type {} and protocol {}",
                kind.kind, kind.protocol
            ),
            "TCP, UDP, UDP-Lite, ping and raw sockets are carried",
            "untag the unit",
        );
    }
    let corks = [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE].contains(&kind.protocol);
    if kind.kind == libc::SOCK_DGRAM && corks && super::sys::bytes_unacknowledged(file.fd)? > 0 {
        return refuse(
            "datagram socket",
            "a datagram in the making (MSG_MORE) cannot be read back",
            "try again when it was sent",
        );
    }
    Ok(tcp::Look {
        state: CLOSE,
        backlog: 0,
        fate: Fate::Kept,
        shutdown: SkShutdown::None,
        peer,
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
    let more = extra.and_then(|e| e.socket.as_deref()).unwrap_or(&none);
    let kind = Kind {
        domain: isk.family as i32,
        kind: isk.r#type as i32,
        protocol: isk.proto as i32,
    };
    let fd = super::make(kind, more.gid)?;
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
        datagram::send_again(fd.as_fd(), kind, &more.datagrams)?;
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
    let (level, name) = freebind_option(family as i32);
    sys::set_socket_option(fd, level, name, &i32::from(on).to_ne_bytes())
}

fn freebind_option(family: i32) -> (i32, i32) {
    if family == libc::AF_INET6 {
        (libc::IPPROTO_IPV6, IPV6_FREEBIND)
    } else {
        (libc::IPPROTO_IP, libc::IP_FREEBIND)
    }
}
