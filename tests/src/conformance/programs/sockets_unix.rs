//! Unix sockets in odd states, and what waits in their queues.

mod rights;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, Result};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    bind, getsockname, recvmsg, send, sendmsg, socket, socketpair,
};

use crate::conformance::sys::{get_option, set_option};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "sockets/rights-file",
        "a file on its way through a stream, before further bytes",
        rights::rights_file,
    ),
    Case::new(
        "sockets/rights-only",
        "a pipe whose ends are only in a datagram's control message",
        rights::rights_only,
    ),
    Case::new(
        "sockets/rights-packets",
        "descriptors in several packets of a SEQPACKET pair",
        rights::rights_packets,
    ),
    Case::new(
        "sockets/rights-nested",
        "a socket on its way, with descriptors in its own queue",
        rights::rights_nested,
    ),
    Case::new(
        "sockets/rights-itself",
        "a socket on its way through its own queue",
        rights::rights_itself,
    ),
    Case::new(
        "sockets/credentials-queued",
        "a message with the credentials of its sender, another process",
        rights::credentials_queued,
    ),
    Case::new(
        "sockets/senders-named",
        "datagrams of several named senders in one queue",
        senders_named,
    ),
    Case::new(
        "sockets/unix-pending",
        "connections that wait to be accepted, in order",
        unix_pending,
    ),
    Case::new(
        "sockets/unix-pending-data",
        "a connection that waits to be accepted, with data",
        unix_pending_data,
    )
    .not_yet(),
    Case::new(
        "sockets/unix-deleted",
        "bound sockets whose files were removed or replaced",
        unix_deleted,
    ),
    Case::new(
        "sockets/unix-relative",
        "a socket bound by a relative name",
        unix_relative,
    ),
    Case::new(
        "sockets/unix-autobind",
        "a name that the kernel chose",
        unix_autobind,
    ),
    Case::new(
        "sockets/unix-many-to-one",
        "several connected datagram sockets that send to one",
        unix_many_to_one,
    ),
    Case::new(
        "sockets/unix-unbound",
        "unbound sockets of all types",
        unix_unbound,
    ),
    Case::new(
        "sockets/unix-half-closed",
        "pairs shut down for reading, writing, and both, with data",
        unix_half_closed,
    ),
    Case::new(
        "sockets/peek-offset",
        "a stream with a peek offset",
        peek_offset,
    ),
    Case::new(
        "sockets/unix-seqpacket",
        "a SEQPACKET connection to a listener",
        unix_seqpacket,
    ),
    Case::new(
        "sockets/unix-outside",
        "a stream to a process outside the tree",
        unix_outside,
    )
    .refused(),
];

fn pair(kind: SockType) -> Result<(OwnedFd, OwnedFd)> {
    let none = SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, kind, None, none)?)
}

fn send_with(through: &impl AsRawFd, data: &[u8], files: &[RawFd]) -> Result<()> {
    let along = [ControlMessage::ScmRights(files)];
    let along = if files.is_empty() { &[][..] } else { &along };
    let iov = [IoSlice::new(data)];
    let n = sendmsg::<()>(through.as_raw_fd(), &iov, along, MsgFlags::empty(), None)?;
    anyhow::ensure!(n == data.len(), "sent {n} bytes");
    Ok(())
}

/// Up to `max` bytes, and the descriptors that came along.
fn receive(from: &impl AsRawFd, max: usize) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut data = vec![0; max];
    let mut space = cmsg_space!([RawFd; 16]);
    let (n, mut files) = {
        let mut iov = [IoSliceMut::new(&mut data)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<()>(from.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
        let mut files = Vec::new();
        for c in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = c {
                files.extend(numbers);
            }
        }
        (got.bytes, files)
    };
    data.truncate(n);
    let own = |n: RawFd| {
        // SAFETY: the kernel has just made these descriptors for us alone.
        unsafe { OwnedFd::from_raw_fd(n) }
    };
    Ok((data, files.drain(..).map(own).collect()))
}

fn senders_named(stage: &Stage) -> Result<Check> {
    let path = stage.path("receiver");
    let receiver = UnixDatagram::bind(&path)?;
    let senders = [stage.path("one"), stage.path("two")];
    let sockets = [
        UnixDatagram::bind(&senders[0])?,
        UnixDatagram::bind(&senders[1])?,
    ];
    let fill = move || -> Result<()> {
        for s in &sockets {
            s.send_to(b"hello", &path)?;
        }
        Ok(sockets[0].send_to(b"hello", &path).map(drop)?)
    };
    fill()?;
    Ok(Box::new(move |f| {
        for i in [0, 1, 0] {
            let (n, from) = receiver.recv_from(&mut [0; 10])?;
            f.same("bytes", &5, &n);
            f.same("from", &Some(senders[i].as_path()), &from.as_pathname());
        }
        fill()
    }))
}

fn unix_pending(stage: &Stage) -> Result<Check> {
    let path = stage.path("listen.sock");
    let listener = UnixListener::bind(&path)?;
    // One that was accepted, and three that were not.
    let (early, accepted) = (UnixStream::connect(&path)?, listener.accept()?.0);
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(UnixStream::connect(&path)?);
    }
    listener.set_nonblocking(true)?;
    Ok(Box::new(move |f| {
        for (i, client) in clients.iter_mut().enumerate() {
            let (mut server, _) = listener.accept()?;
            server.write_all(&[i as u8])?;
            let mut byte = [9];
            client.set_nonblocking(true)?;
            client.read_exact(&mut byte)?;
            f.same("who was accepted", &(i as u8), &byte[0]);
            *client = UnixStream::connect(&path)?;
        }
        let mut word = [0; 5];
        (&early).write_all(b"hello")?;
        (&accepted).read_exact(&mut word)?;
        f.same("the accepted one", b"hello", &word);
        Ok(())
    }))
}

fn unix_pending_data(stage: &Stage) -> Result<Check> {
    let path = stage.path("listen.sock");
    let listener = UnixListener::bind(&path)?;
    let mut client = UnixStream::connect(&path)?;
    client.write_all(b"early")?;
    stage.expect_refusal(&[
        format!("fd {}", client.as_raw_fd()),
        "was sent over it".into(),
    ])?;
    Ok(Box::new(move |f| {
        let mut word = [0; 5];
        listener.accept()?.0.read_exact(&mut word)?;
        f.same("sent early", b"early", &word);
        Ok(client.set_nonblocking(false)?)
    }))
}

fn unix_deleted(stage: &Stage) -> Result<Check> {
    let [gone, replaced, dir] = ["gone.sock", "replaced.sock", "dir"].map(|n| stage.path(n));
    let listener = UnixListener::bind(&gone)?;
    let early = UnixStream::connect(&gone)?;
    let accepted = listener.accept()?.0;
    std::fs::remove_file(&gone)?;
    let old = UnixDatagram::bind(&replaced)?;
    std::fs::remove_file(&replaced)?;
    let new = UnixDatagram::bind(&replaced)?;
    std::fs::create_dir(&dir)?;
    let nowhere = UnixDatagram::bind(dir.join("sock"))?;
    std::fs::remove_dir_all(&dir)?;
    let names = move |a: &UnixListener, o: &UnixDatagram, n: &UnixDatagram| -> Result<_> {
        let one = |a: SocketAddr| a.as_pathname().map(|p| p.to_owned());
        Ok((
            one(a.local_addr()?),
            one(o.local_addr()?),
            one(n.local_addr()?),
        ))
    };
    let was = names(&listener, &old, &nowhere)?;
    Ok(Box::new(move |f| {
        f.same("names", &was, &names(&listener, &old, &nowhere)?);
        f.that("a removed file is back", !gone.exists() && !dir.exists());
        let sender = UnixDatagram::unbound()?;
        sender.send_to(b"hello", &replaced)?;
        let mut word = [0; 5];
        new.recv(&mut word)?;
        f.same("the new one", b"hello", &word);
        old.set_nonblocking(true)?;
        let nothing = old.recv(&mut word).map_err(|e| e.kind());
        f.same(
            "the old one",
            &Err(std::io::ErrorKind::WouldBlock),
            &nothing,
        );
        let peer = early.peer_addr()?.as_pathname().map(|p| p.to_owned());
        f.same("the name of a peer", &Some(gone.clone()), &peer);
        (&early).write_all(b"hello")?;
        (&accepted).read_exact(&mut word)?;
        f.same("the connection", b"hello", &word);
        Ok(())
    }))
}

fn unix_relative(stage: &Stage) -> Result<Check> {
    std::env::set_current_dir(stage.files())?;
    let listener = UnixListener::bind("relative.sock")?;
    std::env::set_current_dir("/")?;
    let path = stage.path("relative.sock");
    Ok(Box::new(move |f| {
        let name = listener.local_addr()?.as_pathname().map(|p| p.to_owned());
        f.same("its name", &Some("relative.sock".into()), &name);
        let mut client = UnixStream::connect(&path)?;
        client.write_all(b"hello")?;
        let mut word = [0; 5];
        listener.accept()?.0.read_exact(&mut word)?;
        f.same("a client's word", b"hello", &word);
        Ok(())
    }))
}

fn unix_autobind(_: &Stage) -> Result<Check> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::empty(),
        None,
    )?;
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
    let name: UnixAddr = getsockname(fd.as_raw_fd())?;
    let text = name.as_abstract().context("no name")?.to_vec();
    Ok(Box::new(move |f| {
        let now: UnixAddr = getsockname(fd.as_raw_fd())?;
        f.same("its name", &Some(text.as_slice()), &now.as_abstract());
        let sender = UnixDatagram::unbound()?;
        sender.send_to_addr(b"hello", &SocketAddr::from_abstract_name(&text)?)?;
        let (data, _) = receive(&fd, 10)?;
        f.same("a message", b"hello".as_slice(), &data);
        Ok(())
    }))
}

fn unix_many_to_one(stage: &Stage) -> Result<Check> {
    let path = stage.path("one.sock");
    let one = UnixDatagram::bind(&path)?;
    let mut many = Vec::new();
    for _ in 0..4 {
        let s = UnixDatagram::unbound()?;
        s.connect(&path)?;
        many.push(s);
    }
    many[2].send(b"queued")?;
    Ok(Box::new(move |f| {
        let mut word = [0; 10];
        let n = one.recv(&mut word)?;
        f.same("queued", b"queued".as_slice(), &word[..n]);
        for s in &many {
            s.send(b"hello")?;
            let n = one.recv(&mut word)?;
            f.same("sent", b"hello".as_slice(), &word[..n]);
        }
        Ok(many[2].send(b"queued").map(drop)?)
    }))
}

fn unix_unbound(stage: &Stage) -> Result<Check> {
    let kinds = [SockType::Stream, SockType::Datagram, SockType::SeqPacket];
    let make = |k| socket(AddressFamily::Unix, k, SockFlag::empty(), None);
    let sockets = [make(kinds[0])?, make(kinds[1])?, make(kinds[2])?];
    set_option(&sockets[0], libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    let path = stage.path("late.sock");
    let mut round = 0;
    Ok(Box::new(move |f| {
        for (s, kind) in sockets.iter().zip(kinds) {
            let is = get_option(s, libc::SOL_SOCKET, libc::SO_TYPE, 4)?;
            f.same("type", &(kind as i32).to_ne_bytes().to_vec(), &is);
        }
        let pass = get_option(&sockets[0], libc::SOL_SOCKET, libc::SO_PASSCRED, 4)?;
        f.same("passes credentials", &1i32.to_ne_bytes().to_vec(), &pass);
        round += 1;
        if round == 1 {
            let listener = UnixListener::bind(&path)?;
            let to = UnixAddr::new(&path)?;
            nix::sys::socket::connect(sockets[0].as_raw_fd(), &to)?;
            listener.accept()?;
        }
        Ok(())
    }))
}

fn unix_half_closed(_: &Stage) -> Result<Check> {
    use std::net::Shutdown;
    let pairs = [
        UnixStream::pair()?,
        UnixStream::pair()?,
        UnixStream::pair()?,
    ];
    for ((a, b), how) in pairs
        .iter()
        .zip([Shutdown::Read, Shutdown::Write, Shutdown::Both])
    {
        (&*a).write_all(b"there")?;
        (&*b).write_all(b"back.")?;
        a.shutdown(how)?;
    }
    let mut first = true;
    Ok(Box::new(move |f| {
        let [read, write, both] = &pairs;
        let text = |mut s: &UnixStream| -> Result<Vec<u8>> {
            let mut all = Vec::new();
            s.read_to_end(&mut all)?;
            Ok(all)
        };
        if std::mem::take(&mut first) {
            f.same("shut for reading", b"back.".as_slice(), &text(&read.0)?);
            f.same("shut for writing", b"there".as_slice(), &text(&write.1)?);
            f.same("shut for both", b"back.".as_slice(), &text(&both.0)?);
            f.same("and its peer", b"there".as_slice(), &text(&both.1)?);
        }
        let refused = (&write.0).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write", &Err(Some(libc::EPIPE)), &refused);
        let refused = (&read.1).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write to the deaf", &Err(Some(libc::EPIPE)), &refused);
        (&read.0).write_all(b"hello")?;
        Ok(())
    }))
}

fn peek_offset(_: &Stage) -> Result<Check> {
    let (mut a, b) = UnixStream::pair()?;
    a.write_all(b"0123456789")?;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF);
    set_option(&b, level, name, 3)?;
    Ok(Box::new(move |f| {
        f.same(
            "the offset",
            &3i32.to_ne_bytes().to_vec(),
            &get_option(&b, level, name, 4)?,
        );
        let mut word = [0; 4];
        nix::sys::socket::recv(b.as_raw_fd(), &mut word, MsgFlags::MSG_PEEK)?;
        f.same("a peek", b"3456", &word);
        set_option(&b, level, name, 3)
    }))
}

fn unix_seqpacket(stage: &Stage) -> Result<Check> {
    use nix::sys::socket::{Backlog, accept, connect, listen};
    let make = || {
        socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::empty(),
            None,
        )
    };
    let to = UnixAddr::new(&stage.path("packets.sock"))?;
    let (listener, client) = (make()?, make()?);
    bind(listener.as_raw_fd(), &to)?;
    listen(&listener, Backlog::new(5)?)?;
    connect(client.as_raw_fd(), &to)?;
    // SAFETY: just made for us alone.
    let server = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd())?) };
    let fill = move |s: &OwnedFd| -> Result<()> {
        send(s.as_raw_fd(), b"one", MsgFlags::empty())?;
        send(s.as_raw_fd(), b"two..", MsgFlags::empty())?;
        Ok(())
    };
    fill(&client)?;
    Ok(Box::new(move |f| {
        f.same("first", b"one".as_slice(), &receive(&server, 100)?.0);
        f.same("second", b"two..".as_slice(), &receive(&server, 100)?.0);
        let name: UnixAddr = nix::sys::socket::getpeername(client.as_raw_fd())?;
        f.same("the peer's name", &to.path(), &name.path());
        fill(&client)
    }))
}

fn unix_outside(stage: &Stage) -> Result<Check> {
    let path = stage.path("outside.sock");
    let listener = UnixListener::bind(&path)?;
    let to = path.clone();
    stage.outsider(move || {
        let mut stream = UnixStream::connect(&to)?;
        let mut word = [0; 5];
        loop {
            stream.read_exact(&mut word)?;
            stream.write_all(&word)?;
        }
    })?;
    let mut server = listener.accept()?.0;
    stage.expect_refusal(&[
        format!("fd {}", server.as_raw_fd()),
        "outside the service".into(),
    ])?;
    Ok(Box::new(move |f| {
        let mut word = [0; 5];
        server.write_all(b"hello")?;
        server.read_exact(&mut word)?;
        f.same("the echo", b"hello", &word);
        Ok(())
    }))
}
