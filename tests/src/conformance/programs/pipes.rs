//! Pipes, event counters, interest lists, signal descriptors.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, dup};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("files/pipes", "pipes with data, sizes and flags", pipes),
    Case::new("files/pipe-between", "a pipe between processes", between),
    Case::new("files/pipe-end", "a pipe whose other end is closed", ends),
    Case::new("files/fifo", "a named pipe with data", fifo),
    Case::new("files/eventfd", "event counters", eventfd),
    Case::new("files/epoll", "an interest list", epoll),
    Case::new("files/epoll-nested", "an epoll in an epoll", nested),
    Case::new("files/signalfd", "signals read from a descriptor", signalfd),
];

fn pipes(_: &Stage) -> Result<Check> {
    let (mut reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"queued in the pipe")?;
    let (mut big_reader, big_writer) =
        nix::unistd::pipe2(OFlag::O_NONBLOCK).map(|(r, w)| (File::from(r), File::from(w)))?;
    let (mut packets, packet_writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_DIRECT)
        .map(|(r, w)| (File::from(r), File::from(w)))?;
    let size = fcntl(&big_writer, FcntlArg::F_SETPIPE_SZ(1 << 18))?;
    ensure!(size >= 1 << 18, "pipe size {size}");
    let fill = |w: &File| -> Result<()> {
        for n in 0..40_u8 {
            (&mut &*w).write_all(&vec![n; 3000])?;
        }
        Ok(())
    };
    fill(&big_writer)?;
    let (mut full, filler) = std::io::pipe()?;
    fcntl(&filler, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut filled = 0;
    while let Ok(n) = (&filler).write(&[5; 4096]) {
        filled += n;
    }
    Ok(Box::new(move |f| {
        let mut text = [0; 18];
        reader.read_exact(&mut text)?;
        f.same("queued data", b"queued in the pipe", &text);
        f.same("size", &size, &fcntl(&big_writer, FcntlArg::F_GETPIPE_SZ)?);
        for n in 0..40_u8 {
            let mut part = vec![0; 3000];
            big_reader.read_exact(&mut part)?;
            f.that(format!("part {n}"), part == vec![n; 3000]);
        }
        // In packet mode a read gives what one write gave.
        (&packet_writer).write_all(b"one")?;
        (&packet_writer).write_all(b"two")?;
        f.same("length of a packet", &3, &packets.read(&mut text)?);
        f.same("length of the next", &3, &packets.read(&mut text)?);
        let empty = big_reader.read(&mut text).map_err(|e| e.raw_os_error());
        f.same("then", &Err(Some(libc::EAGAIN)), &empty);
        let refused = (&filler).write(b"x").map_err(|e| e.raw_os_error());
        f.same(
            "a write to the full one",
            &Err(Some(libc::EAGAIN)),
            &refused,
        );
        let mut all = vec![0; filled];
        full.read_exact(&mut all)?;
        f.that("what filled it", all.iter().all(|&b| b == 5));
        while (&filler).write(&[5; 4096]).is_ok() {}
        writer.write_all(b"queued in the pipe")?;
        fill(&big_writer)
    }))
}

fn between(_: &Stage) -> Result<Check> {
    let (mut requests, ask) = std::io::pipe()?;
    let (mut answers, answer) = std::io::pipe()?;
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let mut word = [0; 4];
            requests.read_exact(&mut word)?;
            f.same("the request", b"ping", &word);
            Ok((&answer).write_all(b"pong")?)
        }) as Check)
    })?;
    (&ask).write_all(b"ping")?;
    Ok(Box::new(move |f| {
        member.check(f)?;
        let mut word = [0; 4];
        answers.read_exact(&mut word)?;
        f.same("the answer", b"pong", &word);
        Ok((&ask).write_all(b"ping")?)
    }))
}

fn ends(_: &Stage) -> Result<Check> {
    let (reader, lonely_writer) = std::io::pipe()?;
    drop(reader);
    let (mut lonely_reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"last words")?;
    drop(writer);
    let mut left = Some(b"last words".to_vec());
    Ok(Box::new(move |f| {
        let refused = (&lonely_writer).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write without reader", &Err(Some(libc::EPIPE)), &refused);
        let mut all = Vec::new();
        lonely_reader.read_to_end(&mut all)?;
        f.same(
            "what is left, then the end",
            &left.take().unwrap_or_default(),
            &all,
        );
        Ok(())
    }))
}

fn fifo(stage: &Stage) -> Result<Check> {
    let path = stage.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    let both = || File::options().read(true).write(true).open(&path);
    let mut file = both()?;
    file.write_all(b"in the fifo")?;
    let late = path.clone();
    let mut reader = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)?;
    Ok(Box::new(move |f| {
        let mut text = [0; 11];
        reader.read_exact(&mut text)?;
        f.same("queued data", b"in the fifo", &text);
        // By its name it is still the same pipe.
        File::options()
            .write(true)
            .open(&late)?
            .write_all(b"in the fifo")?;
        file.read_exact(&mut text)?;
        f.same("written by name", b"in the fifo", &text);
        Ok(file.write_all(b"in the fifo")?)
    }))
}

fn eventfd(_: &Stage) -> Result<Check> {
    let plain = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    let counting =
        EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK)?;
    plain.write(0x1_2345_6789)?;
    Ok(Box::new(move |f| {
        f.same("counter", &Ok(0x1_2345_6789), &plain.read());
        f.same("then", &Err(Errno::EAGAIN), &plain.read());
        for _ in 0..3 {
            f.same("semaphore", &Ok(1), &counting.read());
        }
        f.same("then", &Err(Errno::EAGAIN), &counting.read());
        plain.write(0x1_2345_6789)?;
        counting.write(3)?;
        Ok(())
    }))
}

fn ready(epoll: &Epoll) -> Result<Vec<(u64, i32)>> {
    let mut out = [EpollEvent::empty(); 16];
    let n = epoll.wait(&mut out, EpollTimeout::ZERO)?;
    let mut all: Vec<_> = out[..n]
        .iter()
        .map(|e| (e.data(), e.events().bits()))
        .collect();
    all.sort_unstable();
    Ok(all)
}

fn epoll(_: &Stage) -> Result<Check> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let quiet = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    let level = EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK)?;
    let once = EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK)?;
    let (reader, writer) = std::io::pipe()?;
    epoll.add(&quiet, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    epoll.add(&level, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX - 1))?;
    epoll.add(
        &once,
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 3),
    )?;
    epoll.add(
        &reader,
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 4),
    )?;
    epoll.add(&writer, EpollEvent::new(EpollFlags::EPOLLOUT, 5))?;
    // Used up: it reports no more until it is armed again.
    ensure!(ready(&epoll)?.contains(&(3, libc::EPOLLIN)), "one shot");
    let (input, output) = (libc::EPOLLIN, libc::EPOLLOUT);
    let want = vec![(5, output), (u64::MAX - 1, input)];
    ensure!(ready(&epoll)? == want, "{:?}", ready(&epoll)?);
    Ok(Box::new(move |f| {
        let _keep = &level;
        f.same("ready", &want, &ready(&epoll)?);
        quiet.write(1)?;
        (&writer).write_all(b"x")?;
        let more = vec![(1, input), (4, input), (5, output), (u64::MAX - 1, input)];
        f.same("ready after events", &more, &ready(&epoll)?);
        let mut rearmed = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 3);
        epoll.modify(&once, &mut rearmed)?;
        f.that("armed again", ready(&epoll)?.contains(&(3, input)));
        quiet.read()?;
        (&reader).read_exact(&mut [0])?;
        f.same("at the end", &want, &ready(&epoll)?);
        Ok(())
    }))
}

fn nested(_: &Stage) -> Result<Check> {
    let inner = Epoll::new(EpollCreateFlags::empty())?;
    let outer = Epoll::new(EpollCreateFlags::empty())?;
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    inner.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 8))?;
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 9))?;
    // The same file under a number that is closed since.
    let twin = dup(&event)?;
    outer.add(&twin, EpollEvent::new(EpollFlags::EPOLLIN, 10))?;
    Ok(Box::new(move |f| {
        f.same("nothing is ready", &vec![], &ready(&outer)?);
        event.write(1)?;
        let input = libc::EPOLLIN;
        f.same("outer", &vec![(9, input), (10, input)], &ready(&outer)?);
        f.same("inner", &vec![(8, input)], &ready(&inner)?);
        event.read()?;
        let _keep = &twin;
        Ok(())
    }))
}

fn signalfd(_: &Stage) -> Result<Check> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.add(Signal::SIGUSR2);
    set.thread_block()?;
    let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK)?;
    kill(Pid::this(), Signal::SIGUSR1)?;
    Ok(Box::new(move |f| {
        let next = || -> Result<Option<(u32, u32)>> {
            Ok(fd.read_signal()?.map(|s| (s.ssi_signo, s.ssi_pid)))
        };
        let me = std::process::id();
        f.same("pending", &Some((Signal::SIGUSR1 as u32, me)), &next()?);
        f.same("then", &None, &next()?);
        kill(Pid::this(), Signal::SIGUSR2)?;
        f.same("a new one", &Some((Signal::SIGUSR2 as u32, me)), &next()?);
        Ok(kill(Pid::this(), Signal::SIGUSR1)?)
    }))
}
