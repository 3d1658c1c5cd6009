//! Sockets: listening ones, pairs with queued data, established connections.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "sockets/tcp-listen",
        "a listening TCP socket with options",
        tcp_listen,
    ),
    Case::new("sockets/tcp6-listen", "the same over IPv6", tcp6_listen),
    Case::new(
        "sockets/tcp-shared-port",
        "two listeners on one port (SO_REUSEPORT)",
        tcp_shared_port,
    ),
    Case::new(
        "sockets/unix-listen",
        "listening unix sockets by path and name",
        unix_listen,
    ),
    Case::new("sockets/udp", "a bound UDP socket", udp),
    Case::new(
        "sockets/unix-datagram",
        "a bound datagram socket",
        unix_datagram,
    ),
    Case::new(
        "sockets/pair-stream",
        "a stream pair with queued data",
        pair_stream,
    ),
    Case::new(
        "sockets/pair-packets",
        "datagram and packet pairs with queued messages",
        pair_packets,
    ),
    Case::new(
        "sockets/pair-between",
        "a pair between processes",
        pair_between,
    ),
    Case::new("sockets/pair-ends", "pairs with a closed end", pair_ends),
    Case::new(
        "sockets/unix-connected",
        "a connection to a listener of the tree",
        unix_connected,
    ),
    Case::new(
        "sockets/tcp-close",
        "established TCP, policy close: as if the peer had gone",
        tcp_close,
    )
    .closing_tcp(),
    Case::new(
        "sockets/tcp-refuse",
        "established TCP, policy refuse: named, and the tree runs on",
        tcp_refuse,
    )
    .refused(),
];

fn tcp_echo(listener: &TcpListener, f: &mut Findings) -> Result<()> {
    let address = listener.local_addr()?;
    let mut client = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    let (mut server, peer) = listener.accept()?;
    f.same("the client's address", &client.local_addr()?, &peer);
    client.write_all(b"hello")?;
    let mut word = [0; 5];
    server.read_exact(&mut word)?;
    f.same("what a client sent", b"hello", &word);
    // Closed by the client's side: the listener's port stays free of leftovers.
    drop(client);
    f.same("then", &0, &server.read(&mut word)?);
    Ok(())
}

fn tcp_listen(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    setsockopt(&listener, sockopt::KeepAlive, &true)?;
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    setsockopt(&listener, sockopt::RcvBuf, &70_000)?;
    let fd = listener.as_fd().try_clone_to_owned()?;
    let facts = move || -> Result<_> {
        use nix::sys::socket::getsockopt;
        Ok((
            getsockopt(&fd, sockopt::KeepAlive)?,
            getsockopt(&fd, sockopt::TcpNoDelay)?,
            getsockopt(&fd, sockopt::RcvBuf)?,
            getsockopt(&fd, sockopt::ReuseAddr)?,
            getsockopt(&fd, sockopt::AcceptConn)?,
        ))
    };
    let (address, was) = (listener.local_addr()?, facts()?);
    Ok(Box::new(move |f| {
        f.same("address", &address, &listener.local_addr()?);
        f.same("options", &was, &facts()?);
        tcp_echo(&listener, f)
    }))
}

fn tcp6_listen(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok(Box::new(move |f| {
        f.same("address", &address, &listener.local_addr()?);
        let nobody = listener.accept().map(drop).map_err(|e| e.kind());
        f.same(
            "nobody there",
            &Err(std::io::ErrorKind::WouldBlock),
            &nobody,
        );
        listener.set_nonblocking(false)?;
        tcp_echo(&listener, f)?;
        Ok(listener.set_nonblocking(true)?)
    }))
}

fn tcp_shared_port(_: &Stage) -> Result<Check> {
    use nix::sys::socket::{Backlog, SockaddrIn, bind, listen, socket};
    let make = |port: u16| -> Result<TcpListener> {
        let s = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )?;
        setsockopt(&s, sockopt::ReusePort, &true)?;
        bind(s.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port))?;
        listen(&s, Backlog::new(7)?)?;
        Ok(TcpListener::from(s))
    };
    let first = make(0)?;
    let address = first.local_addr()?;
    let second = make(address.port())?;
    for l in [&first, &second] {
        l.set_nonblocking(true)?;
    }
    Ok(Box::new(move |f| {
        f.same("addresses", &address, &second.local_addr()?);
        let mut accepted = 0;
        for _ in 0..64 {
            let _client = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
            accepted += [&first, &second]
                .iter()
                .filter(|l| l.accept().is_ok())
                .count();
        }
        f.same("accepted", &64, &accepted);
        Ok(())
    }))
}

fn unix_listen(stage: &Stage) -> Result<Check> {
    let path = stage.path("listen.sock");
    let by_path = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let name = format!("rcr-conformance.{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name)?;
    let by_name = UnixListener::bind_addr(&address)?;
    Ok(Box::new(move |f| {
        use std::os::unix::fs::MetadataExt;
        f.same("mode", &0o666, &(std::fs::metadata(&path)?.mode() & 0o777));
        let mut clients = [
            UnixStream::connect(&path)?,
            UnixStream::connect_addr(&address)?,
        ];
        for (listener, client) in [&by_path, &by_name].into_iter().zip(&mut clients) {
            let (mut server, _) = listener.accept()?;
            client.write_all(b"hello")?;
            let mut word = [0; 5];
            server.read_exact(&mut word)?;
            f.same("what a client sent", b"hello", &word);
        }
        Ok(())
    }))
}

fn udp(_: &Stage) -> Result<Check> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_broadcast(true)?;
    let address = socket.local_addr()?;
    Ok(Box::new(move |f| {
        f.same("address", &address, &socket.local_addr()?);
        f.same("broadcast", &true, &socket.broadcast()?);
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        other.send_to(b"hello", address)?;
        let mut word = [0; 8];
        let (n, from) = socket.recv_from(&mut word)?;
        f.same("a datagram", b"hello".as_slice(), &word[..n]);
        f.same("its sender", &other.local_addr()?, &from);
        Ok(())
    }))
}

fn unix_datagram(stage: &Stage) -> Result<Check> {
    let path = stage.path("dgram.sock");
    let socket = UnixDatagram::bind(&path)?;
    let sender = UnixDatagram::unbound()?;
    sender.send_to(b"queued", &path)?;
    Ok(Box::new(move |f| {
        let mut word = [0; 8];
        let n = socket.recv(&mut word)?;
        f.same("queued", b"queued".as_slice(), &word[..n]);
        sender.send_to(b"queued", &path)?;
        Ok(())
    }))
}

fn pair_stream(_: &Stage) -> Result<Check> {
    let (mut a, mut b) = UnixStream::pair()?;
    a.write_all(b"from a to b")?;
    b.write_all(&vec![8; 50_000])?;
    Ok(Box::new(move |f| {
        let mut text = [0; 11];
        b.read_exact(&mut text)?;
        f.same("queued for b", b"from a to b", &text);
        let mut many = vec![0; 50_000];
        a.read_exact(&mut many)?;
        f.that("queued for a", many == vec![8; 50_000]);
        a.set_nonblocking(true)?;
        let empty = a.read(&mut text).map_err(|e| e.kind());
        f.same("then", &Err(std::io::ErrorKind::WouldBlock), &empty);
        a.set_nonblocking(false)?;
        a.write_all(b"from a to b")?;
        Ok(b.write_all(&vec![8; 50_000])?)
    }))
}

fn pair(kind: SockType) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        kind,
        None,
        SockFlag::SOCK_NONBLOCK,
    )?)
}

fn pair_packets(_: &Stage) -> Result<Check> {
    let pairs = [pair(SockType::Datagram)?, pair(SockType::SeqPacket)?];
    let messages: [&[u8]; 4] = [b"one", b"", b"three", &[6; 5000]];
    let fill = move |a: &OwnedFd| -> Result<()> {
        for m in messages {
            send(a.as_raw_fd(), m, MsgFlags::empty())?;
        }
        Ok(())
    };
    for (a, _) in &pairs {
        fill(a)?;
    }
    Ok(Box::new(move |f| {
        for (a, b) in &pairs {
            for m in messages {
                let mut got = vec![0; 8000];
                let n = recv(b.as_raw_fd(), &mut got, MsgFlags::empty())?;
                f.that(format!("message of {}: {n} bytes", m.len()), got[..n] == *m);
            }
            let empty = recv(b.as_raw_fd(), &mut [0; 8], MsgFlags::empty());
            f.same("then", &Err(nix::errno::Errno::EAGAIN), &empty);
            fill(a)?;
        }
        Ok(())
    }))
}

fn pair_between(_: &Stage) -> Result<Check> {
    let (mut mine, theirs) = UnixStream::pair()?;
    mine.write_all(b"early")?;
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let mut word = [0; 5];
            (&theirs).read_exact(&mut word)?;
            f.same("what came", b"early", &word);
            Ok((&theirs).write_all(b"reply")?)
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        member.check(f)?;
        let mut word = [0; 5];
        mine.read_exact(&mut word)?;
        f.same("the reply", b"reply", &word);
        Ok(mine.write_all(b"early")?)
    }))
}

fn pair_ends(_: &Stage) -> Result<Check> {
    let (mut reader, mut gone) = UnixStream::pair()?;
    gone.write_all(b"last")?;
    drop(gone);
    let (half, mut other) = UnixStream::pair()?;
    half.shutdown(std::net::Shutdown::Write)?;
    let mut left = Some(b"last".to_vec());
    Ok(Box::new(move |f| {
        let mut all = Vec::new();
        reader.read_to_end(&mut all)?;
        f.same("what is left", &left.take().unwrap_or_default(), &all);
        let refused = (&reader).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write to nobody", &Err(Some(libc::EPIPE)), &refused);
        let refused = (&half).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write after shutdown", &Err(Some(libc::EPIPE)), &refused);
        f.same("the other reads", &0, &other.read(&mut [0])?);
        other.write_all(b"back")?;
        let mut word = [0; 4];
        (&half).read_exact(&mut word)?;
        f.same("the way back", b"back", &word);
        Ok(())
    }))
}

fn unix_connected(stage: &Stage) -> Result<Check> {
    let path = stage.path("listen.sock");
    let listener = UnixListener::bind(&path)?;
    let client = UnixStream::connect(&path)?;
    let (server, _) = listener.accept()?;
    (&client).write_all(b"to the server")?;
    Ok(Box::new(move |f| {
        let mut text = [0; 13];
        (&server).read_exact(&mut text)?;
        f.same("queued", b"to the server", &text);
        (&server).write_all(b"to the client")?;
        (&client).read_exact(&mut text)?;
        f.same("the answer", b"to the client", &text);
        let name = client.peer_addr()?.as_pathname().map(|p| p.to_owned());
        f.same("the peer's name", &Some(path.clone()), &name);
        let _another = UnixStream::connect(&path)?;
        listener.accept()?;
        Ok((&client).write_all(b"to the server")?)
    }))
}

fn tcp_close(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let connect = move |l: &TcpListener| -> Result<(TcpStream, TcpStream)> {
        let client = TcpStream::connect(l.local_addr()?)?;
        let (server, _) = l.accept()?;
        Ok((client, server))
    };
    let mut ends = connect(&listener)?;
    let stage = stage.clone();
    Ok(Box::new(move |f| {
        // A tree that was left running keeps its connection.
        let restored = stage.restored();
        for end in [&mut ends.0, &mut ends.1] {
            if !restored {
                end.write_all(b"x")?;
                continue;
            }
            let got = end.read(&mut [0]).map_err(|e| e.raw_os_error());
            let over = matches!(got, Ok(0) | Err(Some(libc::ECONNRESET | libc::ENOTCONN)));
            f.that(format!("a read gives {got:?}"), over);
            let sent = end.write(b"x").map_err(|e| e.raw_os_error());
            let over = matches!(
                sent,
                Err(Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN))
            );
            f.that(format!("a write gives {sent:?}"), over);
        }
        tcp_echo(&listener, f)?;
        ends = connect(&listener)?;
        Ok(())
    }))
}

fn tcp_refuse(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        format!("fd {}", client.as_raw_fd()),
        format!("fd {}", server.as_raw_fd()),
        "TCP".into(),
    ])?;
    client.write_all(b"on its way")?;
    Ok(Box::new(move |f| {
        let mut text = [0; 10];
        server.read_exact(&mut text)?;
        f.same("sent before", b"on its way", &text);
        server.write_all(b"it runs on")?;
        client.read_exact(&mut text)?;
        f.same("sent after", b"it runs on", &text);
        tcp_echo(&listener, f)
    }))
}
