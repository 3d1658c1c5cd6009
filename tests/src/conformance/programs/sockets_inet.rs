//! IP sockets without connections, and sockets of other families.

mod others;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::conformance::sys::{get_option, numbers, set_option, set_option_bytes};
use crate::conformance::{Case, Check, Stage, Unavailable};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "sockets/udp-connected",
        "connected UDP sockets, IPv4 and IPv6",
        udp_connected,
    ),
    Case::new(
        "sockets/udp-options",
        "UDP options: GRO, segmentation, checksums, TTL, TOS, packet info",
        udp_options,
    ),
    Case::new(
        "sockets/udp-shared-port",
        "UDP sockets that share a port (SO_REUSEPORT)",
        udp_shared_port,
    ),
    Case::new(
        "sockets/udp-corked",
        "a UDP datagram in the making",
        udp_corked,
    )
    .refused(),
    Case::new(
        "sockets/udp-lite",
        "a UDP-Lite socket with partial checksums",
        udp_lite,
    ),
    Case::new(
        "sockets/bound-device",
        "a socket bound to a device, a foreign address, transparent",
        bound_device,
    ),
    Case::new(
        "sockets/multicast",
        "IPv4 groups: plain, blocked source, chosen source",
        multicast,
    ),
    Case::new("sockets/multicast-v6", "an IPv6 group", multicast6),
    Case::new("sockets/raw", "a raw socket with an ICMP filter", raw),
    Case::new("sockets/raw-v6", "a raw IPv6 socket that checks sums", raw6),
    Case::new("sockets/ping", "a ping socket with its id", ping),
    Case::new(
        "sockets/mptcp-listen",
        "a listening MPTCP socket",
        mptcp_listen,
    ),
    Case::new(
        "sockets/mptcp-connected",
        "an MPTCP connection",
        mptcp_connected,
    )
    .carrying_tcp()
    .refused(),
    Case::new(
        "sockets/tcp-listen-options",
        "backlog, fast open, deferred accept, segment size of a listener",
        tcp_listen_options,
    ),
    Case::new(
        "sockets/bpf-filter",
        "a socket with a classic BPF filter",
        bpf_filter,
    ),
    Case::new(
        "sockets/packet",
        "a packet socket bound to an interface, with options and groups",
        others::packet,
    ),
    Case::new(
        "sockets/packet-fanout",
        "packet sockets of a fanout group",
        others::packet_fanout,
    ),
    Case::new(
        "sockets/packet-ring",
        "a packet socket with a ring in shared memory",
        others::packet_ring,
    )
    .not_yet(),
    Case::new(
        "sockets/vsock",
        "a socket to virtual machines",
        others::vsock,
    )
    .refused(),
    Case::new("sockets/xdp", "an XDP socket", others::xdp).refused(),
    Case::new(
        "sockets/crypto",
        "a socket of the kernel's crypto",
        others::crypto,
    )
    .refused(),
];

fn make(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC;
    let all = [family.into(), kind.into(), protocol.into()];
    let fd = numbers(libc::SYS_socket, &all).map_err(|e| {
        Unavailable::because(format!("no socket {family}, {kind}, {protocol}: {e}"))
    })?;
    // SAFETY: just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn udp_connected(_: &Stage) -> Result<Check> {
    let pair = |host: std::net::IpAddr| -> Result<(UdpSocket, UdpSocket)> {
        let (a, b) = (UdpSocket::bind((host, 0))?, UdpSocket::bind((host, 0))?);
        a.connect(b.local_addr()?)?;
        b.connect(a.local_addr()?)?;
        Ok((a, b))
    };
    let pairs = [
        pair(Ipv4Addr::LOCALHOST.into())?,
        pair(Ipv6Addr::LOCALHOST.into())?,
    ];
    let names: Vec<(SocketAddr, SocketAddr)> = pairs
        .iter()
        .map(|(a, _)| Ok((a.local_addr()?, a.peer_addr()?)))
        .collect::<Result<_>>()?;
    Ok(Box::new(move |f| {
        for ((a, b), name) in pairs.iter().zip(&names) {
            f.same("addresses", name, &(a.local_addr()?, a.peer_addr()?));
            for (from, to) in [(a, b), (b, a)] {
                from.send(b"hello")?;
                let mut word = [0; 5];
                to.recv(&mut word)?;
                f.same("a datagram", b"hello", &word);
            }
        }
        Ok(())
    }))
}

type Setting = (i32, i32, i32);

fn keeps(socket: OwnedFd, settings: &'static [Setting]) -> Result<Check> {
    for &(level, name, value) in settings {
        set_option(&socket, level, name, value)?;
    }
    let facts = move || -> Result<Vec<Vec<u8>>> {
        let one = |&(level, name, _): &Setting| get_option(&socket, level, name, 64);
        settings.iter().map(one).collect()
    };
    let was = facts()?;
    Ok(Box::new(move |f| {
        f.same("options", &was, &facts()?);
        Ok(())
    }))
}

fn udp_options(_: &Stage) -> Result<Check> {
    let socket = make(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    const ALL: &[Setting] = &[
        (libc::IPPROTO_UDP, 103, 1200), // UDP_SEGMENT
        (libc::IPPROTO_UDP, 104, 1),    // UDP_GRO
        (libc::IPPROTO_UDP, 101, 1),    // UDP_NO_CHECK6_TX
        (libc::IPPROTO_IP, libc::IP_TTL, 9),
        (libc::IPPROTO_IP, libc::IP_TOS, 8),
        (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, 5),
        (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, 0),
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 3),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
        (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1),
        (libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
    ];
    keeps(socket, ALL)
}

fn udp_shared_port(_: &Stage) -> Result<Check> {
    let bound = |port: u16| -> Result<UdpSocket> {
        let fd = make(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, port);
        nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
        let socket = UdpSocket::from(fd);
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let first = bound(0)?;
    let address = first.local_addr()?;
    let all = [bound(address.port())?, bound(address.port())?, first];
    Ok(Box::new(move |f| {
        for _ in 0..32 {
            let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            sender.send_to(b"x", address)?;
        }
        let mut got = 0;
        for s in &all {
            f.same("address", &address, &s.local_addr()?);
            while s.recv(&mut [0]).is_ok() {
                got += 1;
            }
        }
        f.same("datagrams", &32, &got);
        Ok(())
    }))
}

fn udp_corked(stage: &Stage) -> Result<Check> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(receiver.local_addr()?)?;
    send(
        socket.as_raw_fd(),
        b"first",
        MsgFlags::from_bits_retain(libc::MSG_MORE),
    )?;
    stage.expect_refusal(&[format!("fd {}", socket.as_raw_fd()), "in the making".into()])?;
    Ok(Box::new(move |f| {
        socket.send(b" and second")?;
        let mut text = [0; 16];
        receiver.recv(&mut text)?;
        f.same("one datagram", b"first and second", &text);
        Ok(())
    }))
}

fn udp_lite(_: &Stage) -> Result<Check> {
    let make = || make(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
    let (a, b) = (UdpSocket::from(make()?), UdpSocket::from(make()?));
    for s in [&a, &b] {
        let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
        nix::sys::socket::bind(s.as_raw_fd(), &at)?;
    }
    // UDPLITE_SEND_CSCOV, UDPLITE_RECV_CSCOV
    set_option(&a, libc::IPPROTO_UDPLITE, 10, 12)?;
    set_option(&b, libc::IPPROTO_UDPLITE, 11, 10)?;
    let to = b.local_addr()?;
    Ok(Box::new(move |f| {
        let cover = get_option(&a, libc::IPPROTO_UDPLITE, 10, 4)?;
        f.same("coverage", &12i32.to_ne_bytes().to_vec(), &cover);
        let cover = get_option(&b, libc::IPPROTO_UDPLITE, 11, 4)?;
        f.same("wanted coverage", &10i32.to_ne_bytes().to_vec(), &cover);
        a.send_to(b"hello", to)?;
        let mut word = [0; 5];
        b.recv(&mut word)?;
        f.same("a datagram", b"hello", &word);
        Ok(())
    }))
}

fn bound_device(_: &Stage) -> Result<Check> {
    let fd = make(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    set_option_bytes(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")?;
    set_option(&fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
    set_option(&fd, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_MARK, 5)?;
    let at = nix::sys::socket::SockaddrIn::new(203, 0, 113, 7, 0);
    nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
    let facts = move || -> Result<_> {
        let socket = UdpSocket::from(fd.try_clone()?);
        Ok((
            socket.local_addr()?,
            get_option(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16)?,
            get_option(&fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 4)?,
            get_option(&fd, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 4)?,
            get_option(&fd, libc::SOL_SOCKET, libc::SO_MARK, 4)?,
        ))
    };
    let was = facts()?;
    Ok(Box::new(move |f| {
        f.same("address and options", &was, &facts()?);
        Ok(())
    }))
}

/// `struct group_req`, or with a source `struct group_source_req`, for `lo`.
fn group(address: &[u8], source: Option<[u8; 4]>) -> Vec<u8> {
    let mut all = vec![0; 136];
    all[0] = 1;
    all[8..8 + address.len()].copy_from_slice(address);
    if let Some(source) = source {
        all.resize(264, 0);
        all[136..138].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        all[140..144].copy_from_slice(&source);
    }
    all
}

fn group4(last: u8) -> Vec<u8> {
    let mut raw = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    raw.extend_from_slice(&[0, 0, 239, 1, 2, last]);
    raw
}

// MCAST_JOIN_GROUP, MCAST_BLOCK_SOURCE, MCAST_JOIN_SOURCE_GROUP
const JOIN: i32 = 42;
const BLOCK: i32 = 43;
const JOIN_SOURCE: i32 = 46;

fn multicast(_: &Stage) -> Result<Check> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    let ip = libc::IPPROTO_IP;
    set_option_bytes(&socket, ip, JOIN, &group(&group4(1), None))?;
    set_option_bytes(&socket, ip, JOIN, &group(&group4(2), None))?;
    set_option_bytes(&socket, ip, BLOCK, &group(&group4(2), Some([127, 0, 0, 1])))?;
    let chosen = group(&group4(3), Some([127, 0, 0, 1]));
    set_option_bytes(&socket, ip, JOIN_SOURCE, &chosen)?;
    let other = group(&group4(4), Some([127, 0, 0, 9]));
    set_option_bytes(&socket, ip, JOIN_SOURCE, &other)?;
    set_option(&socket, ip, libc::IP_MULTICAST_ALL, 0)?;
    let port = socket.local_addr()?.port();
    let reached = move || -> Result<Vec<bool>> {
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let lo = [[0; 8].as_slice(), &1i32.to_ne_bytes()].concat();
        set_option_bytes(&sender, ip, libc::IP_MULTICAST_IF, &lo)?;
        let mut all = Vec::new();
        for last in 1..=5 {
            sender.send_to(b"x", (Ipv4Addr::new(239, 1, 2, last), port))?;
            all.push(socket.recv(&mut [0]).is_ok());
        }
        Ok(all)
    };
    let expected = vec![true, false, true, false, false];
    anyhow::ensure!(reached()? == expected, "groups do not work here");
    Ok(Box::new(move |f| {
        f.same("groups that reach it", &expected, &reached()?);
        Ok(())
    }))
}

fn multicast6(_: &Stage) -> Result<Check> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let group: Ipv6Addr = "ff05::1234".parse()?;
    socket.join_multicast_v6(&group, 1)?;
    Ok(Box::new(move |f| {
        let again = socket.join_multicast_v6(&group, 1);
        let again = again.map_err(|e| e.raw_os_error());
        f.same("joining again", &Err(Some(libc::EADDRINUSE)), &again);
        let other = "ff05::1235".parse()?;
        socket.join_multicast_v6(&other, 1)?;
        Ok(socket.leave_multicast_v6(&other, 1)?)
    }))
}

fn raw(_: &Stage) -> Result<Check> {
    let fd = make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    // ICMP_FILTER: all but echo requests are blocked.
    set_option(&fd, libc::IPPROTO_RAW, 1, !(1 << 8))?;
    set_option(&fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    Ok(Box::new(move |f| {
        let filter = get_option(&fd, libc::IPPROTO_RAW, 1, 4)?;
        f.same("filter", &(!(1i32 << 8)).to_ne_bytes().to_vec(), &filter);
        let own = get_option(&fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 4)?;
        f.same("own headers", &1i32.to_ne_bytes().to_vec(), &own);
        let sender = make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
        let to = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
        let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
        nix::sys::socket::sendto(sender.as_raw_fd(), &echo, &to, MsgFlags::empty())?;
        let mut packet = [0; 100];
        let n = recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        f.same("what came", &(28, 8), &(n, packet[20]));
        Ok(())
    }))
}

fn raw6(_: &Stage) -> Result<Check> {
    let fd = make(libc::AF_INET6, libc::SOCK_RAW, 200)?;
    // IPV6_CHECKSUM
    set_option(&fd, libc::IPPROTO_IPV6, 7, 4)?;
    set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 7)?;
    Ok(Box::new(move |f| {
        let at = get_option(&fd, libc::IPPROTO_IPV6, 7, 4)?;
        f.same("where the sum is", &4i32.to_ne_bytes().to_vec(), &at);
        let hops = get_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 4)?;
        f.same("hops", &7i32.to_ne_bytes().to_vec(), &hops);
        Ok(())
    }))
}

fn ping(_: &Stage) -> Result<Check> {
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
        .map_err(|e| Unavailable::because(format!("ping_group_range: {e}")))?;
    let fd = make(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
    let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 4321);
    nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
    Ok(Box::new(move |f| {
        let socket = UdpSocket::from(fd.try_clone()?);
        f.same("its id", &4321, &socket.local_addr()?.port());
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        let echo = [8, 0, 0, 0, 0, 0, 0, 1];
        let to = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
        nix::sys::socket::sendto(fd.as_raw_fd(), &echo, &to, MsgFlags::empty())?;
        let mut answer = [0; 100];
        let n = socket.recv(&mut answer)?;
        f.same(
            "the answer",
            &(8, 0, [0x10, 0xe1]),
            &(n, answer[0], [answer[4], answer[5]]),
        );
        Ok(())
    }))
}

const MPTCP: i32 = 262;

fn mptcp_listener() -> Result<TcpListener> {
    let fd = make(libc::AF_INET, libc::SOCK_STREAM, MPTCP)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
    nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
    nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(9)?)?;
    Ok(TcpListener::from(fd))
}

fn mptcp_listen(_: &Stage) -> Result<Check> {
    use std::io::{Read, Write};
    let listener = mptcp_listener()?;
    let address = listener.local_addr()?;
    Ok(Box::new(move |f| {
        f.same("address", &address, &listener.local_addr()?);
        let protocol = get_option(&listener, libc::SOL_SOCKET, libc::SO_PROTOCOL, 4)?;
        f.same("protocol", &MPTCP.to_ne_bytes().to_vec(), &protocol);
        let mut client = TcpStream::connect(address)?;
        client.write_all(b"hello")?;
        let mut word = [0; 5];
        listener.accept()?.0.read_exact(&mut word)?;
        f.same("a client's word", b"hello", &word);
        Ok(())
    }))
}

fn mptcp_connected(stage: &Stage) -> Result<Check> {
    use std::io::{Read, Write};
    let listener = mptcp_listener()?;
    let fd = make(libc::AF_INET, libc::SOCK_STREAM, MPTCP)?;
    let SocketAddr::V4(to) = listener.local_addr()? else {
        anyhow::bail!("not IPv4");
    };
    nix::sys::socket::connect(fd.as_raw_fd(), &nix::sys::socket::SockaddrIn::from(to))?;
    let mut client = TcpStream::from(fd);
    let mut server = listener.accept()?.0;
    stage.expect_refusal(&[
        format!("fd {}", client.as_raw_fd()),
        format!("fd {}", server.as_raw_fd()),
        "MPTCP".into(),
    ])?;
    Ok(Box::new(move |f| {
        let mut word = [0; 5];
        client.write_all(b"hello")?;
        server.read_exact(&mut word)?;
        f.same("a word", b"hello", &word);
        Ok(())
    }))
}

fn tcp_listen_options(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(7)?)?;
    let tcp = libc::IPPROTO_TCP;
    for (name, value) in [
        (libc::TCP_FASTOPEN, 5),
        (libc::TCP_DEFER_ACCEPT, 3),
        (libc::TCP_MAXSEG, 900),
        (libc::TCP_SAVE_SYN, 1),
        (libc::TCP_WINDOW_CLAMP, 9000),
    ] {
        set_option(&listener, tcp, name, value)?;
    }
    let facts = move || -> Result<_> {
        let one = |name| get_option(&listener, tcp, name, 4);
        let info = get_option(&listener, tcp, libc::TCP_INFO, 144)?;
        Ok((
            one(libc::TCP_FASTOPEN)?,
            one(libc::TCP_DEFER_ACCEPT)?,
            one(libc::TCP_MAXSEG)?,
            one(libc::TCP_SAVE_SYN)?,
            one(libc::TCP_WINDOW_CLAMP)?,
            info[28..32].to_vec(),
        ))
    };
    let was = facts()?;
    Ok(Box::new(move |f| {
        f.same("options and backlog", &was, &facts()?);
        Ok(())
    }))
}

fn bpf_filter(_: &Stage) -> Result<Check> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    // Lets pass what is longer than 10 bytes, UDP header included, no other.
    let code: [libc::sock_filter; 4] = [
        (0x80, 0, 0, 0),     // A = length
        (0x25, 0, 1, 10),    // A > 10 ?
        (0x06, 0, 0, 65535), // all of it
        (0x06, 0, 0, 0),     // nothing
    ]
    .map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k });
    let program = libc::sock_fprog {
        len: 4,
        filter: code.as_ptr().cast_mut(),
    };
    let at = (&raw const program).cast();
    let len = size_of_val(&program) as libc::socklen_t;
    let option = libc::SO_ATTACH_FILTER;
    // SAFETY: the program and its code outlive the call; the kernel copies them.
    let r = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, at, len) };
    anyhow::ensure!(
        r == 0,
        "SO_ATTACH_FILTER: {}",
        std::io::Error::last_os_error()
    );
    let to = socket.local_addr()?;
    Ok(Box::new(move |f| {
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        sender.send_to(b"x", to)?;
        f.that("a short one passes", socket.recv(&mut [0]).is_err());
        sender.send_to(b"long", to)?;
        let mut word = [0; 4];
        f.same("a long one", &4, &socket.recv(&mut word)?);
        Ok(())
    }))
}
