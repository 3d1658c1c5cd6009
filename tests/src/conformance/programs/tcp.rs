//! Established TCP connections that go on.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use crate::conformance::sys::{get_option, set_option, set_option_bytes};
use crate::conformance::{Case, Check, Findings, Member, Stage, Unavailable};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("tcp/pair", "both ends in the tree, data unread", pair).carrying_tcp(),
    Case::new("tcp/pair-v6", "the same over IPv6", pair_v6).carrying_tcp(),
    Case::new(
        "tcp/pair-mapped",
        "an IPv4 client of a dual-stack IPv6 server",
        pair_mapped,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/full-queues",
        "both directions full: data acknowledged, under way and unsent",
        full_queues,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/options",
        "options, negotiated scale, SACK and timestamps, segment size",
        options,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/corked",
        "a corked connection with a part of a segment",
        corked,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/keepalive",
        "keepalive times and user timeout of a connection",
        keepalive,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/between",
        "a connection between two processes, one inherited by both",
        between,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/blocked-read",
        "a thread that waits for data of a connection",
        blocked_read,
    )
    .carrying_tcp(),
    Case::new("tcp/many", "three hundred connections", many).carrying_tcp(),
    Case::new(
        "tcp/listener-port",
        "connections that share the port of a listener without SO_REUSEADDR",
        listener_port,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/outside-client",
        "a server whose client stays alive outside the tree",
        outside_client,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/outside-server",
        "a client whose server stays alive outside the tree, over IPv6",
        outside_server,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/outside-stream",
        "a peer outside that never stops sending: no byte lost or doubled",
        outside_stream,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/in-flight",
        "a connection that waits to be accepted",
        in_flight,
    )
    .carrying_tcp()
    .refused(),
    Case::new("tcp/urgent", "an urgent byte that was not read", urgent)
        .carrying_tcp()
        .refused(),
    Case::new("tcp/ktls", "a connection with kernel TLS", ktls)
        .carrying_tcp()
        .refused(),
];

/// Client, server.
pub(super) fn connect(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect_timeout(&listener.local_addr()?, Duration::from_secs(10))?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_secs(20)))?;
    }
    Ok((client, server))
}

/// Words go both ways.
pub(super) fn talk(a: &mut TcpStream, b: &mut TcpStream, f: &mut Findings) -> Result<()> {
    for (from, to) in [(&*a, &*b), (b, a)] {
        let mut word = [0; 5];
        let (mut from, mut to) = (from, to);
        from.write_all(b"hello")?;
        to.read_exact(&mut word)?;
        f.same("what arrived", b"hello", &word);
    }
    Ok(())
}

fn with_unread(listener: TcpListener, to: Option<std::net::SocketAddr>) -> Result<Check> {
    let (mut client, mut server) = match to {
        None => connect(&listener)?,
        Some(to) => {
            let client = TcpStream::connect(to)?;
            (client, listener.accept()?.0)
        }
    };
    let addresses = move |c: &TcpStream, s: &TcpStream| -> Result<_> {
        Ok((
            (c.local_addr()?, c.peer_addr()?),
            (s.local_addr()?, s.peer_addr()?),
        ))
    };
    let was = addresses(&client, &server)?;
    client.write_all(b"to the server")?;
    server.write_all(&vec![7; 40_000])?;
    Ok(Box::new(move |f| {
        f.same("addresses", &was, &addresses(&client, &server)?);
        let mut text = [0; 13];
        server.read_exact(&mut text)?;
        f.same("queued for the server", b"to the server", &text);
        let mut many = vec![0; 40_000];
        client.read_exact(&mut many)?;
        f.that("queued for the client", many == vec![7; 40_000]);
        talk(&mut client, &mut server, f)?;
        client.write_all(b"to the server")?;
        Ok(server.write_all(&vec![7; 40_000])?)
    }))
}

fn pair(_: &Stage) -> Result<Check> {
    with_unread(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?, None)
}

fn pair_v6(_: &Stage) -> Result<Check> {
    with_unread(TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?, None)
}

fn pair_mapped(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    with_unread(listener, Some((Ipv4Addr::LOCALHOST, port).into()))
}

/// Writes a known sequence until nothing more fits; how much that was.
pub(super) fn fill(stream: &TcpStream) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let mut sent = 0;
    // The kernel moves what it can for a moment after the first refusal.
    for _ in 0..20 {
        while let Ok(n) = (&*stream).write(&sequence(sent, 10_000)) {
            sent += n;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    stream.set_nonblocking(false)?;
    Ok(sent)
}

pub(super) fn sequence(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|i| (i % 251) as u8).collect()
}

/// Reads all of a sequence.
pub(super) fn drain(mut stream: &TcpStream, len: usize, f: &mut Findings) -> Result<()> {
    let mut all = vec![0; len];
    stream.read_exact(&mut all).context("the queue's rest")?;
    f.that("the bytes are others", all == sequence(0, len));
    Ok(())
}

fn full_queues(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    let mut sent = (fill(&client)?, fill(&server)?);
    Ok(Box::new(move |f| {
        drain(&server, sent.0, f)?;
        drain(&client, sent.1, f)?;
        talk(&mut client, &mut server, f)?;
        sent = (fill(&client)?, fill(&server)?);
        Ok(())
    }))
}

/// Of `struct tcp_info`: what was negotiated.
fn negotiated(stream: &TcpStream) -> Result<Vec<u8>> {
    let info = get_option(stream, libc::IPPROTO_TCP, libc::TCP_INFO, 8)?;
    Ok(vec![info[5] & 7, info[6]])
}

fn options(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    set_option(&listener, libc::IPPROTO_TCP, libc::TCP_MAXSEG, 1000)?;
    let (mut client, mut server) = connect(&listener)?;
    let settings = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        (libc::SOL_SOCKET, libc::SO_MARK, 77),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 2),
        (libc::IPPROTO_IP, libc::IP_TOS, 16),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 5000),
        (libc::IPPROTO_TCP, libc::TCP_LINGER2, 7),
    ];
    for (level, name, value) in settings {
        set_option(&client, level, name, value)?;
    }
    setsockopt(&server, sockopt::RcvBuf, &30_000)?;
    let mut all: Vec<(i32, i32)> = settings.iter().map(|&(l, n, _)| (l, n)).collect();
    all.extend([
        (libc::SOL_SOCKET, libc::SO_RCVBUF),
        (libc::SOL_SOCKET, 72),
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    ]);
    let facts = move |s: &TcpStream| -> Result<Vec<Vec<u8>>> {
        let values = all.iter().map(|&(l, n)| get_option(s, l, n, 64));
        let mut values: Vec<Vec<u8>> = values.collect::<Result<_>>()?;
        values.push(negotiated(s)?);
        Ok(values)
    };
    talk(&mut client, &mut server, &mut Findings::default())?;
    let was = (facts(&client)?, facts(&server)?);
    Ok(Box::new(move |f| {
        f.same("the client's options", &was.0, &facts(&client)?);
        f.same("the server's options", &was.1, &facts(&server)?);
        talk(&mut client, &mut server, f)
    }))
}

fn corked(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    let (cork, tcp) = (libc::TCP_CORK, libc::IPPROTO_TCP);
    set_option(&client, tcp, cork, 1)?;
    client.write_all(b"corked")?;
    Ok(Box::new(move |f| {
        let is = get_option(&client, tcp, cork, 4)?;
        f.same("cork", &1i32.to_ne_bytes().to_vec(), &is);
        set_option(&client, tcp, cork, 0)?;
        let mut word = [0; 6];
        server.read_exact(&mut word)?;
        f.same("behind the cork", b"corked", &word);
        talk(&mut client, &mut server, f)?;
        set_option(&client, tcp, cork, 1)?;
        Ok(client.write_all(b"corked")?)
    }))
}

fn keepalive(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    let settings = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 11),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 12),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 13),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 45_000),
        (libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
    ];
    for (level, name, value) in settings {
        set_option(&client, level, name, value)?;
    }
    Ok(Box::new(move |f| {
        for (level, name, value) in settings {
            let is = get_option(&client, level, name, 4)?;
            f.same(
                &format!("option {name}"),
                &value.to_ne_bytes().to_vec(),
                &is,
            );
        }
        talk(&mut client, &mut server, f)
    }))
}

fn between(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut mine, theirs) = connect(&listener)?;
    mine.write_all(b"early")?;
    let shared = mine.try_clone()?;
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let mut word = [0; 5];
            (&theirs).read_exact(&mut word)?;
            f.same("what came", b"early", &word);
            // The end that both have.
            (&shared).write_all(b"again")?;
            (&theirs).read_exact(&mut word)?;
            f.same("what came then", b"again", &word);
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

fn blocked_read(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    server.set_read_timeout(None)?;
    let reader = std::thread::spawn(move || {
        let mut word = [0; 5];
        while server.read_exact(&mut word).is_ok() {
            if server.write_all(&word).is_err() {
                break;
            }
        }
    });
    Ok(Box::new(move |f| {
        f.that("the reader has ended", !reader.is_finished());
        client.write_all(b"hello")?;
        let mut word = [0; 5];
        client.read_exact(&mut word)?;
        f.same("what came back", b"hello", &word);
        Ok(())
    }))
}

fn many(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut all = Vec::new();
    for i in 0..300u32 {
        let (mut client, server) = connect(&listener)?;
        client.write_all(&i.to_ne_bytes())?;
        all.push((client, server));
    }
    Ok(Box::new(move |f| {
        for (i, (client, server)) in all.iter_mut().enumerate() {
            let mut word = [0; 4];
            server.read_exact(&mut word)?;
            f.same("its number", &(i as u32), &u32::from_ne_bytes(word));
            talk(client, server, f)?;
            client.write_all(&(i as u32).to_ne_bytes())?;
        }
        Ok(())
    }))
}

fn listener_port(_: &Stage) -> Result<Check> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket,
    };
    let s = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )?;
    bind(s.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    listen(&s, Backlog::new(7)?)?;
    let listener = TcpListener::from(s);
    let mut ends = vec![connect(&listener)?, connect(&listener)?];
    let reuse = |l: &TcpListener| get_option(l, libc::SOL_SOCKET, libc::SO_REUSEADDR, 4);
    let was = reuse(&listener)?;
    Ok(Box::new(move |f| {
        f.same("address reuse", &was, &reuse(&listener)?);
        ends.push(connect(&listener)?);
        for (client, server) in &mut ends {
            talk(client, server, f)?;
        }
        Ok(())
    }))
}

/// Sends back whatever comes.
fn echo(mut stream: TcpStream) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(stream.shutdown(Shutdown::Write)?),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

fn echoed(mut stream: &TcpStream, f: &mut Findings) -> Result<()> {
    let mut word = [0; 5];
    stream.write_all(b"hello")?;
    stream.read_exact(&mut word)?;
    f.same("the echo", b"hello", &word);
    Ok(())
}

fn outside_client(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    stage.outsider(move || echo(TcpStream::connect(address)?))?;
    let (server, _) = listener.accept()?;
    server.set_read_timeout(Some(Duration::from_secs(20)))?;
    echoed(&server, &mut Findings::default())?;
    Ok(Box::new(move |f| echoed(&server, f)))
}

/// The port that an outsider listens on.
pub(super) fn port_in(file: &Path) -> Result<u16> {
    for _ in 0..5000 {
        if let Ok(text) = std::fs::read_to_string(file)
            && let Some(port) = text.strip_suffix('\n')
        {
            return Ok(port.parse()?);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    anyhow::bail!("nobody listens")
}

fn outside_server(stage: &Stage) -> Result<Check> {
    let file = stage.path("port");
    let at = file.clone();
    stage.outsider(move || {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?;
        std::fs::write(at, format!("{}\n", listener.local_addr()?.port()))?;
        echo(listener.accept()?.0)
    })?;
    let client = TcpStream::connect((Ipv6Addr::LOCALHOST, port_in(&file)?))?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    echoed(&client, &mut Findings::default())?;
    Ok(Box::new(move |f| echoed(&client, f)))
}

fn outside_stream(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    stage.outsider(move || {
        let mut stream = TcpStream::connect(address)?;
        let mut at = 0;
        loop {
            stream.write_all(&sequence(at, 1000))?;
            at += 1000;
            std::thread::sleep(Duration::from_micros(200));
        }
    })?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut at = 0;
    Ok(Box::new(move |f| {
        let mut buffer = vec![0; 1000];
        // Beyond all that can have been queued.
        for _ in 0..8000 {
            server.read_exact(&mut buffer)?;
            if buffer != sequence(at, 1000) {
                f.note(format!("other bytes at {at}"));
                return Ok(());
            }
            at += 1000;
        }
        Ok(())
    }))
}

fn in_flight(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    client.write_all(b"early")?;
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        format!("fd {}", listener.as_raw_fd()),
        "1 connections wait to be accepted".into(),
    ])?;
    Ok(Box::new(move |f| {
        let (mut server, _) = listener.accept()?;
        let mut word = [0; 5];
        server.read_exact(&mut word)?;
        f.same("sent before", b"early", &word);
        talk(&mut client, &mut server, f)
    }))
}

fn urgent(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    send(client.as_raw_fd(), b"abc!", MsgFlags::MSG_OOB)?;
    stage.expect_refusal(&[format!("fd {}", server.as_raw_fd()), "urgent".into()])?;
    Ok(Box::new(move |f| {
        let mut byte = [0];
        let flags = MsgFlags::MSG_OOB;
        nix::sys::socket::recv(server.as_raw_fd(), &mut byte, flags)?;
        f.same("the urgent byte", b"!", &byte);
        let mut rest = [0; 3];
        server.read_exact(&mut rest)?;
        f.same("the rest", b"abc", &rest);
        talk(&mut client, &mut server, f)
    }))
}

fn ktls(stage: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut client, mut server) = connect(&listener)?;
    set_option_bytes(&client, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
        .map_err(|e| Unavailable::because(format!("no kernel TLS: {e}")))?;
    stage.expect_refusal(&[format!("fd {}", client.as_raw_fd()), "tls".into()])?;
    Ok(Box::new(move |f| talk(&mut client, &mut server, f)))
}
