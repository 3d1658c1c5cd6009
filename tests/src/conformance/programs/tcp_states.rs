//! TCP connections on their way to the end, or to the beginning.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect as raw_connect, socket,
};

use super::tcp::{connect, drain, fill, port_in};
use crate::conformance::sys::get_option;
use crate::conformance::{Case, Check, Findings, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "tcp/half-closed",
        "one side was shut down and read to the end: FIN-WAIT-2 and CLOSE-WAIT",
        half_closed,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/half-closed-v6",
        "the same over IPv6, with data before the end",
        half_closed_v6,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/fin-wait-1",
        "shut down behind data that does not fit: FIN-WAIT-1",
        fin_wait_1,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/last-ack",
        "both sides shut down, the second behind unsent data: LAST-ACK",
        last_ack,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/closing",
        "both sides shut down, the first behind unsent data: CLOSING",
        closing,
    )
    .carrying_tcp(),
    Case::new(
        "tcp/closed",
        "both sides shut down and done with: CLOSE",
        closed,
    )
    .carrying_tcp(),
    Case::new("tcp/reset", "a connection that its peer reset", reset).carrying_tcp(),
    Case::new(
        "tcp/syn-sent",
        "a connection that nobody has answered yet: SYN-SENT",
        syn_sent,
    )
    .carrying_tcp(),
];

/// `tcpi_state`.
fn state(stream: &TcpStream) -> Result<u8> {
    Ok(get_option(stream, libc::IPPROTO_TCP, libc::TCP_INFO, 1)?[0])
}

fn reached(stream: &TcpStream, wanted: u8) -> Result<()> {
    for _ in 0..2000 {
        if state(stream)? == wanted {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("state {} instead of {wanted}", state(stream)?)
}

const FIN_WAIT_1: u8 = 4;
const FIN_WAIT_2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

fn half(listener: TcpListener, before: &'static [u8]) -> Result<Check> {
    let make = move || -> Result<_> {
        let (mut a, b) = connect(&listener)?;
        a.write_all(before)?;
        a.shutdown(Shutdown::Write)?;
        reached(&a, FIN_WAIT_2)?;
        reached(&b, CLOSE_WAIT)?;
        Ok((a, b))
    };
    let (mut a, mut b) = make()?;
    Ok(Box::new(move |f| {
        f.same("state of one", &FIN_WAIT_2, &state(&a)?);
        f.same("state of the other", &CLOSE_WAIT, &state(&b)?);
        let mut rest = Vec::new();
        b.read_to_end(&mut rest)?;
        f.same("before the end", &before.to_vec(), &rest);
        let refused = a.write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write after the end", &Err(Some(libc::EPIPE)), &refused);
        b.write_all(b"back")?;
        let mut word = [0; 4];
        a.read_exact(&mut word)?;
        f.same("the way back", b"back", &word);
        b.shutdown(Shutdown::Write)?;
        f.same("then", &0, &a.read(&mut word)?);
        reached(&b, CLOSE)?;
        (a, b) = make()?;
        Ok(())
    }))
}

fn half_closed(_: &Stage) -> Result<Check> {
    half(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?, b"")
}

fn half_closed_v6(_: &Stage) -> Result<Check> {
    half(TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?, b"some words")
}

fn fin_wait_1(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let make = move || -> Result<_> {
        let (a, b) = connect(&listener)?;
        let sent = fill(&a)?;
        a.shutdown(Shutdown::Write)?;
        reached(&a, FIN_WAIT_1)?;
        Ok((a, b, sent))
    };
    let (mut a, mut b, mut sent) = make()?;
    Ok(Box::new(move |f| {
        f.same("state", &FIN_WAIT_1, &state(&a)?);
        drain(&b, sent, f)?;
        f.same("then", &0, &b.read(&mut [0])?);
        b.write_all(b"back")?;
        let mut word = [0; 4];
        a.read_exact(&mut word)?;
        f.same("the way back", b"back", &word);
        (a, b, sent) = make()?;
        Ok(())
    }))
}

fn last_ack(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let make = move || -> Result<_> {
        let (a, b) = connect(&listener)?;
        let sent = fill(&b)?;
        a.shutdown(Shutdown::Write)?;
        reached(&b, CLOSE_WAIT)?;
        b.shutdown(Shutdown::Write)?;
        reached(&b, LAST_ACK)?;
        Ok((a, b, sent))
    };
    let (mut a, mut b, mut sent) = make()?;
    Ok(Box::new(move |f| {
        f.same("state", &LAST_ACK, &state(&b)?);
        f.same("the end that was read", &0, &b.read(&mut [0])?);
        drain(&a, sent, f)?;
        f.same("then", &0, &a.read(&mut [0])?);
        reached(&b, CLOSE)?;
        (a, b, sent) = make()?;
        Ok(())
    }))
}

fn closing(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let make = move || -> Result<_> {
        let (a, b) = connect(&listener)?;
        let sent = fill(&a)?;
        a.shutdown(Shutdown::Write)?;
        b.shutdown(Shutdown::Write)?;
        reached(&a, CLOSING)?;
        Ok((a, b, sent))
    };
    let (mut a, mut b, mut sent) = make()?;
    Ok(Box::new(move |f| {
        f.same("state", &CLOSING, &state(&a)?);
        drain(&b, sent, f)?;
        f.same("then", &0, &b.read(&mut [0])?);
        f.same("and here", &0, &a.read(&mut [0])?);
        reached(&a, CLOSE)?;
        (a, b, sent) = make()?;
        Ok(())
    }))
}

fn closed(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut a, b) = connect(&listener)?;
    a.shutdown(Shutdown::Write)?;
    reached(&b, CLOSE_WAIT)?;
    b.shutdown(Shutdown::Write)?;
    reached(&a, CLOSE)?;
    Ok(Box::new(move |f| {
        f.same("state", &CLOSE, &state(&a)?);
        f.same("a read", &0, &a.read(&mut [0])?);
        let refused = a.write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write", &Err(Some(libc::EPIPE)), &refused);
        Ok(())
    }))
}

fn reset(_: &Stage) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut a, b) = connect(&listener)?;
    nix::sys::socket::setsockopt(
        &b,
        nix::sys::socket::sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    drop(b);
    reached(&a, CLOSE)?;
    // The error is told once.
    let told = a.read(&mut [0]).map_err(|e| e.raw_os_error());
    if told != Err(Some(libc::ECONNRESET)) {
        bail!("a read gives {told:?}");
    }
    Ok(Box::new(move |f| {
        f.same("a read", &0, &a.read(&mut [0])?);
        let refused = a.write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write", &Err(Some(libc::EPIPE)), &refused);
        Ok(())
    }))
}

fn syn_sent(stage: &Stage) -> Result<Check> {
    let file = stage.path("port");
    let (at, go) = (file.clone(), stage.go_file(1));
    stage.outsider(move || {
        use nix::sys::socket::{Backlog, bind, listen};
        let fd = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )?;
        bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
        // Room for one, which takes it: nobody else gets an answer.
        listen(&fd, Backlog::new(0)?)?;
        let listener = TcpListener::from(fd);
        let _first = TcpStream::connect(listener.local_addr()?)?;
        std::fs::write(at, format!("{}\n", listener.local_addr()?.port()))?;
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(3));
        }
        let mut all = Vec::new();
        loop {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(b"hello")?;
            all.push(stream);
        }
    })?;
    let port = port_in(&file)?;
    let fd: OwnedFd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    match raw_connect(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)) {
        Err(Errno::EINPROGRESS) => {}
        other => bail!("connect gives {other:?}"),
    }
    let mut stream = TcpStream::from(fd);
    let mut first = true;
    let was = stream.local_addr()?;
    Ok(Box::new(move |f: &mut Findings| {
        if !std::mem::take(&mut first) {
            return Ok(());
        }
        f.same("its own address", &was, &stream.local_addr()?);
        reached(&stream, 1)?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        f.same("what the server says", b"hello", &word);
        Ok(())
    }))
}
