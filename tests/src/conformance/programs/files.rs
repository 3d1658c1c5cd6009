//! Files: positions, logs, pipes, events, interest lists, locks, directories.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, dup, dup2_raw};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// fcntl commands (asm-generic/fcntl.h).
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("files/regular", "offset, flags, content", regular),
    Case::new("files/log", "a log opened for appending", log),
    Case::new("files/rename", "a new version renamed over a file", rename),
    Case::new("files/unlinked", "an open file without a name", unlinked),
    Case::new("files/numbers", "descriptor numbers and flags", numbers),
    Case::new("files/shared", "one open file of two processes", shared),
    Case::new("files/pipes", "pipes with data, sizes and flags", pipes),
    Case::new("files/pipe-between", "a pipe between processes", between),
    Case::new("files/pipe-end", "a pipe whose other end is closed", ends),
    Case::new("files/fifo", "a named pipe with data", fifo),
    Case::new("files/eventfd", "event counters", eventfd),
    Case::new("files/epoll", "an interest list", epoll),
    Case::new("files/epoll-nested", "an epoll in an epoll", nested),
    Case::new("files/signalfd", "signals read from a descriptor", signalfd),
    Case::new("files/locks", "flock, record and description locks", locks),
    Case::new("files/directory", "directories and O_PATH", directory),
    Case::new("files/devices", "devices of memory", devices),
    Case::new("files/owner", "whom a descriptor signals", owner),
    Case::new("files/cwd", "working directory and umask", cwd),
    Case::new("files/chroot", "a root directory of its own", chroot),
];

fn regular(stage: &Stage) -> Result<Check> {
    let path = stage.path("data");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.write_all(b"0123456789abcdef")?;
    file.seek(SeekFrom::Start(4))?;
    let reader = File::open(&path)?;
    let flags = OFlag::O_NOATIME.bits() | OFlag::O_SYNC.bits();
    let mut special = File::options()
        .write(true)
        .custom_flags(flags)
        .open(&path)?;
    special.seek(SeekFrom::Start(1 << 40))?;
    let status = fcntl(&special, FcntlArg::F_GETFL)?;
    let inode = file.metadata()?.ino();
    Ok(Box::new(move |f| {
        f.same("offset", &4, &file.stream_position()?);
        let mut four = [0; 4];
        file.read_exact(&mut four)?;
        f.same("what is read there", b"4567", &four);
        file.seek(SeekFrom::Start(4))?;
        f.same("offset of the other", &0, &(&reader).stream_position()?);
        f.same("a far offset", &(1 << 40), &special.stream_position()?);
        f.same("flags", &status, &fcntl(&special, FcntlArg::F_GETFL)?);
        f.same("inode", &inode, &file.metadata()?.ino());
        let refused = (&reader).write_all(b"x").map_err(|e| e.raw_os_error());
        f.same(
            "a write to the read-only one",
            &Err(Some(libc::EBADF)),
            &refused,
        );
        Ok(())
    }))
}

fn log(stage: &Stage) -> Result<Check> {
    let path = stage.path("log");
    let mut log = File::options().append(true).create(true).open(&path)?;
    let mut want = String::from("before\n");
    log.write_all(want.as_bytes())?;
    let mut turn = 0;
    Ok(Box::new(move |f| {
        // Somebody else writes meanwhile: appending goes to the end all the same.
        let mut other = File::options().append(true).open(&path)?;
        turn += 1;
        other.write_all(format!("other {turn}\n").as_bytes())?;
        log.write_all(format!("after {turn}\n").as_bytes())?;
        want += &format!("other {turn}\nafter {turn}\n");
        f.same(
            "the log",
            want.as_str(),
            fs::read_to_string(&path)?.as_str(),
        );
        Ok(())
    }))
}

fn rename(stage: &Stage) -> Result<Check> {
    let (path, draft) = (stage.path("dump.rdb"), stage.path("temp.rdb"));
    fs::write(&path, "version 0")?;
    let mut old = File::open(&path)?;
    let mut unfinished = File::create(&draft)?;
    unfinished.write_all(b"version")?;
    let mut turn = 0;
    Ok(Box::new(move |f| {
        turn += 1;
        unfinished.write_all(format!(" {turn}").as_bytes())?;
        unfinished.sync_all()?;
        fs::rename(&draft, &path)?;
        let is = fs::read_to_string(&path)?;
        f.same(
            "the new version",
            format!("version {turn}").as_str(),
            is.as_str(),
        );
        let mut content = String::new();
        old.rewind()?;
        old.read_to_string(&mut content)?;
        f.same(
            "the old one",
            format!("version {}", turn - 1).as_str(),
            content.as_str(),
        );
        old = File::open(&path)?;
        unfinished = File::create(&draft)?;
        unfinished.write_all(b"version")?;
        Ok(())
    }))
}

fn unlinked(stage: &Stage) -> Result<Check> {
    let path = stage.path("gone");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.write_all(&vec![7; 100_000])?;
    file.seek(SeekFrom::Start(50_000))?;
    let reader = File::open(&path)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640))?;
    fs::remove_file(&path)?;
    let nameless = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(stage.files())?;
    nameless.write_all_at(b"never had one", 3)?;
    Ok(Box::new(move |f| {
        f.same("offset", &50_000, &file.stream_position()?);
        let meta = file.metadata()?;
        f.same("size", &100_000, &meta.len());
        f.same("links", &0, &meta.nlink());
        f.same("mode", &0o640, &(meta.mode() & 0o7777));
        f.same("one file", &meta.ino(), &reader.metadata()?.ino());
        let mut all = vec![0; 100_000];
        reader.read_exact_at(&mut all, 0)?;
        f.that("content", all == vec![7; 100_000]);
        let mut words = [0; 16];
        nameless.read_exact_at(&mut words, 0)?;
        f.same("the other's content", b"\0\0\0never had one", &words);
        f.that("no name came back", !path.exists());
        Ok(())
    }))
}

fn numbers(stage: &Stage) -> Result<Check> {
    let file = File::create(stage.path("file"))?;
    let high: Vec<OwnedFd> = [77, 200, 900]
        .into_iter()
        // SAFETY: the numbers are free in this program.
        .map(|n| unsafe { dup2_raw(&file, n) })
        .collect::<nix::Result<_>>()?;
    fcntl(&high[1], FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let list = || -> Result<Vec<(i32, i32)>> {
        let mut all = Vec::new();
        for n in 0..1000 {
            // SAFETY: only asks for flags.
            let flags = unsafe { libc::fcntl(n, libc::F_GETFD) };
            if flags >= 0 {
                all.push((n, flags));
            }
        }
        Ok(all)
    };
    let was = list()?;
    Ok(Box::new(move |f| {
        let _keep = (&file, &high);
        f.same("numbers and flags", &was, &list()?);
        let next = File::open("/")?;
        f.same("the next number", &4, &next.as_raw_fd());
        Ok(())
    }))
}

fn shared(stage: &Stage) -> Result<Check> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(stage.path("f"))?;
    file.write_all(b"abcdefghijklmnopqrstuvwxyz")?;
    file.rewind()?;
    let twin = File::from(dup(&file)?);
    let theirs = file.try_clone()?;
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let mut two = [0; 2];
            (&theirs).read_exact(&mut two)?;
            f.same("what it reads", b"cd", &two);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        let mut two = [0; 2];
        file.read_exact(&mut two)?;
        f.same("what is read", b"ab", &two);
        member.check(f)?;
        (&twin).read_exact(&mut two)?;
        f.same("what is read after the other", b"ef", &two);
        file.rewind()?;
        Ok(())
    }))
}

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

fn record(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn locks(stage: &Stage) -> Result<Check> {
    let open = |name: &str| -> Result<File> {
        let path = stage.path(name);
        fs::write(&path, "lock me")?;
        Ok(File::options().read(true).write(true).open(&path)?)
    };
    let (whole, part, description) = (open("flock")?, open("record")?, open("description")?);
    let paths: Vec<PathBuf> = ["flock", "record", "description"]
        .map(|n| stage.path(n))
        .into();
    // The lock belongs to the open file, which stays open.
    // SAFETY: a plain call on a descriptor of ours.
    let locked = unsafe { libc::flock(whole.as_raw_fd(), libc::LOCK_EX) };
    ensure!(locked == 0, "flock");
    fcntl(&part, FcntlArg::F_SETLK(&record(libc::F_WRLCK, 1, 3)))?;
    fcntl(&part, FcntlArg::F_SETLK(&record(libc::F_RDLCK, 5, 0)))?;
    fcntl(
        &description,
        FcntlArg::F_OFD_SETLK(&record(libc::F_WRLCK, 0, 0)),
    )?;
    // It inherits the descriptors; the locks are the parent's all the same.
    let member = Member::start("a competitor", || {
        Ok(Box::new(move |f: &mut Findings| {
            let open = |i: usize| File::options().read(true).write(true).open(&paths[i]);
            let other = open(0)?;
            // SAFETY: as above.
            let r = unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
            f.same("flock", &(-1, Errno::EWOULDBLOCK), &(r, Errno::last()));
            let other = open(1)?;
            let busy = |from, len| {
                let lock = record(libc::F_WRLCK, from, len);
                fcntl(&other, FcntlArg::F_SETLK(&lock)).map(drop)
            };
            f.same("write lock", &Err(Errno::EAGAIN), &busy(1, 3));
            f.same("read lock", &Err(Errno::EAGAIN), &busy(100, 1));
            f.same("the gap", &Ok(()), &busy(0, 1));
            let other = open(2)?;
            let lock = record(libc::F_WRLCK, 0, 0);
            let r = fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).map(drop);
            f.same("description lock", &Err(Errno::EAGAIN), &r);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        let _keep = (&whole, &part, &description);
        member.check(f)
    }))
}

fn directory(stage: &Stage) -> Result<Check> {
    let dir = stage.path("dir");
    fs::create_dir(&dir)?;
    fs::write(dir.join("inside"), "x")?;
    let opened = File::open(&dir)?;
    let by_path = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(dir.join("inside"))?;
    Ok(Box::new(move |f| {
        let at = nix::fcntl::openat(
            &opened,
            "inside",
            OFlag::O_RDONLY,
            nix::sys::stat::Mode::empty(),
        )?;
        let mut text = String::new();
        File::from(at).read_to_string(&mut text)?;
        f.same("a file by its directory", "x", text.as_str());
        let refused = (&by_path).read(&mut [0]).map_err(|e| e.raw_os_error());
        f.same("a read by O_PATH", &Err(Some(libc::EBADF)), &refused);
        f.same("size by O_PATH", &1, &by_path.metadata()?.len());
        Ok(())
    }))
}

fn devices(_: &Stage) -> Result<Check> {
    let open = |name: &str| File::options().read(true).write(true).open(name);
    let (mut null, mut zero, mut random) = (
        open("/dev/null")?,
        open("/dev/zero")?,
        File::open("/dev/urandom")?,
    );
    let mut full = open("/dev/full")?;
    Ok(Box::new(move |f| {
        let mut bytes = [9; 16];
        f.same("read from null", &0, &null.read(&mut bytes)?);
        null.write_all(b"gone")?;
        zero.read_exact(&mut bytes)?;
        f.same("read from zero", &[0; 16], &bytes);
        random.read_exact(&mut bytes)?;
        f.that("random bytes", bytes != [0; 16]);
        let refused = full.write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write to full", &Err(Some(libc::ENOSPC)), &refused);
        Ok(())
    }))
}

fn owner(_: &Stage) -> Result<Check> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.thread_block()?;
    let (reader, writer) = std::io::pipe()?;
    let me = std::process::id() as i32;
    let fd = reader.as_raw_fd();
    // SAFETY: numbers only.
    let set_all = || unsafe {
        libc::fcntl(fd, libc::F_SETOWN, me) | libc::fcntl(fd, F_SETSIG, libc::SIGUSR1)
    };
    ensure!(set_all() == 0, "F_SETOWN, F_SETSIG");
    fcntl(
        &reader,
        FcntlArg::F_SETFL(OFlag::O_ASYNC | OFlag::O_NONBLOCK),
    )?;
    Ok(Box::new(move |f| {
        // SAFETY: as above.
        let (owner, signal) =
            unsafe { (libc::fcntl(fd, libc::F_GETOWN), libc::fcntl(fd, F_GETSIG)) };
        f.same("owner", &me, &owner);
        f.same("signal", &libc::SIGUSR1, &signal);
        (&writer).write_all(b"x")?;
        let got = set.wait()?;
        f.same("signalled", &Signal::SIGUSR1, &got);
        (&reader).read_exact(&mut [0])?;
        Ok(())
    }))
}

fn cwd(stage: &Stage) -> Result<Check> {
    let dir = stage.path("deep/er");
    fs::create_dir_all(&dir)?;
    std::env::set_current_dir(&dir)?;
    let mask = nix::sys::stat::Mode::from_bits_truncate(0o137);
    nix::sys::stat::umask(mask);
    Ok(Box::new(move |f| {
        f.same("working directory", &dir, &std::env::current_dir()?);
        let _ = fs::remove_file("new");
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o777)
            .open("new")?;
        f.same(
            "mode of a new file",
            &0o640,
            &(fs::metadata("new")?.mode() & 0o777),
        );
        f.same("its place", &true, &dir.join("new").exists());
        f.same("umask", &mask, &nix::sys::stat::umask(mask));
        Ok(())
    }))
}

fn chroot(stage: &Stage) -> Result<Check> {
    let root = stage.path("root");
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/name"), "inside")?;
    let member = Member::start("the enclosed process", move || {
        let file = File::open(root.join("etc/name"))?;
        nix::unistd::chroot(&root)?;
        std::env::set_current_dir("/etc")?;
        Ok(Box::new(move |f: &mut Findings| {
            f.same(
                "a file by name",
                "inside",
                fs::read_to_string("/etc/name")?.as_str(),
            );
            f.same(
                "a file from here",
                "inside",
                fs::read_to_string("name")?.as_str(),
            );
            f.same(
                "out of the root",
                "inside",
                fs::read_to_string("../../../etc/name")?.as_str(),
            );
            f.that("no other root", !std::path::Path::new("/proc").exists());
            let mut text = [0; 6];
            file.read_exact_at(&mut text, 0)?;
            f.same("an open file", b"inside", &text);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}
