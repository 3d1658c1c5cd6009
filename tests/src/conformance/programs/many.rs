//! Many files of a kind, and the odd corners of pipes and interest lists.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{dup, dup2_raw, pipe2};

use crate::conformance::case::Unavailable;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "files/pipes-many",
        "5,000 pipes, each with data",
        pipes_many,
    ),
    Case::new(
        "files/events-many",
        "4,000 event counters in one interest list",
        events_many,
    ),
    Case::new(
        "files/numbers-high",
        "descriptor numbers near the limit",
        high,
    ),
    Case::new(
        "files/pipe-packets",
        "packets in a pipe (O_DIRECT)",
        packets,
    ),
    Case::new("files/pipe-full", "full pipes of 4 KiB and 1 MiB", full),
    Case::new(
        "files/pipe-reopened",
        "pipes opened again through /proc",
        reopened,
    ),
    Case::new(
        "files/fifo-reader",
        "a named pipe with a reader alone",
        fifo_reader,
    ),
    Case::new(
        "files/fifo-writer",
        "a named pipe with writers alone",
        fifo_writer,
    ),
    Case::new(
        "files/epoll-numbers",
        "an interest list of closed, reused and moved numbers",
        epoll_numbers,
    ),
    Case::new(
        "files/epoll-twice",
        "one file twice in an interest list, and in two",
        epoll_twice,
    ),
    Case::new(
        "files/epoll-shared",
        "an interest list of two processes",
        epoll_shared,
    ),
    Case::new(
        "files/eventfd-full",
        "counters at their limits",
        eventfd_full,
    ),
];

fn room(n: u64) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < n {
        let why = format!("no more than {hard} open files");
        return Err(Unavailable::because(why));
    }
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn pipes_many(_: &Stage) -> Result<Check> {
    const COUNT: usize = 5000;
    room(2 * COUNT as u64 + 100)?;
    let mut all = Vec::new();
    for n in 0..COUNT {
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(&(n as u32).to_ne_bytes())?;
        all.push((reader, writer));
    }
    Ok(Box::new(move |f| {
        for (n, (reader, writer)) in all.iter_mut().enumerate() {
            let mut four = [0; 4];
            reader.read_exact(&mut four)?;
            if u32::from_ne_bytes(four) != n as u32 {
                f.note(format!("pipe {n} holds {four:?}"));
            }
            writer.write_all(&four)?;
        }
        Ok(())
    }))
}

fn ready(epoll: &Epoll, room: usize) -> Result<Vec<u64>> {
    let mut out = vec![EpollEvent::empty(); room];
    let n = epoll.wait(&mut out, EpollTimeout::ZERO)?;
    let mut all: Vec<u64> = out[..n].iter().map(|e| e.data()).collect();
    all.sort_unstable();
    Ok(all)
}

fn event(count: u32) -> Result<EventFd> {
    Ok(EventFd::from_value_and_flags(
        count,
        EfdFlags::EFD_NONBLOCK,
    )?)
}

fn watch(data: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN, data)
}

fn events_many(_: &Stage) -> Result<Check> {
    const COUNT: usize = 4000;
    room(COUNT as u64 + 100)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut all = Vec::new();
    for n in 0..COUNT {
        let e = event(u32::from(n % 100 == 7))?;
        epoll.add(&e, watch(n as u64))?;
        all.push(e);
    }
    let want: Vec<u64> = (0..COUNT as u64).filter(|n| n % 100 == 7).collect();
    Ok(Box::new(move |f| {
        let _keep = &all;
        f.same("ready", &want, &ready(&epoll, COUNT)?);
        Ok(())
    }))
}

fn high(_: &Stage) -> Result<Check> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    room(hard)?;
    let top = hard as i32;
    let file = event(3)?;
    // As high as this machine lets us; beyond 100,000 where it does.
    let numbers: Vec<i32> = [1025, 65_537, 100_001, 131_072, top - 1]
        .into_iter()
        .filter(|n| *n < top)
        .collect();
    // SAFETY: the numbers are free in this program.
    let make = |n: &i32| unsafe { dup2_raw(&file, *n) };
    let all: Vec<OwnedFd> = numbers.iter().map(make).collect::<nix::Result<_>>()?;
    fcntl(&all[0], FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(Box::new(move |f| {
        for (n, fd) in numbers.iter().zip(&all) {
            f.same("number", n, &fd.as_raw_fd());
            let flags = fcntl(fd, FcntlArg::F_GETFD)?;
            f.same(
                &format!("flags of {n}"),
                &i32::from(*n == numbers[0]),
                &flags,
            );
        }
        f.same("one counter", &Ok(3), &file.read());
        file.write(3)?;
        Ok(())
    }))
}

fn packets(_: &Stage) -> Result<Check> {
    let make =
        || pipe2(OFlag::O_NONBLOCK | OFlag::O_DIRECT).map(|(r, w)| (File::from(r), File::from(w)));
    let (mut reader, mut writer) = make()?;
    let packets: [&[u8]; 5] = [b"one", b"", b"the third packet", &[7; 4096], b"x"];
    let fill = move |w: &mut File| -> Result<()> {
        for p in packets.iter().filter(|p| !p.is_empty()) {
            w.write_all(p)?;
        }
        Ok(())
    };
    fill(&mut writer)?;
    Ok(Box::new(move |f| {
        for p in packets.iter().filter(|p| !p.is_empty()) {
            let mut room = [0; 5000];
            let n = reader.read(&mut room)?;
            f.that(
                format!("a packet of {}, not {n}", p.len()),
                room[..n] == **p,
            );
        }
        let empty = reader.read(&mut [0]).map_err(|e| e.raw_os_error());
        f.same("then", &Err(Some(libc::EAGAIN)), &empty);
        fill(&mut writer)
    }))
}

fn full(_: &Stage) -> Result<Check> {
    let make = |size: i32| -> Result<(File, File, usize)> {
        let (r, w) = pipe2(OFlag::O_NONBLOCK)?;
        let (r, mut w) = (File::from(r), File::from(w));
        let size = fcntl(&w, FcntlArg::F_SETPIPE_SZ(size))? as usize;
        let mut filled = 0;
        while let Ok(n) = w.write(&vec![(filled / 4096 % 251) as u8; 4096]) {
            filled += n;
        }
        Ok((r, w, size.min(filled)))
    };
    let all = [make(4096)?, make(1 << 20)?];
    Ok(Box::new(move |f| {
        for (reader, writer, size) in &all {
            let now = fcntl(writer, FcntlArg::F_GETPIPE_SZ)? as usize;
            f.same("size", size, &now);
            let refused = (&mut &*writer).write(b"x").map_err(|e| e.raw_os_error());
            f.same("no room", &Err(Some(libc::EAGAIN)), &refused);
            let mut data = vec![0; *size];
            (&mut &*reader).read_exact(&mut data)?;
            let right = data
                .chunks(4096)
                .enumerate()
                .all(|(n, c)| c[0] == (n % 251) as u8);
            f.that("data", right);
            (&mut &*writer).write_all(&data)?;
        }
        Ok(())
    }))
}

fn reopened(_: &Stage) -> Result<Check> {
    let (reader, writer) = std::io::pipe()?;
    let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let mut quiet = File::options();
    let mut quiet = quiet
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)?;
    let mut both = File::options().read(true).write(true).open(&path)?;
    Ok(Box::new(move |f| {
        let empty = quiet.read(&mut [0]).map_err(|e| e.raw_os_error());
        f.same("one does not wait", &Err(Some(libc::EAGAIN)), &empty);
        both.write_all(b"ab")?;
        (&writer).write_all(b"cd")?;
        let mut word = [0; 2];
        quiet.read_exact(&mut word)?;
        f.same("one pipe", b"ab", &word);
        (&reader).read_exact(&mut word)?;
        f.same("one pipe", b"cd", &word);
        Ok(())
    }))
}

fn mkfifo(stage: &Stage) -> Result<std::path::PathBuf> {
    let path = stage.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    Ok(path)
}

fn fifo_reader(stage: &Stage) -> Result<Check> {
    let path = mkfifo(stage)?;
    let mut open = File::options();
    let mut reader = open.read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    Ok(Box::new(move |f| {
        f.same("no writer: the end", &0, &reader.read(&mut [0])?);
        let mut writer = File::options().write(true).open(&path)?;
        writer.write_all(b"x")?;
        f.same("a writer by name", &1, &reader.read(&mut [0; 2])?);
        Ok(())
    }))
}

fn fifo_writer(stage: &Stage) -> Result<Check> {
    let path = mkfifo(stage)?;
    let mut both = File::options().read(true).write(true).open(&path)?;
    let mut writer = File::options().write(true).open(&path)?;
    let mut second = File::options().append(true).open(&path)?;
    writer.write_all(b"left ")?;
    second.write_all(b"behind")?;
    let mut all = [0; 11];
    both.read_exact(&mut all)?;
    both.write_all(&all)?;
    drop(both);
    Ok(Box::new(move |f| {
        let refused = writer.write(b"x").map_err(|e| e.raw_os_error());
        f.same("no reader", &Err(Some(libc::EPIPE)), &refused);
        let mut reader = File::options().read(true).write(true).open(&path)?;
        let mut all = [0; 11];
        reader.read_exact(&mut all)?;
        f.same("what was queued", b"left behind", &all);
        second.write_all(&all)?;
        Ok(())
    }))
}

fn epoll_numbers(_: &Stage) -> Result<Check> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let (closed, reused, moved) = (event(0)?, event(0)?, event(0)?);
    // Watched under a number that is closed; the file lives on as another.
    let number = dup(&closed)?;
    epoll.add(&number, watch(1))?;
    drop(number);
    // Watched under a number that another watched file has now.
    let number = dup(&reused)?;
    let raw = number.as_raw_fd();
    epoll.add(&number, watch(2))?;
    drop(number);
    // SAFETY: the number has just become free.
    let second = unsafe { dup2_raw(&moved, raw) }?;
    epoll.add(&second, watch(3))?;
    Ok(Box::new(move |f| {
        let _keep = &second;
        f.same("nothing is ready", &vec![], &ready(&epoll, 8)?);
        for (n, e) in [&closed, &reused, &moved].into_iter().enumerate() {
            e.write(1)?;
            f.same("ready", &vec![n as u64 + 1], &ready(&epoll, 8)?);
            e.read()?;
        }
        Ok(())
    }))
}

fn epoll_twice(_: &Stage) -> Result<Check> {
    let (one, two) = (
        Epoll::new(EpollCreateFlags::empty())?,
        Epoll::new(EpollCreateFlags::empty())?,
    );
    let e = event(0)?;
    let twin = dup(&e)?;
    one.add(&e, watch(1))?;
    one.add(&twin, watch(2))?;
    two.add(&e, watch(3))?;
    let exclusive = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
    two.add(&twin, EpollEvent::new(exclusive, 4))?;
    // A registration that is disarmed for good.
    let quiet = event(1)?;
    one.add(&quiet, EpollEvent::new(EpollFlags::empty(), 5))?;
    Ok(Box::new(move |f| {
        let _keep = &quiet;
        e.write(1)?;
        f.same("first list", &vec![1, 2], &ready(&one, 8)?);
        f.same("second list", &vec![3, 4], &ready(&two, 8)?);
        e.read()?;
        f.same("then", &vec![], &ready(&one, 8)?);
        f.same(
            "known twice",
            &Err(Errno::EEXIST),
            &one.add(&twin, watch(9)),
        );
        Ok(())
    }))
}

fn epoll_shared(_: &Stage) -> Result<Check> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let (early, late) = (event(0)?, event(0)?);
    epoll.add(&early, watch(1))?;
    let theirs = epoll.0.as_fd().try_clone_to_owned()?;
    let member = Member::start("the other process", move || {
        let own = event(1)?;
        let epoll = Epoll(theirs);
        epoll.add(&own, watch(2))?;
        Ok(Box::new(move |f: &mut Findings| {
            let _keep = &own;
            f.same("ready there", &vec![2], &ready(&epoll, 8)?);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        f.same("ready here", &vec![2], &ready(&epoll, 8)?);
        member.check(f)?;
        early.write(1)?;
        f.same("both", &vec![1, 2], &ready(&epoll, 8)?);
        early.read()?;
        let _keep = &late;
        Ok(())
    }))
}

fn eventfd_full(_: &Stage) -> Result<Check> {
    let full = event(0)?;
    full.write(u64::MAX - 1)?;
    let empty = event(0)?;
    let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let semaphore = EventFd::from_value_and_flags(0, flags)?;
    semaphore.write(1 << 40)?;
    Ok(Box::new(move |f| {
        f.same("no more", &Err(Errno::EAGAIN), &full.write(1).map(drop));
        f.same("all of it", &Ok(u64::MAX - 1), &full.read());
        full.write(u64::MAX - 1)?;
        f.same("nothing", &Err(Errno::EAGAIN), &empty.read());
        f.same("one of many", &Ok(1), &semaphore.read());
        semaphore.write(1)?;
        Ok(())
    }))
}
