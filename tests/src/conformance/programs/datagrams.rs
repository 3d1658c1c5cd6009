//! What waits in the queues of sockets: datagrams, urgent bytes.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::Result;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::conformance::sys::{numbers, raw, set_option, set_option_bytes};
use crate::conformance::{Case, Check, Findings, Stage, Unavailable};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "sockets/udp-queued",
        "datagrams that were not read, of several senders, IPv4 and IPv6",
        udp_queued,
    ),
    Case::new(
        "sockets/udp-queued-about",
        "unread datagrams with their destination, TTL and TOS",
        udp_queued_about,
    ),
    Case::new(
        "sockets/udp-queued-shared",
        "unread datagrams of sockets that share a port (SO_REUSEPORT)",
        udp_queued_shared,
    ),
    Case::new(
        "sockets/udp-queued-connected",
        "unread datagrams of a connected socket, bound to a device, with a filter",
        udp_queued_connected,
    ),
    Case::new(
        "sockets/udp-queued-foreign",
        "unread datagrams from a sender that is elsewhere",
        udp_queued_foreign,
    ),
    Case::new(
        "sockets/udp-queued-group",
        "an unread datagram that went to a group",
        udp_queued_group,
    )
    .refused(),
    Case::new(
        "sockets/unix-urgent",
        "an urgent byte (MSG_OOB) of a unix stream, before, behind and among others",
        unix_urgent,
    ),
    Case::new(
        "sockets/unix-urgent-inline",
        "an urgent byte of a unix stream that reads it in line (SO_OOBINLINE)",
        unix_urgent_inline,
    ),
];

fn nowait() -> MsgFlags {
    MsgFlags::MSG_DONTWAIT
}

fn read_all(socket: &UdpSocket) -> Result<Vec<(Vec<u8>, SocketAddr)>> {
    socket.set_nonblocking(true)?;
    let mut all = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while let Ok((len, from)) = socket.recv_from(&mut buffer) {
        all.push((buffer[..len].to_vec(), from));
    }
    Ok(all)
}

fn udp_queued(_: &Stage) -> Result<Check> {
    let hosts: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let mut sets = Vec::new();
    for host in hosts {
        let receiver = UdpSocket::bind((host, 0))?;
        let senders = [UdpSocket::bind((host, 0))?, UdpSocket::bind((host, 0))?];
        sets.push((receiver, senders));
    }
    let large = vec![7; 40_000];
    let send = move |sets: &[(UdpSocket, [UdpSocket; 2])]| -> Result<Vec<_>> {
        let mut sent = Vec::new();
        for (receiver, senders) in sets {
            let to = receiver.local_addr()?;
            let mut of_one = Vec::new();
            let texts: [&[u8]; 5] = [b"one", b"", &large, b"four", b"five"];
            for (n, text) in texts.iter().enumerate() {
                let sender = &senders[n % 2];
                sender.send_to(text, to)?;
                of_one.push((text.to_vec(), sender.local_addr()?));
            }
            sent.push(of_one);
        }
        Ok(sent)
    };
    let mut sent = send(&sets)?;
    Ok(Box::new(move |f| {
        for ((receiver, _), sent) in sets.iter().zip(&sent) {
            f.that("datagrams as they were", *sent == read_all(receiver)?);
        }
        sent = send(&sets)?;
        Ok(())
    }))
}

fn udp_queued_about(_: &Stage) -> Result<Check> {
    use nix::sys::socket::{ControlMessageOwned, SockaddrIn, recvmsg};
    let receiver = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for name in [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS] {
        set_option(&receiver, libc::IPPROTO_IP, name, 1)?;
    }
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    set_option(&sender, libc::IPPROTO_IP, libc::IP_TTL, 33)?;
    set_option(&sender, libc::IPPROTO_IP, libc::IP_TOS, 0x20)?;
    let port = receiver.local_addr()?.port();
    sender.send_to(b"first", (Ipv4Addr::new(127, 0, 0, 5), port))?;
    Ok(Box::new(move |f| {
        let mut text = [0; 8];
        let mut iov = [std::io::IoSliceMut::new(&mut text)];
        let mut space = vec![0; 256];
        let got =
            recvmsg::<SockaddrIn>(receiver.as_raw_fd(), &mut iov, Some(&mut space), nowait())?;
        let mut seen = Vec::new();
        for c in got.cmsgs()? {
            match c {
                ControlMessageOwned::Ipv4PacketInfo(p) => {
                    seen.push(u32::from_be(p.ipi_addr.s_addr));
                }
                ControlMessageOwned::Ipv4Ttl(n) => seen.push(n as u32),
                ControlMessageOwned::Ipv4Tos(n) => seen.push(n.into()),
                _ => {}
            }
        }
        f.same("length", &5, &got.bytes);
        let to = u32::from(Ipv4Addr::new(127, 0, 0, 5));
        f.same("destination, TTL, TOS", &vec![to, 33, 0x20], &seen);
        sender.send_to(b"again", (Ipv4Addr::new(127, 0, 0, 5), port))?;
        Ok(())
    }))
}

fn udp_queued_shared(_: &Stage) -> Result<Check> {
    let bound = |port: u16| -> Result<UdpSocket> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        let fd = numbers(libc::SYS_socket, &[libc::AF_INET.into(), kind.into(), 0])?;
        // SAFETY: just made for us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, port);
        nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
        Ok(UdpSocket::from(fd))
    };
    let first = bound(0)?;
    let at = first.local_addr()?;
    let all = [bound(at.port())?, first, bound(at.port())?];
    let senders = (0..8).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)));
    let senders = senders.collect::<std::io::Result<Vec<_>>>()?;
    let fill = move || -> Result<()> {
        for (n, s) in senders.iter().enumerate() {
            s.send_to(&[n as u8], at)?;
        }
        Ok(())
    };
    let look = |s: &UdpSocket| -> usize {
        // Only the first can be looked at without a peek offset.
        recv(s.as_raw_fd(), &mut [0], nowait() | MsgFlags::MSG_PEEK).map_or(0, |n| n)
    };
    fill()?;
    let mut had: Vec<usize> = all.iter().map(look).collect();
    Ok(Box::new(move |f| {
        let has: Vec<usize> = all.iter().map(look).collect();
        f.same("who has some", &had, &has);
        let mut got: Vec<u8> = Vec::new();
        for s in &all {
            let all = read_all(s)?;
            f.that("in order", all.is_sorted_by_key(|(text, _)| text.clone()));
            got.extend(all.iter().flat_map(|(text, _)| text));
        }
        got.sort_unstable();
        f.same("all of them", &(0..8).collect::<Vec<u8>>(), &got);
        fill()?;
        had = all.iter().map(look).collect();
        Ok(())
    }))
}

fn udp_queued_connected(_: &Stage) -> Result<Check> {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let early = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = receiver.local_addr()?;
    early.send_to(b"before it was connected", to)?;
    receiver.connect(sender.local_addr()?)?;
    sender.send_to(b"from its peer", to)?;
    set_option_bytes(&receiver, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")?;
    // Nothing that comes from now on passes: BPF_RET | BPF_K, 0.
    let code = [libc::sock_filter {
        code: 6,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let filter = libc::sock_fprog {
        len: 1,
        filter: code.as_ptr().cast_mut(),
    };
    // SAFETY: a filter of one instruction, alive across the call.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const filter).cast::<u8>(), size_of_val(&filter))
    };
    set_option_bytes(&receiver, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, bytes)?;
    let mut want = vec![
        (b"before it was connected".to_vec(), early.local_addr()?),
        (b"from its peer".to_vec(), sender.local_addr()?),
    ];
    Ok(Box::new(move |f| {
        sender.send_to(b"filtered", to)?;
        f.same("datagrams", &want, &read_all(&receiver)?);
        f.same("peer", &sender.local_addr()?, &receiver.peer_addr()?);
        want.clear();
        Ok(())
    }))
}

fn udp_queued_foreign(_: &Stage) -> Result<Check> {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = receiver.local_addr()?;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    let all = [libc::AF_INET.into(), kind.into(), libc::IPPROTO_RAW.into()];
    let fd = numbers(libc::SYS_socket, &all)
        .map_err(|e| Unavailable::because(format!("no raw socket: {e}")))?;
    // SAFETY: just made for us alone.
    let spoof = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let from = Ipv4Addr::new(192, 0, 2, 77);
    let send = move || -> Result<()> {
        // IP and UDP headers, the second without a checksum.
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(from.octets());
        packet.extend(Ipv4Addr::LOCALHOST.octets());
        packet.extend(5353u16.to_be_bytes());
        packet.extend(to.port().to_be_bytes());
        packet.extend([0, 12, 0, 0]);
        packet.extend(b"text");
        let at = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
        nix::sys::socket::sendto(raw(&spoof), &packet, &at, MsgFlags::empty())?;
        Ok(())
    };
    send()?;
    Ok(Box::new(move |f| {
        let want = vec![(b"text".to_vec(), SocketAddr::from((from, 5353)))];
        f.same("datagrams", &want, &read_all(&receiver)?);
        send()
    }))
}

fn udp_queued_group(stage: &Stage) -> Result<Check> {
    let group = Ipv4Addr::new(239, 255, 77, 1);
    let receiver = UdpSocket::bind((group, 0))?;
    receiver.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    set_option_bytes(
        &sender,
        libc::IPPROTO_IP,
        libc::IP_MULTICAST_IF,
        &Ipv4Addr::LOCALHOST.octets(),
    )?;
    sender.send_to(b"to all", receiver.local_addr()?)?;
    stage.expect_dump_refusal(&[
        format!("fd {}", receiver.as_raw_fd()),
        "it went to a group".into(),
    ])?;
    Ok(Box::new(move |f| {
        let want = vec![(b"to all".to_vec(), sender.local_addr()?)];
        f.same("datagrams", &want, &read_all(&receiver)?);
        sender.send_to(b"to all", receiver.local_addr()?)?;
        Ok(())
    }))
}

fn urgent(stream: &UnixStream, text: &[u8]) -> Result<()> {
    if !text.is_empty() {
        send(stream.as_raw_fd(), text, MsgFlags::MSG_OOB)
            .map_err(|e| Unavailable::because(format!("no urgent bytes in unix streams: {e}")))?;
    }
    Ok(())
}

fn at_mark(stream: &UnixStream) -> Result<bool> {
    let mut at = 0i32;
    // SAFETY: the ioctl writes one int.
    let r = unsafe { libc::ioctl(stream.as_raw_fd(), 0x8905, &raw mut at) };
    anyhow::ensure!(r == 0, "SIOCATMARK: {}", std::io::Error::last_os_error());
    Ok(at != 0)
}

const PLACES: [(&[u8], &[u8]); 4] = [
    (b"", b""),
    (b"", b"after"),
    (b"before", b""),
    (b"be", b"hind"),
];

fn fill(ends: &[(UnixStream, UnixStream)]) -> Result<()> {
    for ((before, after), (a, _)) in PLACES.iter().zip(ends) {
        (&*a).write_all(before)?;
        urgent(a, b"!")?;
        (&*a).write_all(after)?;
    }
    Ok(())
}

fn pairs(inline: bool) -> Result<Vec<(UnixStream, UnixStream)>> {
    let mut ends = Vec::new();
    for _ in PLACES {
        let (a, b) = UnixStream::pair()?;
        if inline {
            set_option(&b, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
        }
        b.set_nonblocking(true)?;
        ends.push((a, b));
    }
    Ok(ends)
}

fn unix_urgent(_: &Stage) -> Result<Check> {
    let ends = pairs(false)?;
    fill(&ends)?;
    Ok(Box::new(move |f: &mut Findings| {
        for ((before, after), (_, b)) in PLACES.iter().zip(&ends) {
            f.same("at the mark at once", &before.is_empty(), &at_mark(b)?);
            let mut text = [0; 32];
            if !before.is_empty() {
                let n = (&*b).read(&mut text)?;
                f.same("before", &before.to_vec(), &text[..n].to_vec());
                f.that("at the mark", at_mark(b)?);
            }
            let n = recv(b.as_raw_fd(), &mut text, MsgFlags::MSG_OOB)?;
            f.same("urgent", &b"!"[..], &text[..n]);
            let n = (&*b).read(&mut text).unwrap_or(0);
            f.same("behind", &after.to_vec(), &text[..n].to_vec());
        }
        fill(&ends)
    }))
}

fn unix_urgent_inline(_: &Stage) -> Result<Check> {
    let ends = pairs(true)?;
    fill(&ends)?;
    Ok(Box::new(move |f: &mut Findings| {
        for ((before, after), (_, b)) in PLACES.iter().zip(&ends) {
            f.same("at the mark at once", &before.is_empty(), &at_mark(b)?);
            let mut text = [0; 32];
            if !before.is_empty() {
                let n = (&*b).read(&mut text)?;
                f.same("before", &before.to_vec(), &text[..n].to_vec());
            }
            let n = (&*b).read(&mut text)?;
            let want = [b"!", *after].concat();
            f.same("urgent and behind", &want, &text[..n].to_vec());
        }
        fill(&ends)
    }))
}
