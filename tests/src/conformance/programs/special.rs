//! Files of the kernel's own: /proc, /sys, namespaces, leases, owners, devices.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{ForkResult, fork};

use super::refusals::{expect, stranger_that_waits};
use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// fcntl commands (linux/fcntl.h).
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "files/proc-own",
        "files of oneself and of a child in /proc",
        proc_own,
    ),
    Case::new(
        "files/proc-gone",
        "files of a process that is gone",
        proc_gone,
    ),
    Case::new(
        "files/proc-system",
        "files of the system in /proc",
        proc_system,
    ),
    Case::new("files/sysfs", "a file in /sys, and its directory", sysfs),
    Case::new(
        "files/cgroup-file",
        "a control file of a cgroup, opened for writing",
        cgroup_file,
    ),
    Case::new(
        "files/namespaces",
        "descriptors of all of the host's namespaces",
        namespaces,
    ),
    Case::new(
        "files/namespace-own",
        "descriptors of namespaces that the tree has made",
        namespace_own,
    ),
    Case::new("files/lease", "a read and a write lease", lease),
    Case::new(
        "files/owner-group",
        "signal owners: a group, a thread, oneself",
        owners,
    ),
    Case::new(
        "files/devices-opened",
        "devices of memory, opened twice and by path",
        devices,
    ),
    Case::new(
        "refusals/proc-outside",
        "a file in /proc of a process outside the tree",
        proc_outside,
    )
    .refused(),
    Case::new(
        "refusals/namespace-outside",
        "a namespace that nobody lives in",
        namespace_outside,
    )
    .refused(),
    Case::new(
        "refusals/block-device",
        "an open block device",
        block_device,
    )
    .refused(),
];

fn text(file: &File) -> Result<String> {
    let mut all = String::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut all)?;
    Ok(all)
}

fn proc_own(_: &Stage) -> Result<Check> {
    let member = Member::start("the child", || {
        Ok(Box::new(|_: &mut Findings| Ok(())) as Check)
    })?;
    let own = File::open("/proc/self/comm")?;
    let maps = File::open("/proc/self/maps")?;
    let theirs = File::open(format!("/proc/{}/stat", member.pid))?;
    let dir = File::open(format!("/proc/{}", member.pid))?;
    let fds = File::open("/proc/self/fd")?;
    Ok(Box::new(move |f| {
        f.same("own name", "program\n", text(&own)?.as_str());
        f.that("own mappings", text(&maps)?.contains("[stack]"));
        let first = format!("{} (program) ", member.pid);
        f.that("the child's", text(&theirs)?.starts_with(&first));
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mode = nix::sys::stat::Mode::empty();
        let at = File::from(nix::fcntl::openat(&dir, "comm", flags, mode)?);
        f.same("by its directory", "program\n", text(&at)?.as_str());
        let at = nix::fcntl::readlinkat(&fds, fds.as_raw_fd().to_string().as_str())?;
        f.that(
            "a directory of links",
            at.to_string_lossy().ends_with("/fd"),
        );
        member.check(f)
    }))
}

fn proc_gone(_: &Stage) -> Result<Check> {
    // SAFETY: one thread; the child only waits to be killed.
    let child = match unsafe { fork() }? {
        ForkResult::Child => loop {
            nix::unistd::pause();
        },
        ForkResult::Parent { child } => child,
    };
    let stat = File::open(format!("/proc/{child}/stat"))?;
    let dir = File::open(format!("/proc/{child}"))?;
    nix::sys::signal::kill(child, Signal::SIGKILL)?;
    nix::sys::wait::waitpid(child, None)?;
    Ok(Box::new(move |f| {
        let gone = (&stat).read(&mut [0; 10]).map_err(|e| e.raw_os_error());
        f.same("reading", &Err(Some(libc::ESRCH)), &gone);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mode = nix::sys::stat::Mode::empty();
        let at = nix::fcntl::openat(&dir, "stat", flags, mode).map(drop);
        f.that("nothing below it", at.is_err());
        Ok(())
    }))
}

fn proc_system(_: &Stage) -> Result<Check> {
    let mounts = File::open("/proc/self/mountinfo")?;
    let mut load = File::open("/proc/loadavg")?;
    let mut two = [0; 2];
    load.read_exact(&mut two)?;
    let sysctl = File::options()
        .read(true)
        .write(true)
        .open("/proc/sys/kernel/pid_max")?;
    let max = text(&sysctl)?;
    Ok(Box::new(move |f| {
        f.that("mounts", text(&mounts)?.contains(" / "));
        f.same("offset", &2, &load.stream_position()?);
        f.same("a sysctl", max.as_str(), text(&sysctl)?.as_str());
        Ok(())
    }))
}

fn sysfs(_: &Stage) -> Result<Check> {
    let file = File::open("/sys/kernel/mm/transparent_hugepage/enabled")
        .or_else(|_| File::open("/sys/kernel/fscaps"))?;
    let dir = File::open("/sys/kernel")?;
    let was = text(&file)?;
    let inode = dir.metadata()?.ino();
    Ok(Box::new(move |f| {
        f.same("content", was.as_str(), text(&file)?.as_str());
        f.same("the directory", &inode, &dir.metadata()?.ino());
        Ok(())
    }))
}

fn cgroup_file(_: &Stage) -> Result<Check> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let line = table.lines().find(|l| l.contains(" - cgroup2 "));
    let place = line.and_then(|l| l.split(' ').nth(4)).context("cgroup2")?;
    let path = format!("{place}/cgroup.procs");
    let file = File::options().read(true).write(true).open(&path)?;
    Ok(Box::new(move |f| {
        f.same(
            "inode",
            &fs::metadata(&path)?.ino(),
            &file.metadata()?.ino(),
        );
        let read = text(&file).is_ok();
        f.that("it can be read", read);
        Ok(())
    }))
}

const KINDS: [&str; 8] = ["mnt", "uts", "ipc", "net", "pid", "user", "cgroup", "time"];

fn namespaces(_: &Stage) -> Result<Check> {
    let open = |kind: &&str| File::open(format!("/proc/self/ns/{kind}"));
    let all = KINDS
        .iter()
        .map(open)
        .collect::<std::io::Result<Vec<_>>>()?;
    Ok(Box::new(move |f| {
        for (kind, file) in KINDS.iter().zip(&all) {
            let own = fs::metadata(format!("/proc/self/ns/{kind}"))?.ino();
            f.same(kind, &own, &file.metadata()?.ino());
        }
        f.that(
            "it can be entered",
            nix::sched::setns(&all[1], nix::sched::CloneFlags::CLONE_NEWUTS).is_ok(),
        );
        Ok(())
    }))
}

fn namespace_own(_: &Stage) -> Result<Check> {
    let member = Member::start("the enclosed process", || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS)?;
        nix::unistd::sethostname("enclosed")?;
        Ok(Box::new(|f: &mut Findings| {
            let name = nix::unistd::gethostname()?;
            f.same("its name", "enclosed", name.to_string_lossy().as_ref());
            Ok(())
        }) as Check)
    })?;
    let uts = File::open(format!("/proc/{}/ns/uts", member.pid))?;
    Ok(Box::new(move |f| {
        let theirs = fs::metadata(format!("/proc/{}/ns/uts", member.pid))?.ino();
        f.same("the same", &theirs, &uts.metadata()?.ino());
        let own = fs::metadata("/proc/self/ns/uts")?.ino();
        f.that("not our own", own != theirs);
        member.check(f)
    }))
}

fn lease(stage: &Stage) -> Result<Check> {
    let (a, b) = (stage.path("a"), stage.path("b"));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    let read = File::open(&a)?;
    let write = File::options().write(true).open(&b)?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.thread_block()?;
    let ask = |f: &File, cmd: i32, arg: i32| {
        // SAFETY: numbers only.
        unsafe { libc::fcntl(f.as_raw_fd(), cmd, arg) }
    };
    ensure!(ask(&read, F_SETLEASE, libc::F_RDLCK) == 0, "read lease");
    ensure!(ask(&write, F_SETLEASE, libc::F_WRLCK) == 0, "write lease");
    ensure!(ask(&write, F_SETSIG, libc::SIGUSR1) == 0, "signal");
    Ok(Box::new(move |f| {
        f.same("read", &libc::F_RDLCK, &ask(&read, F_GETLEASE, 0));
        f.same("write", &libc::F_WRLCK, &ask(&write, F_GETLEASE, 0));
        // An opener that does not wait breaks it, and its holder is told.
        let mut open = File::options();
        open.read(true).custom_flags(libc::O_NONBLOCK);
        let busy = open.open(&b).map(drop).map_err(|e| e.raw_os_error());
        f.same("an opener", &Err(Some(libc::EWOULDBLOCK)), &busy);
        f.same("told by", &Signal::SIGUSR1, &set.wait()?);
        ask(&write, F_SETLEASE, libc::F_UNLCK);
        let again = ask(&write, F_SETLEASE, libc::F_WRLCK);
        f.same("taken again", &0, &again);
        // Giving it up has reset the signal.
        ask(&write, F_SETSIG, libc::SIGUSR1);
        Ok(())
    }))
}

fn owners(_: &Stage) -> Result<Check> {
    const TID: i32 = 0;
    const GROUP: i32 = 2;
    let (one, _keep_one) = nix::unistd::pipe()?;
    let (two, _keep_two) = nix::unistd::pipe()?;
    let (three, _keep_three) = nix::unistd::pipe()?;
    let me = std::process::id() as i32;
    let set = |fd: &OwnedFd, owner: [i32; 2]| {
        // SAFETY: `struct f_owner_ex` is two ints, alive across the call.
        unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) }
    };
    let get = |fd: &OwnedFd| {
        let mut owner = [0; 2];
        // SAFETY: as above.
        unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) };
        owner
    };
    let group = nix::unistd::getpgrp().as_raw();
    ensure!(set(&one, [GROUP, group]) == 0, "group");
    ensure!(set(&two, [TID, sys::gettid()]) == 0, "thread");
    // SAFETY: numbers only.
    ensure!(unsafe { libc::fcntl(three.as_raw_fd(), libc::F_SETOWN, -group) } == 0);
    Ok(Box::new(move |f| {
        let _keep = (&_keep_one, &_keep_two, &_keep_three);
        f.same("group", &[GROUP, group], &get(&one));
        f.same("thread", &[TID, me], &get(&two));
        f.same("a negative number", &[GROUP, group], &get(&three));
        Ok(())
    }))
}

fn devices(_: &Stage) -> Result<Check> {
    let null = File::options().append(true).open("/dev/null")?;
    let mut kmsg = File::options();
    kmsg.read(true).custom_flags(libc::O_NONBLOCK);
    let kmsg = kmsg.open("/dev/kmsg").ok();
    let mut path = File::options();
    path.read(true).custom_flags(libc::O_PATH);
    let path = path
        .open("/dev/net/tun")
        .or_else(|_| path.open("/dev/full"))?;
    let zero = [File::open("/dev/zero")?, File::open("/dev/zero")?];
    let rdev = path.metadata()?.rdev();
    Ok(Box::new(move |f| {
        (&null).write_all(b"gone")?;
        let flags = fcntl(&null, FcntlArg::F_GETFL)?;
        f.that("appending", flags & libc::O_APPEND != 0);
        f.same("by path", &rdev, &path.metadata()?.rdev());
        for z in &zero {
            let mut bytes = [1; 8];
            (&mut &*z).read_exact(&mut bytes)?;
            f.same("zeros", &[0; 8], &bytes);
        }
        let _keep = &kmsg;
        Ok(())
    }))
}

fn proc_outside(stage: &Stage) -> Result<Check> {
    let pid = stranger_that_waits()?;
    let file = File::open(format!("/proc/{pid}/comm"))?;
    expect(stage, &file, "of a process outside")?;
    Ok(Box::new(move |f| {
        f.same("still readable", "program\n", text(&file)?.as_str());
        Ok(nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            Signal::SIGKILL,
        )?)
    }))
}

fn namespace_outside(stage: &Stage) -> Result<Check> {
    let own = File::open("/proc/self/ns/uts")?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS)?;
    let empty = File::open("/proc/self/ns/uts")?;
    nix::sched::setns(&own, nix::sched::CloneFlags::CLONE_NEWUTS)?;
    expect(stage, &empty, "no process of the service lives in that uts")?;
    Ok(Box::new(move |f| {
        let entered = nix::sched::setns(&empty, nix::sched::CloneFlags::CLONE_NEWUTS);
        f.same("it can be entered", &Ok(()), &entered);
        Ok(nix::sched::setns(
            &own,
            nix::sched::CloneFlags::CLONE_NEWUTS,
        )?)
    }))
}

fn block_device(stage: &Stage) -> Result<Check> {
    let path = stage.path("block");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    let loop0 = libc::makedev(7, 0);
    nix::sys::stat::mknod(&path, nix::sys::stat::SFlag::S_IFBLK, mode, loop0)?;
    let file = File::open(&path)
        .map_err(|e| crate::conformance::case::Unavailable::because(format!("loop device: {e}")))?;
    expect(stage, &file, "block 7:0")?;
    // SAFETY: a duplicate of ours, nobody else has it.
    let twin = unsafe { OwnedFd::from_raw_fd(libc::dup(file.as_raw_fd())) };
    Ok(Box::new(move |f| {
        f.same("its number", &loop0, &file.metadata()?.rdev());
        let _keep = &twin;
        Ok(())
    }))
}
