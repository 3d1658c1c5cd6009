//! Files: positions, logs, pipes, events, interest lists, locks, directories.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{dup, dup2_raw};

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
