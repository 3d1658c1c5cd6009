//! Descriptors and credentials on their way.

use super::{pair, receive, send_with};
use crate::conformance::{Check, Findings, Member, Stage};
use anyhow::{Context, Result};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockType, recvmsg, setsockopt, sockopt};
use std::fs::File;
use std::io::{IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

pub(super) fn rights_file(stage: &Stage) -> Result<Check> {
    let (a, b) = UnixStream::pair()?;
    let path = stage.path("file");
    std::fs::write(&path, "0123456789")?;
    let fill = move || -> Result<()> {
        let mut file = File::open(&path)?;
        file.seek(SeekFrom::Start(4))?;
        send_with(&a, b"with", &[file.as_raw_fd()])?;
        send_with(&a, b"after", &[])
    };
    fill()?;
    Ok(Box::new(move |f| {
        let (data, files) = receive(&b, 100)?;
        f.same("with the file", b"with".as_slice(), &data);
        f.same("one file", &1, &files.len());
        let mut text = String::new();
        let file = files.into_iter().next().context("no file")?;
        File::from(file).read_to_string(&mut text)?;
        f.same("its rest", "456789", &text);
        let (data, _) = receive(&b, 100)?;
        f.same("after", b"after".as_slice(), &data);
        fill()
    }))
}

pub(super) fn rights_only(_: &Stage) -> Result<Check> {
    let (a, b) = pair(SockType::Datagram)?;
    let fill = move || -> Result<()> {
        let (r, w) = nix::unistd::pipe()?;
        File::from(w.try_clone()?).write_all(b"in the pipe")?;
        send_with(&a, b"ends", &[r.as_raw_fd(), w.as_raw_fd()])
    };
    fill()?;
    Ok(Box::new(move |f| {
        let (data, files) = receive(&b, 100)?;
        f.same("the message", b"ends".as_slice(), &data);
        let mut files = files.into_iter().map(File::from);
        let (Some(mut r), Some(w)) = (files.next(), files.next()) else {
            anyhow::bail!("no pipe");
        };
        drop(w);
        let mut text = String::new();
        r.read_to_string(&mut text)?;
        f.same("in the pipe", "in the pipe", &text);
        fill()
    }))
}

pub(super) fn rights_packets(stage: &Stage) -> Result<Check> {
    let (a, b) = pair(SockType::SeqPacket)?;
    let path = stage.path("shared");
    let shared = File::create(&path)?;
    let mine = shared.try_clone()?;
    let fill = move || -> Result<()> {
        let number = shared.as_raw_fd();
        send_with(&a, b"one", &[number])?;
        send_with(&a, b"none", &[])?;
        send_with(&a, b"two", &[number, number])
    };
    fill()?;
    Ok(Box::new(move |f| {
        let mut all = Vec::new();
        for (data, count) in [(b"one".as_slice(), 1), (b"none", 0), (b"two", 2)] {
            let (got, files) = receive(&b, 100)?;
            f.same("a packet", data, &got);
            f.same("its files", &count, &files.len());
            all.extend(files);
        }
        // All are one open file: its position moves for all of them.
        (&mine).seek(SeekFrom::Start(77))?;
        for file in all {
            let at = File::from(file).stream_position()?;
            f.same("position", &77, &at);
        }
        fill()
    }))
}

pub(super) fn rights_nested(_: &Stage) -> Result<Check> {
    let (outer, reader) = UnixStream::pair()?;
    let fill = move || -> Result<()> {
        let (inner, inner_reader) = UnixStream::pair()?;
        let (r, w) = nix::unistd::pipe()?;
        File::from(w).write_all(b"deep inside")?;
        send_with(&inner, b"i", &[r.as_raw_fd()])?;
        send_with(&outer, b"o", &[inner_reader.as_raw_fd()])
    };
    fill()?;
    Ok(Box::new(move |f| {
        let (_, files) = receive(&reader, 10)?;
        let inner = files.into_iter().next().context("no socket")?;
        let (data, files) = receive(&inner, 10)?;
        f.same("through the inner one", b"i".as_slice(), &data);
        let mut text = String::new();
        let r = files.into_iter().next().context("no pipe")?;
        File::from(r).read_to_string(&mut text)?;
        f.same("in the pipe", "deep inside", &text);
        fill()
    }))
}

pub(super) fn rights_itself(_: &Stage) -> Result<Check> {
    let (a, b) = UnixStream::pair()?;
    send_with(&a, b"self", &[b.as_raw_fd(), a.as_raw_fd()])?;
    Ok(Box::new(move |f| {
        let (data, files) = receive(&b, 10)?;
        f.same("the message", b"self".as_slice(), &data);
        f.same("files", &2, &files.len());
        let [mut again_b, again_a]: [File; 2] = files
            .into_iter()
            .map(File::from)
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| anyhow::anyhow!("no sockets"))?;
        (&a).write_all(b"ping")?;
        let mut word = [0; 4];
        again_b.read_exact(&mut word)?;
        f.same("through the other descriptor", b"ping", &word);
        drop(again_a);
        send_with(&a, b"self", &[b.as_raw_fd(), a.as_raw_fd()])
    }))
}

pub(super) fn credentials_queued(_: &Stage) -> Result<Check> {
    let (a, b) = UnixDatagram::pair()?;
    setsockopt(&b, sockopt::PassCred, &true)?;
    let theirs = a.try_clone()?;
    let member = Member::start("the sender", move || {
        theirs.send(b"from the member")?;
        Ok(Box::new(move |_: &mut Findings| {
            theirs.send(b"from the member")?;
            Ok(())
        }) as Check)
    })?;
    a.send(b"from the first")?;
    let me = std::process::id() as i32;
    Ok(Box::new(move |f| {
        for (text, pid) in [
            (b"from the member".as_slice(), member.pid),
            (b"from the first", me),
        ] {
            let mut data = [0; 100];
            let mut space = cmsg_space!(nix::sys::socket::UnixCredentials);
            let mut iov = [IoSliceMut::new(&mut data)];
            let flags = MsgFlags::empty();
            let got = recvmsg::<()>(b.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
            let mut sender = None;
            for c in got.cmsgs()? {
                if let ControlMessageOwned::ScmCredentials(c) = c {
                    sender = Some(c.pid());
                }
            }
            let n = got.bytes;
            f.same("its sender", &Some(pid), &sender);
            f.same("the message", text, &data[..n]);
        }
        member.check(f)?;
        Ok(a.send(b"from the first").map(drop)?)
    }))
}
