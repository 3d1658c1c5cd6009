//! Socket options: those that differ from a fresh socket's travel.
//!
//! Comparing with a fresh socket of the same kind keeps defaults apart from
//! choices: what the service never set takes the new kernel's default.

use std::os::fd::{AsFd, BorrowedFd};

use super::Kind;
use super::tcp::MPTCP;
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::record::RcrSocketOption;
use crate::file::sys;
use crate::image::schema::SkOptsEntry;
use crate::sys::{SysError, SysResult};

const SOL: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

/// `SO_BUF_LOCK`, asm-generic/socket.h: which buffer sizes were set by the user.
pub(super) const SO_BUF_LOCK: i32 = 72;
const LOCKED_SEND: i32 = 1;
const LOCKED_RECEIVE: i32 = 2;

/// Of all sockets. Numbers without a name in libc are from asm-generic/socket.h.
const COMMON: &[i32] = &[
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_KEEPALIVE,
    libc::SO_BROADCAST,
    libc::SO_OOBINLINE,
    libc::SO_LINGER,
    libc::SO_PRIORITY,
    libc::SO_MARK,
    libc::SO_DONTROUTE,
    libc::SO_NO_CHECK,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_RCVLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_RXQ_OVFL,
    libc::SO_PEEK_OFF,
    libc::SO_SELECT_ERR_QUEUE,
    libc::SO_BUSY_POLL,
    libc::SO_ZEROCOPY,
    69, // SO_PREFER_BUSY_POLL
    70, // SO_BUSY_POLL_BUDGET
    74, // SO_TXREHASH
    75, // SO_RCVMARK
    76, // SO_PASSPIDFD
];

/// Of IPv4 sockets, and of IPv6 ones where they apply. Without a name: linux/in.h.
const IPV4: &[i32] = &[
    libc::IP_TOS,
    libc::IP_TTL,
    libc::IP_OPTIONS,
    libc::IP_PKTINFO,
    libc::IP_RECVERR,
    libc::IP_RECVTTL,
    libc::IP_RECVTOS,
    libc::IP_MTU_DISCOVER,
    libc::IP_TRANSPARENT,
    libc::IP_RECVORIGDSTADDR,
    libc::IP_MINTTL,
    libc::IP_BIND_ADDRESS_NO_PORT,
    libc::IP_RETOPTS,
    libc::IP_PASSSEC,
    libc::IP_UNICAST_IF,
    23, // IP_CHECKSUM
    25, // IP_RECVFRAGSIZE
    26, // IP_RECVERR_RFC4884
    51, // IP_LOCAL_PORT_RANGE
];

/// Of raw sockets, with their levels. Without a name: linux/icmp.h,
/// linux/icmpv6.h, linux/in6.h.
const RAW: &[(i32, i32)] = &[
    (IP, libc::IP_HDRINCL),
    (IP, libc::IP_NODEFRAG),
    (libc::IPPROTO_RAW, 1),    // ICMP_FILTER
    (libc::IPPROTO_RAW, 7),    // IPV6_CHECKSUM
    (libc::IPPROTO_ICMPV6, 1), // ICMPV6_FILTER
    (IP6, 36),                 // IPV6_HDRINCL
];

/// Of UDP-Lite sockets: bytes covered by the checksum, linux/udp.h.
const UDPLITE: &[i32] = &[10, 11];

/// Of IPv4 datagram sockets; streams refuse to have them set.
const MULTICAST: &[i32] = &[
    libc::IP_MULTICAST_TTL,
    libc::IP_MULTICAST_LOOP,
    libc::IP_MULTICAST_ALL,
    libc::IP_MULTICAST_IF,
];

/// The same of IPv6 ones.
const MULTICAST6: &[i32] = &[
    libc::IPV6_MULTICAST_HOPS,
    libc::IPV6_MULTICAST_LOOP,
    libc::IPV6_MULTICAST_IF,
    libc::IPV6_MULTICAST_ALL,
];

/// Of IPv6 sockets. Without a name: linux/in6.h.
const IPV6: &[i32] = &[
    libc::IPV6_V6ONLY,
    libc::IPV6_UNICAST_HOPS,
    libc::IPV6_MTU_DISCOVER,
    libc::IPV6_RECVERR,
    libc::IPV6_RECVPKTINFO,
    libc::IPV6_RECVHOPLIMIT,
    libc::IPV6_RECVTCLASS,
    libc::IPV6_TCLASS,
    libc::IPV6_TRANSPARENT,
    libc::IPV6_UNICAST_IF,
    libc::IPV6_DONTFRAG,
    libc::IPV6_RECVHOPOPTS,
    libc::IPV6_RECVDSTOPTS,
    libc::IPV6_RECVRTHDR,
    libc::IPV6_RECVPATHMTU,
    libc::IPV6_AUTOFLOWLABEL,
    libc::IPV6_RECVORIGDSTADDR,
    libc::IPV6_RECVFRAGSIZE,
    31, // IPV6_RECVERR_RFC4884
    73, // IPV6_MINHOPCOUNT
];

/// Of TCP sockets. What the kernel adjusts by itself (segment size, window
/// clamp, quick ack) is left to it. Without a name: linux/tcp.h.
const TCP_ONLY: &[i32] = &[
    libc::TCP_NODELAY,
    libc::TCP_CORK,
    libc::TCP_KEEPIDLE,
    libc::TCP_KEEPINTVL,
    libc::TCP_KEEPCNT,
    libc::TCP_SYNCNT,
    libc::TCP_LINGER2,
    libc::TCP_DEFER_ACCEPT,
    libc::TCP_USER_TIMEOUT,
    libc::TCP_FASTOPEN,
    libc::TCP_NOTSENT_LOWAT,
    libc::TCP_SAVE_SYN,
    libc::TCP_CONGESTION,
    30, // TCP_FASTOPEN_CONNECT
    34, // TCP_FASTOPEN_NO_COOKIE
    36, // TCP_INQ
];

/// Of UDP sockets, linux/udp.h.
const UDP_ONLY: &[i32] = &[1, 100, 101, 102, 103, 104];

fn table(kind: Kind) -> Vec<(i32, i32)> {
    let mut all: Vec<_> = COMMON.iter().map(|&n| (SOL, n)).collect();
    let inet = matches!(kind.domain, libc::AF_INET | libc::AF_INET6);
    if inet {
        all.extend(IPV4.iter().map(|&n| (IP, n)));
    }
    let stream = kind.kind == libc::SOCK_STREAM;
    if inet && !stream {
        all.extend(MULTICAST.iter().map(|&n| (IP, n)));
    }
    if kind.domain == libc::AF_INET6 {
        if !stream {
            all.extend(MULTICAST6.iter().map(|&n| (IP6, n)));
        }
        all.extend(IPV6.iter().map(|&n| (IP6, n)));
    }
    match (inet, kind.protocol) {
        (true, MPTCP) => all.extend(TCP_ONLY.iter().map(|&n| (TCP, n))),
        (true, libc::IPPROTO_UDPLITE) => {
            all.extend(UDP_ONLY.iter().map(|&n| (UDP, n)));
            all.extend(UDPLITE.iter().map(|&n| (libc::IPPROTO_UDPLITE, n)));
        }
        (true, _) if kind.kind == libc::SOCK_RAW => all.extend(RAW),
        (true, TCP) => all.extend(TCP_ONLY.iter().map(|&n| (TCP, n))),
        (true, UDP) => all.extend(UDP_ONLY.iter().map(|&n| (UDP, n))),
        _ => {}
    }
    all
}

/// The options that were changed since the socket was made.
pub(crate) fn save(fd: BorrowedFd<'_>, kind: Kind) -> Result<Vec<RcrSocketOption>, Stop> {
    let stat = nix::sys::stat::fstat(fd).map_err(|e| SysError::new("fstat", "socket", e))?;
    let fresh = super::make(kind, Some(stat.st_gid))?;
    let mut changed = Vec::new();
    for (level, name) in table(kind) {
        // An option this kernel or this kind of socket does not know is at its default.
        let Ok(value) = sys::socket_option(fd, level, name, 64) else {
            continue;
        };
        let default = sys::socket_option(fresh.as_fd(), level, name, 64);
        if default.is_ok_and(|d| d != value) {
            changed.push(RcrSocketOption { level, name, value });
        }
    }
    let listens = || sys::socket_option_int(fd, SOL, libc::SO_ACCEPTCONN).unwrap_or(0) != 0;
    if kind.kind == libc::SOCK_STREAM && [TCP, MPTCP].contains(&kind.protocol) && listens() {
        for name in [libc::TCP_MAXSEG, libc::TCP_WINDOW_CLAMP] {
            let Ok(value) = sys::socket_option_int(fd, TCP, name) else {
                continue;
            };
            let default = sys::socket_option_int(fresh.as_fd(), TCP, name);
            if default.is_ok_and(|d| d != value) {
                changed.push(number(TCP, name, value));
            }
        }
    }
    let locked = sys::socket_option_int(fd, SOL, SO_BUF_LOCK).unwrap_or(0);
    for (bit, name, force) in [
        (LOCKED_SEND, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
        (LOCKED_RECEIVE, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
    ] {
        if locked & bit != 0 {
            // The kernel doubles what is set.
            let half = sys::socket_option_int(fd, SOL, name)? / 2;
            changed.push(RcrSocketOption {
                level: SOL,
                name: force,
                value: half.to_ne_bytes().into(),
            });
        }
    }
    let device = sys::socket_option(fd, SOL, libc::SO_BINDTODEVICE, 16).unwrap_or_default();
    if !device.is_empty() {
        changed.push(RcrSocketOption {
            level: SOL,
            name: libc::SO_BINDTODEVICE,
            value: device,
        });
    }
    Ok(changed)
}

/// An option whose value is a number.
pub(super) fn number(level: i32, name: i32, value: i32) -> RcrSocketOption {
    RcrSocketOption {
        level,
        name,
        value: value.to_ne_bytes().into(),
    }
}

/// The options in CRIU's form, for other readers of our images.
pub(crate) fn entry(fd: BorrowedFd<'_>) -> Result<SkOptsEntry, Stop> {
    let int = |name| sys::socket_option_int(fd, SOL, name);
    let flag = |name| int(name).ok().map(|v| v != 0);
    let word = |name| int(name).ok().map(|v| v as u32);
    let timeout = |name| -> SysResult<(u64, u64)> {
        let b = sys::socket_option(fd, SOL, name, 16)?;
        let part = |i: usize| {
            b.get(i..i + 8)
                .map_or(0, |w| u64::from_ne_bytes(w.try_into().expect("8 bytes")))
        };
        Ok((part(0), part(8)))
    };
    let (snd, rcv) = (timeout(libc::SO_SNDTIMEO)?, timeout(libc::SO_RCVTIMEO)?);
    let so_filter = match sys::socket_filter(fd) {
        Ok(insns) => insns,
        Err(e) if e.errno == nix::errno::Errno::EACCES => {
            return refuse(
                "socket with an eBPF filter",
                "the program cannot be read back",
                "detach the filter, or untag the unit",
            );
        }
        Err(e) => return Err(e.into()),
    };
    Ok(SkOptsEntry {
        so_sndbuf: int(libc::SO_SNDBUF)? as u32,
        so_rcvbuf: int(libc::SO_RCVBUF)? as u32,
        so_snd_tmo_sec: snd.0,
        so_snd_tmo_usec: snd.1,
        so_rcv_tmo_sec: rcv.0,
        so_rcv_tmo_usec: rcv.1,
        reuseaddr: flag(libc::SO_REUSEADDR),
        so_priority: word(libc::SO_PRIORITY),
        so_rcvlowat: word(libc::SO_RCVLOWAT),
        so_mark: word(libc::SO_MARK),
        so_passcred: flag(libc::SO_PASSCRED),
        so_passsec: flag(libc::SO_PASSSEC),
        so_dontroute: flag(libc::SO_DONTROUTE),
        so_no_check: flag(libc::SO_NO_CHECK),
        so_filter,
        so_reuseport: flag(libc::SO_REUSEPORT),
        so_broadcast: flag(libc::SO_BROADCAST),
        so_keepalive: flag(libc::SO_KEEPALIVE),
        so_oobinline: word(libc::SO_OOBINLINE),
        so_buf_lock: word(SO_BUF_LOCK),
        ..SkOptsEntry::default()
    })
}

/// Sets the changed options on a new socket.
pub(crate) fn restore(
    fd: BorrowedFd<'_>,
    options: &[RcrSocketOption],
    entry: &SkOptsEntry,
) -> Result<(), BuildError> {
    for o in options {
        sys::set_socket_option(fd, o.level, o.name, &o.value)?;
    }
    if !entry.so_filter.is_empty() {
        sys::attach_filter(fd, &entry.so_filter)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_changed_travels_and_comes_back() {
        let kind = Kind {
            domain: libc::AF_INET,
            kind: libc::SOCK_STREAM,
            protocol: TCP,
        };
        let make = || sys::socket(kind.domain, kind.kind, kind.protocol).unwrap();
        let a = make();
        assert_eq!(save(a.as_fd(), kind).unwrap(), []);
        for (level, name, value) in [
            (SOL, libc::SO_REUSEADDR, 1),
            (SOL, libc::SO_RCVBUF, 50_000),
            (TCP, libc::TCP_NODELAY, 1),
            (TCP, libc::TCP_KEEPIDLE, 77),
            (TCP, libc::TCP_DEFER_ACCEPT, 1),
            (IP, libc::IP_TOS, 16),
        ] {
            sys::set_socket_option(a.as_fd(), level, name, &i32::to_ne_bytes(value)).unwrap();
        }
        let saved = save(a.as_fd(), kind).unwrap();
        let names: Vec<_> = saved.iter().map(|o| (o.level, o.name)).collect();
        assert!(names.contains(&(TCP, libc::TCP_KEEPIDLE)), "{names:?}");
        assert!(names.contains(&(SOL, libc::SO_RCVBUFFORCE)), "{names:?}");
        let b = make();
        restore(b.as_fd(), &saved, &entry(a.as_fd()).unwrap()).unwrap();
        assert_eq!(save(b.as_fd(), kind).unwrap(), saved);
        assert_eq!(entry(b.as_fd()).unwrap(), entry(a.as_fd()).unwrap());
    }
}
