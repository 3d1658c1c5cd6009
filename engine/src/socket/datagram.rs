//! Datagrams that wait in the queue of a UDP or UDP-Lite socket.
//!
//! They are looked at without being taken, and on restore sent once more through
//! the loopback device, from their senders' addresses: by a raw socket that
//! writes the IP header itself (raw(7), ipv6(7)), while the receiver is bound but
//! neither connected nor bound to a device. The address they are for counts as
//! the machine's own for that long. What the receiver may ask about them but
//! cannot keep: the time they came (SO_TIMESTAMP) and the device (IP_PKTINFO).
//! The kernel shows an empty datagram once only to who looks in this way.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::footing::Footing;
use super::{Kind, opts, steer, sys};
use crate::file::error::{Stop, refuse};
use crate::file::examined::Examined;
use crate::file::record::RcrDatagram;
use crate::file::sys as file_sys;
use crate::sys::{SysError, SysResult};

const SOL: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
/// `UDP_GRO`, linux/udp.h: the length of the datagrams that were joined.
const UDP_GRO: i32 = 104;
/// `IPV6_HDRINCL`, linux/in6.h.
const IPV6_HDRINCL: i32 = 36;
/// Most that one piece of a queue has: joined datagrams are no longer.
const PIECE: usize = 1 << 17;
/// Longest payload behind an IPv6 header that the loopback device takes.
const V6_BYTES_MAX: usize = 65536 - 48;
/// Memory that one datagram may count for beyond its bytes.
const OVERHEAD: usize = 4096;
/// Nothing but a busy machine keeps a datagram from arriving at once.
const ARRIVAL_MAX: Duration = Duration::from_secs(2);

/// What is asked about each datagram.
const ASKED: [(i32, i32); 6] = [
    (IP, libc::IP_RECVORIGDSTADDR),
    (IP, libc::IP_RECVTTL),
    (IP, libc::IP_RECVTOS),
    (IP6, libc::IPV6_RECVORIGDSTADDR),
    (IP6, libc::IPV6_RECVHOPLIMIT),
    (IP6, libc::IPV6_RECVTCLASS),
];

/// Whether sockets of that kind have datagrams that can be sent again.
pub(super) fn has(kind: Kind) -> bool {
    let udp = [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE].contains(&kind.protocol);
    kind.kind == libc::SOCK_DGRAM && udp
}

/// The datagrams that nobody has read yet.
pub(super) fn save(file: &Examined<'_>, kind: Kind) -> Result<Vec<RcrDatagram>, Stop> {
    if !file.policy.payload || !has(kind) || !file_sys::readable(file.fd)? {
        return Ok(Vec::new());
    }
    let mut kept = Vec::new();
    for one in look(file.fd, kind.domain)? {
        match obstacle(&one) {
            None => kept.push(one),
            Some(_) if file.policy.skip_in_flight => {}
            Some(why) => {
                let from = file_sys::show_address(&one.source);
                return refuse(
                    "datagram socket",
                    format!("a datagram from {from} waits to be read, and {why}"),
                    "try again when it was read, or allow what is in flight to be lost",
                );
            }
        }
    }
    Ok(kept)
}

/// Why a datagram cannot be sent again.
fn obstacle(one: &RcrDatagram) -> Option<&'static str> {
    let (Some(from), Some(to)) = (parse(&one.source), parse(&one.target)) else {
        return Some("its addresses are not known");
    };
    match (from.ip(), to.ip()) {
        (_, IpAddr::V4(to)) if to.is_multicast() || to.is_broadcast() => {
            Some("others may get it, too: it went to a group")
        }
        (_, IpAddr::V6(to)) if to.is_multicast() => {
            Some("others may get it, too: it went to a group")
        }
        (IpAddr::V6(from), IpAddr::V6(to))
            if from.is_unicast_link_local() || to.is_unicast_link_local() =>
        {
            Some("its addresses are those of one link")
        }
        (IpAddr::V6(_), _) if one.data.len() > V6_BYTES_MAX => Some("it is too long"),
        _ => None,
    }
}

fn look(fd: BorrowedFd<'_>, domain: i32) -> SysResult<Vec<RcrDatagram>> {
    let asked = ASKED
        .iter()
        .filter(|(level, _)| *level == IP || domain == libc::AF_INET6);
    let mut before = vec![(SOL, libc::SO_PEEK_OFF, option(fd, SOL, libc::SO_PEEK_OFF)?)];
    for &(level, name) in asked {
        before.push((level, name, option(fd, level, name)?));
    }
    let mut looked = Ok(Vec::new());
    for (level, name, _) in &before {
        let on = i32::from(*name != libc::SO_PEEK_OFF || *level != SOL);
        if let Err(e) = set(fd, *level, *name, on) {
            looked = Err(e);
        }
    }
    if looked.is_ok() {
        looked = walk(fd);
    }
    for (level, name, value) in before {
        set(fd, level, name, value)?;
    }
    looked
}

fn walk(fd: BorrowedFd<'_>) -> SysResult<Vec<RcrDatagram>> {
    let local = file_sys::local_address(fd)?;
    let mut all = Vec::new();
    let mut buffer = vec![0; PIECE];
    while let Some((len, about)) = sys::peek(fd, &mut buffer)? {
        let mut one = RcrDatagram {
            source: about.from.unwrap_or_default(),
            target: local.clone(),
            data: buffer[..len].to_vec(),
            ..RcrDatagram::default()
        };
        let mut joined = None;
        for (level, kind, value) in &about.others {
            let number = match value.as_slice() {
                [b] => Some(u32::from(*b)),
                _ => value
                    .get(..4)
                    .map(|b| u32::from_ne_bytes(b.try_into().expect("4"))),
            };
            match (*level, *kind) {
                (IP, libc::IP_ORIGDSTADDR) | (IP6, libc::IPV6_ORIGDSTADDR) => {
                    one.target.clone_from(value);
                }
                (IP, libc::IP_TTL) | (IP6, libc::IPV6_HOPLIMIT) => one.hops = number,
                (IP, libc::IP_TOS) | (IP6, libc::IPV6_TCLASS) => one.class = number,
                (libc::IPPROTO_UDP, UDP_GRO) => joined = number,
                _ => {}
            }
        }
        match joined.filter(|&n| n > 0) {
            None => all.push(one),
            Some(n) => all.extend(one.data.chunks(n as usize).map(|part| RcrDatagram {
                data: part.to_vec(),
                ..one.clone()
            })),
        }
    }
    Ok(all)
}

/// Puts datagrams into the queue of a socket that is bound. One that does not
/// arrive is lost, as networks lose them, and said to be.
pub(super) fn send_again(
    fd: BorrowedFd<'_>,
    kind: Kind,
    datagrams: &[RcrDatagram],
) -> SysResult<()> {
    if datagrams.is_empty() {
        return Ok(());
    }
    let filter = file_sys::socket_filter(fd)?;
    if !filter.is_empty() {
        set(fd, SOL, libc::SO_DETACH_FILTER, 0)?;
    }
    let device = file_sys::socket_option(fd, SOL, libc::SO_BINDTODEVICE, 16)?;
    if !device.is_empty() {
        file_sys::set_socket_option(fd, SOL, libc::SO_BINDTODEVICE, &[0])?;
    }
    let shared = option(fd, SOL, libc::SO_REUSEPORT)? != 0;
    let steered = if shared { Some(steer::to(fd)?) } else { None };
    let sent = with_room(fd, datagrams, |d| send_one(fd, kind, d));
    drop(steered);
    if !device.is_empty() {
        file_sys::set_socket_option(fd, SOL, libc::SO_BINDTODEVICE, &device)?;
    }
    if !filter.is_empty() {
        file_sys::attach_filter(fd, &filter)?;
    }
    sent
}

/// Runs `f` for datagrams while the receiving socket takes them all.
fn with_room(
    fd: BorrowedFd<'_>,
    datagrams: &[RcrDatagram],
    f: impl FnMut(&RcrDatagram) -> SysResult<()>,
) -> SysResult<()> {
    let before = option(fd, SOL, libc::SO_RCVBUF)?;
    let locked = option(fd, SOL, opts::SO_BUF_LOCK)?;
    // Memory counts by pages and slabs, not by bytes.
    let total: usize = datagrams.iter().map(|d| 2 * d.data.len() + OVERHEAD).sum();
    let total = i32::try_from(total).unwrap_or(i32::MAX / 2);
    set(fd, SOL, libc::SO_RCVBUFFORCE, total.max(before / 2))?;
    let done = datagrams.iter().try_for_each(f);
    set(fd, SOL, libc::SO_RCVBUFFORCE, before / 2)?;
    set(fd, SOL, opts::SO_BUF_LOCK, locked)?;
    done
}

fn send_one(fd: BorrowedFd<'_>, kind: Kind, one: &RcrDatagram) -> SysResult<()> {
    let torn = || SysError::new("sendto", "a datagram of the images", Errno::EBADMSG);
    let (from, to) = match (parse(&one.source), parse(&one.target)) {
        (Some(from), Some(to)) if from.is_ipv4() == to.is_ipv4() => (from, to),
        _ => return Err(torn()),
    };
    let footing = Footing::under(to.ip())?;
    let before = queued(fd)?;
    let raw = raw_socket(&to)?;
    let packet = packet(kind.protocol as u8, from, to, one).ok_or_else(torn)?;
    sys::send_to(raw.as_fd(), &packet, &raw_address(to.ip()))?;
    let deadline = Instant::now() + ARRIVAL_MAX;
    while queued(fd)? == before {
        if Instant::now() > deadline {
            tracing::warn!("a datagram from {from} to {to} did not arrive again");
            break;
        }
        std::thread::yield_now();
    }
    footing.lower()
}

fn raw_socket(to: &SocketAddr) -> SysResult<OwnedFd> {
    let family = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let raw = file_sys::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let (level, name) = match to {
        SocketAddr::V4(_) => (IP, libc::IP_HDRINCL),
        SocketAddr::V6(_) => (IP6, IPV6_HDRINCL),
    };
    set(raw.as_fd(), level, name, 1)?;
    // As long as the longest there is.
    set(raw.as_fd(), SOL, libc::SO_SNDBUFFORCE, 1 << 20)?;
    Ok(raw)
}

/// Memory that waits in a socket's queue, as the kernel counts it.
fn queued(fd: BorrowedFd<'_>) -> SysResult<u32> {
    // linux/sock_diag.h: SK_MEMINFO_RMEM_ALLOC comes first.
    const SO_MEMINFO: i32 = 55;
    let words = file_sys::socket_option(fd, SOL, SO_MEMINFO, 64)?;
    let first = words.get(..4).and_then(|b| b.try_into().ok());
    let missing = || SysError::new("getsockopt(SO_MEMINFO)", fd.as_raw_fd(), Errno::EINVAL);
    first.map(u32::from_ne_bytes).ok_or_else(missing)
}

fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> SysResult<i32> {
    file_sys::socket_option_int(fd, level, name)
}

fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> SysResult<()> {
    file_sys::set_socket_option(fd, level, name, &value.to_ne_bytes())
}

/// A raw address; IPv4 inside of IPv6 counts as IPv4.
fn parse(address: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(address.get(2..4)?.try_into().ok()?);
    match address.len() {
        16 => {
            let ip: [u8; 4] = address[4..8].try_into().ok()?;
            Some(SocketAddr::from((Ipv4Addr::from(ip), port)))
        }
        28 => {
            let ip: [u8; 16] = address[8..24].try_into().ok()?;
            Some(match Ipv6Addr::from(ip).to_ipv4_mapped() {
                Some(ip) => SocketAddr::from((ip, port)),
                None => SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, 0).into(),
            })
        }
        _ => None,
    }
}

/// The address as sendto(2) of a raw socket takes it, without a port.
fn raw_address(ip: IpAddr) -> Vec<u8> {
    let (family, bytes) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let words = bytes.chunks_exact(4);
    let words: Vec<u32> = words
        .map(|w| u32::from_ne_bytes(w.try_into().expect("4")))
        .collect();
    super::inet::address(family as u32, &words, 0)
}

/// The packet: IP header (RFC 791, RFC 8200), UDP header (RFC 768, RFC 3828), data.
fn packet(protocol: u8, from: SocketAddr, to: SocketAddr, one: &RcrDatagram) -> Option<Vec<u8>> {
    let len = u16::try_from(8 + one.data.len()).ok()?;
    let hops = one.hops.unwrap_or(64) as u8;
    let class = one.class.unwrap_or(0) as u8;
    let (head, pseudo) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = len.checked_add(20)?;
            let mut head = vec![0x45, class];
            head.extend(total.to_be_bytes());
            // No identification, do not fragment; the kernel sums it up.
            head.extend([0, 0, 0x40, 0, hops, protocol, 0, 0]);
            head.extend([from.octets(), to.octets()].concat());
            (head, [from.octets(), to.octets()].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut head = vec![0x60 | class >> 4, class << 4, 0, 0];
            head.extend(len.to_be_bytes());
            head.extend([protocol, hops]);
            head.extend([from.octets(), to.octets()].concat());
            (head, [from.octets(), to.octets()].concat())
        }
        _ => return None,
    };
    let lite = i32::from(protocol) == libc::IPPROTO_UDPLITE;
    // UDP-Lite has there how much the sum covers: all.
    let shown = if lite { 0 } else { len };
    let mut udp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    udp.extend(shown.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(&one.data);
    let summed = [&pseudo[..], &[0, protocol], &len.to_be_bytes(), &udp].concat();
    let sum = match checksum(&summed) {
        // Nothing would mean that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    Some([head, udp].concat())
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |w: &[u8]| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0));
    let mut sum: u64 = bytes.chunks(2).map(|w| u64::from(word(w))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_datagram_comes_again_from_its_sender() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let old = UdpSocket::bind(host).unwrap();
            let sender = UdpSocket::bind(host).unwrap();
            let name = old.local_addr().unwrap();
            for text in ["first", "", "third, of odd length"] {
                sender.send_to(text.as_bytes(), name).unwrap();
            }
            let domain = if name.is_ipv4() {
                libc::AF_INET
            } else {
                libc::AF_INET6
            };
            let kind = Kind {
                domain,
                kind: libc::SOCK_DGRAM,
                protocol: libc::IPPROTO_UDP,
            };
            let seen = look(old.as_fd(), domain).unwrap();
            assert_eq!(seen.len(), 3);
            drop(old);
            let new = UdpSocket::bind(name).unwrap();
            send_again(new.as_fd(), kind, &seen).unwrap();
            assert_eq!(look(new.as_fd(), domain).unwrap(), seen);
            let mut buffer = [0; 64];
            let (len, from) = new.recv_from(&mut buffer).unwrap();
            assert_eq!(
                (&buffer[..len], from),
                (&b"first"[..], sender.local_addr().unwrap())
            );
        }
    }
}
