//! Random trees of random objects: the same number builds the same tree.
//!
//! Each process inherits what its parent has and adds some more. What `/proc`
//! shows of all of them is compared by the runner; each object also knows what
//! it must hold.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::ProtFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise, sigprocmask};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::conformance::sys::{Map, PAGE};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "random/one",
        "a random tree of random objects (seed 1)",
        |s| tree(s, 1),
    ),
    Case::new(
        "random/two",
        "a random tree of random objects (seed 2)",
        |s| tree(s, 2),
    ),
    Case::new(
        "random/three",
        "a random tree of random objects (seed 3)",
        |s| tree(s, 3),
    ),
    Case::new(
        "random/four",
        "a random tree of random objects (seed 4)",
        |s| tree(s, 4),
    ),
    Case::new(
        "random/five",
        "a random tree of random objects (seed 5)",
        |s| tree(s, 5),
    ),
    Case::new(
        "random/six",
        "a random tree of random objects (seed 6)",
        |s| tree(s, 6),
    ),
];

/// In the environment of the runner and the programs: added to every seed.
pub const SEED: &str = "RCR_SEED";

const DEPTH_MAX: usize = 2;

/// Numbers that look random (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn roll(&mut self, sides: usize) -> usize {
        (self.next() % sides as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.roll(2) == 0
    }

    fn bytes(&mut self, max: usize) -> Vec<u8> {
        let len = 1 + self.roll(max);
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn tree(stage: &Stage, seed: u64) -> Result<Check> {
    let more: u64 = std::env::var(SEED)
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    let mut dice = Dice(seed.wrapping_add(more));
    process(&stage.files(), "", &mut dice, 0)
}

fn process(dir: &Path, name: &str, dice: &mut Dice, depth: usize) -> Result<Check> {
    let mut checks = Vec::new();
    for n in 0..2 + dice.roll(6) {
        let path = dir.join(format!("object{name}-{n}"));
        let (what, make) = OBJECTS[dice.roll(OBJECTS.len())];
        let check = make(&path, dice).with_context(|| format!("{what} {n}"))?;
        checks.push((format!("{what} {n}: "), check));
    }
    let mut members = Vec::new();
    if depth < DEPTH_MAX {
        for n in 0..dice.roll(3) {
            let name = format!("{name}.{n}");
            let mut own = Dice(dice.next());
            let setup = || process(dir, &name, &mut own, depth + 1);
            members.push(Member::start(&name, setup)?);
        }
    }
    // Forks are made while there is one thread.
    for n in 0..dice.roll(3) {
        checks.push((format!("thread {n}: "), thread(dice)?));
    }
    Ok(Box::new(move |f| {
        for (what, check) in &mut checks {
            let mut found = Findings::default();
            found.run(check);
            f.extend(what, found.lines().to_vec());
        }
        for m in &members {
            m.check(f)?;
        }
        Ok(())
    }))
}

type Make = fn(&Path, &mut Dice) -> Result<Check>;

const OBJECTS: &[(&str, Make)] = &[
    ("pipe", pipe),
    ("socket pair", pair),
    ("file", file),
    ("unlinked file", unlinked),
    ("event counter", counter),
    ("interest list", interest),
    ("timer", timer),
    ("private memory", private),
    ("shared memory", shared),
    ("pending signal", pending),
    ("duplicate", duplicate),
];

fn pipe(_: &Path, dice: &mut Dice) -> Result<Check> {
    let flags = if dice.coin() {
        OFlag::O_NONBLOCK
    } else {
        OFlag::O_CLOEXEC
    };
    let (reader, writer) = nix::unistd::pipe2(flags)?;
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    if dice.coin() {
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096 << dice.roll(6)))?;
    }
    let size = fcntl(&writer, FcntlArg::F_GETPIPE_SZ)?;
    let data = dice.bytes(4000);
    writer.write_all(&data)?;
    Ok(Box::new(move |f| {
        let mut now = vec![0; data.len()];
        reader.read_exact(&mut now)?;
        f.that("its data", now == data);
        writer.write_all(&data)?;
        f.same("its size", &size, &fcntl(&writer, FcntlArg::F_GETPIPE_SZ)?);
        Ok(())
    }))
}

fn pair(_: &Path, dice: &mut Dice) -> Result<Check> {
    let kinds = [SockType::Stream, SockType::Datagram, SockType::SeqPacket];
    let kind = kinds[dice.roll(3)];
    let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
    if dice.coin() {
        setsockopt(&a, sockopt::PassCred, &true)?;
    }
    let packets: Vec<Vec<u8>> = (0..1 + dice.roll(4)).map(|_| dice.bytes(500)).collect();
    let fill = move |to: &OwnedFd| -> Result<()> {
        for p in &packets {
            send(to.as_raw_fd(), p, MsgFlags::empty())?;
        }
        Ok(())
    };
    fill(&a)?;
    let look = |from: &OwnedFd| -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut buf = [0; 4096];
        loop {
            match recv(from.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
                Ok(n) => all.extend_from_slice(&buf[..n]),
                Err(Errno::EAGAIN) => return Ok(all),
                Err(e) => return Err(e.into()),
            }
        }
    };
    let first = look(&b)?;
    fill(&a)?;
    Ok(Box::new(move |f| {
        f.that("its queue", look(&b)? == first);
        f.that("nothing on the other side", look(&a)?.is_empty());
        fill(&a)
    }))
}

fn open(path: &Path, dice: &mut Dice) -> Result<(File, Vec<u8>, u64)> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let mut file = options.open(path)?;
    let data = dice.bytes(9000);
    file.write_all(&data)?;
    let at = dice.roll(data.len() + 100) as u64;
    file.seek(SeekFrom::Start(at))?;
    if dice.coin() {
        fcntl(
            &file,
            FcntlArg::F_SETFL(OFlag::O_APPEND | OFlag::O_NONBLOCK),
        )?;
    }
    Ok((file, data, at))
}

fn holds(mut file: File, data: Vec<u8>, at: u64) -> Check {
    Box::new(move |f| {
        f.same("its offset", &at, &file.stream_position()?);
        let mut now = vec![0; data.len()];
        file.read_exact_at(&mut now, 0)?;
        f.that("its content", now == data);
        Ok(())
    })
}

fn file(path: &Path, dice: &mut Dice) -> Result<Check> {
    let (file, data, at) = open(path, dice)?;
    Ok(holds(file, data, at))
}

fn unlinked(path: &Path, dice: &mut Dice) -> Result<Check> {
    let (file, data, at) = open(path, dice)?;
    std::fs::remove_file(path)?;
    Ok(holds(file, data, at))
}

fn counter(_: &Path, dice: &mut Dice) -> Result<Check> {
    let start = 1 + dice.roll(1000) as u32;
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let fd = EventFd::from_value_and_flags(start, flags)?;
    Ok(Box::new(move |f| {
        let now = fd.read()?;
        f.same("its count", &u64::from(start), &now);
        fd.write(now)?;
        Ok(())
    }))
}

fn interest(_: &Path, dice: &mut Dice) -> Result<Check> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut watched = Vec::new();
    for n in 0..1 + dice.roll(4) {
        let fd = EventFd::from_value_and_flags(n as u32 % 2, EfdFlags::EFD_CLOEXEC)?;
        let edge = if dice.coin() {
            EpollFlags::EPOLLET
        } else {
            EpollFlags::empty()
        };
        epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN | edge, n as u64))?;
        watched.push(fd);
    }
    Ok(Box::new(move |f| {
        let mut events = [EpollEvent::empty(); 8];
        let ready = epoll.wait(&mut events, 0_u8)?;
        // Those with edges tell once, so at most what is ready.
        f.that("what is ready", ready <= watched.len() / 2);
        watched[0].write(1)?;
        let ready = epoll.wait(&mut events, 0_u8)?;
        let told = events[..ready].iter().any(|e| e.data() == 0);
        f.that("it tells of the first", told);
        watched[0].read()?;
        Ok(())
    }))
}

fn timer(_: &Path, dice: &mut Dice) -> Result<Check> {
    let clocks = [
        ClockId::CLOCK_MONOTONIC,
        ClockId::CLOCK_REALTIME,
        ClockId::CLOCK_BOOTTIME,
    ];
    let timer = TimerFd::new(clocks[dice.roll(3)], TimerFlags::TFD_CLOEXEC)?;
    let far = TimeSpec::new(10_000 + dice.roll(10_000) as i64, 0);
    let when = match dice.coin() {
        true => Expiration::OneShot(far),
        false => Expiration::IntervalDelayed(far, TimeSpec::new(7, 5)),
    };
    timer.set(when, TimerSetTimeFlags::empty())?;
    Ok(Box::new(move |f| {
        let now = timer.get()?;
        let same = matches!(
            (when, now),
            (Expiration::OneShot(_), Some(Expiration::OneShot(_)))
                | (
                    Expiration::IntervalDelayed(..),
                    Some(Expiration::IntervalDelayed(..))
                )
        );
        f.that(format!("it is armed: {now:?}"), same);
        Ok(())
    }))
}

fn stamp(map: &Map, dice: &mut Dice) -> Vec<(usize, u64)> {
    let pages = map.len() / PAGE;
    let mut stamps = std::collections::BTreeMap::new();
    for _ in 0..1 + dice.roll(pages) {
        let word = dice.roll(map.len() / 8);
        let value = dice.next();
        map.word(word)
            .store(value, std::sync::atomic::Ordering::SeqCst);
        stamps.insert(word, value);
    }
    stamps.into_iter().collect()
}

fn stamped(map: Map, stamps: Vec<(usize, u64)>) -> Check {
    Box::new(move |f| {
        for (word, value) in &stamps {
            let now = map.word(*word).load(std::sync::atomic::Ordering::SeqCst);
            f.same("a word of it", value, &now);
        }
        Ok(())
    })
}

fn private(_: &Path, dice: &mut Dice) -> Result<Check> {
    let map = Map::private((1 + dice.roll(40)) * PAGE)?;
    let stamps = stamp(&map, dice);
    if dice.coin() {
        map.protect(ProtFlags::PROT_READ)?;
    }
    Ok(stamped(map, stamps))
}

fn shared(_: &Path, dice: &mut Dice) -> Result<Check> {
    let map = Map::shared((1 + dice.roll(40)) * PAGE)?;
    let stamps = stamp(&map, dice);
    Ok(stamped(map, stamps))
}

fn pending(_: &Path, dice: &mut Dice) -> Result<Check> {
    let signals = [
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGWINCH,
        Signal::SIGHUP,
        Signal::SIGURG,
        Signal::SIGCHLD,
        Signal::SIGTRAP,
    ];
    let signal = signals[dice.roll(signals.len())];
    let mut set = SigSet::empty();
    set.add(signal);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    // Ignored ones would not wait.
    // SAFETY: the default action is no code of ours.
    unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }?;
    raise(signal)?;
    Ok(Box::new(move |f| {
        let status = std::fs::read_to_string("/proc/thread-self/status")?;
        let mask = |key: &str| -> Option<u64> {
            let line = status.lines().find_map(|l| l.strip_prefix(key))?;
            u64::from_str_radix(line.trim(), 16).ok()
        };
        let bit = 1 << (signal as i32 - 1);
        let waits = mask("SigPnd:").context("SigPnd")? | mask("ShdPnd:").context("ShdPnd")?;
        f.that(format!("{signal} does not wait"), waits & bit != 0);
        Ok(())
    }))
}

fn duplicate(path: &Path, dice: &mut Dice) -> Result<Check> {
    let (file, _, at) = open(path, dice)?;
    let number = 100 + dice.roll(400) as i32;
    // SAFETY: the number the kernel chooses was free, and is ours from here on.
    let copy = unsafe {
        use std::os::fd::FromRawFd;
        OwnedFd::from_raw_fd(fcntl(file.as_fd(), FcntlArg::F_DUPFD(number))?)
    };
    let mut copy = File::from(copy);
    let mut file = file;
    let mut at = at;
    Ok(Box::new(move |f| {
        f.same("its offset", &at, &copy.stream_position()?);
        at = (at + 17) % 5000;
        copy.seek(SeekFrom::Start(at))?;
        f.same("the offset of the first", &at, &file.stream_position()?);
        Ok(())
    }))
}

fn thread(dice: &mut Dice) -> Result<Check> {
    let board = Map::forever(PAGE)?;
    let add = dice.next() >> 8;
    let name = format!("random-{}", dice.roll(1000));
    let builder = std::thread::Builder::new().name(name);
    let handle = builder.spawn(move || {
        use std::sync::atomic::Ordering::SeqCst;
        let mut done = 0;
        loop {
            let asked = board.word(0).load(SeqCst);
            if asked > done {
                done = asked;
                board.word(2).store(asked.wrapping_add(add), SeqCst);
                board.word(1).store(done, SeqCst);
            }
            std::thread::sleep(crate::conformance::stage::POLL);
        }
    })?;
    ensure!(!handle.is_finished(), "the thread has ended");
    Ok(Box::new(move |f| {
        use std::sync::atomic::Ordering::SeqCst;
        let asked = board.word(0).fetch_add(1, SeqCst) + 1;
        crate::conformance::sys::await_word(board.word(1), asked);
        f.same(
            "its answer",
            &asked.wrapping_add(add),
            &board.word(2).load(SeqCst),
        );
        Ok(())
    }))
}
