//! pidfds: of the living, the ended and the gone.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::refusals::{expect, stranger_that_waits};
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("files/pidfd", "a pidfd of a child, shared with it", living),
    Case::new("files/pidfd-self", "a pidfd of oneself, not blocking", own),
    Case::new(
        "files/pidfd-zombie",
        "a pidfd of a child that has ended",
        zombie,
    ),
    Case::new("files/pidfd-dead", "pidfds of a process that is gone", dead),
    Case::new("files/pidfd-thread", "a pidfd of a thread", thread),
    Case::new(
        "refusals/pidfd-outside",
        "a pidfd of a process outside the tree",
        outside,
    )
    .refused(),
];

fn open(pid: i32, flags: i32) -> Result<OwnedFd> {
    let fd = sys::numbers(libc::SYS_pidfd_open, &[pid.into(), flags.into()])?;
    // SAFETY: the kernel has just returned it; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn signal(fd: &OwnedFd, signal: i32) -> std::result::Result<(), Option<i32>> {
    let args = [fd.as_raw_fd().into(), signal.into(), 0, 0];
    let sent = sys::numbers(libc::SYS_pidfd_send_signal, &args);
    sent.map(drop).map_err(|e| e.raw_os_error())
}

fn ended(fd: &OwnedFd) -> Result<bool> {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

fn pid_line(fd: &OwnedFd) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let line = text.lines().find(|l| l.starts_with("Pid:"));
    Ok(line
        .unwrap_or_default()
        .replace("Pid:", "")
        .trim()
        .to_owned())
}

fn living(_: &Stage) -> Result<Check> {
    let board = Map::forever(4096)?;
    let member = Member::start("the child", move || {
        Ok(Box::new(move |f: &mut Findings| {
            board
                .word(0)
                .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            f.that("it runs", true);
            Ok(())
        }) as Check)
    })?;
    let fd = open(member.pid, 0)?;
    let twin = nix::unistd::dup(&fd)?;
    Ok(Box::new(move |f| {
        f.same("its process", &member.pid.to_string(), &pid_line(&fd)?);
        f.same("it lives", &Ok(()), &signal(&fd, 0));
        f.that("it has not ended", !ended(&fd)?);
        f.same("by the duplicate", &Ok(()), &signal(&twin, 0));
        member.check(f)
    }))
}

fn own(_: &Stage) -> Result<Check> {
    let me = std::process::id() as i32;
    let fd = open(me, libc::O_NONBLOCK)?;
    Ok(Box::new(move |f| {
        f.same("its process", &me.to_string(), &pid_line(&fd)?);
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        f.that("does not block", flags & libc::O_NONBLOCK != 0);
        f.same("it lives", &Ok(()), &signal(&fd, 0));
        Ok(())
    }))
}

fn child_that_ends(code: i32) -> Result<i32> {
    // SAFETY: one thread.
    match unsafe { fork() }? {
        // SAFETY: leaves at once.
        ForkResult::Child => unsafe { libc::_exit(code) },
        ForkResult::Parent { child } => Ok(child.as_raw()),
    }
}

fn zombie(_: &Stage) -> Result<Check> {
    let make = || -> Result<(i32, OwnedFd)> {
        let pid = child_that_ends(5)?;
        let fd = open(pid, 0)?;
        while !ended(&fd)? {
            std::thread::sleep(crate::conformance::stage::POLL);
        }
        Ok((pid, fd))
    };
    let (mut pid, mut fd) = make()?;
    Ok(Box::new(move |f| {
        f.same("its process", &pid.to_string(), &pid_line(&fd)?);
        f.that("it has ended", ended(&fd)?);
        use std::os::fd::AsFd;
        let status = waitid(Id::PIDFd(fd.as_fd()), WaitPidFlag::WEXITED)?;
        f.same(
            "its end",
            &WaitStatus::Exited(Pid::from_raw(pid), 5),
            &status,
        );
        f.same("then it is gone", &Err(Some(libc::ESRCH)), &signal(&fd, 0));
        (pid, fd) = make()?;
        Ok(())
    }))
}

fn dead(_: &Stage) -> Result<Check> {
    let pid = child_that_ends(7)?;
    let (fd, again) = (open(pid, 0)?, open(pid, 0)?);
    waitpid(Pid::from_raw(pid), None)?;
    let killed = child_that_ends(0)?;
    let other = open(killed, 0)?;
    waitpid(Pid::from_raw(killed), None)?;
    let status = exit_status(&fd);
    Ok(Box::new(move |f| {
        for fd in [&fd, &again, &other] {
            f.same("its process", "-1", pid_line(fd)?.as_str());
            f.that("it has ended", ended(fd)?);
            f.same("signal", &Err(Some(libc::ESRCH)), &signal(fd, 0));
        }
        f.same("how it ended", &status, &exit_status(&fd));
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map(|s| s.st_ino);
        let told_apart = inode(&fd)?
            != inode(&std::os::fd::OwnedFd::from(
                nix::sys::eventfd::EventFd::new()?,
            ))?;
        if told_apart {
            f.same("one process", &inode(&fd)?, &inode(&again)?);
            f.that("another one", inode(&fd)? != inode(&other)?);
        }
        Ok(())
    }))
}

/// `PIDFD_GET_INFO` with `PIDFD_INFO_EXIT`, where the kernel has it.
fn exit_status(fd: &OwnedFd) -> Option<i32> {
    let mut info = [8_u64, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the ioctl's number says 64 bytes, which there are.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), 0xc040_ff0b, info.as_mut_ptr()) };
    (r == 0 && info[0] & 8 != 0).then_some((info[7] >> 32) as i32)
}

fn thread(_: &Stage) -> Result<Check> {
    let (say, tid) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = say.send(sys::gettid());
        loop {
            std::thread::park();
        }
    });
    let tid = tid.recv()?;
    let fd = open(tid, libc::O_EXCL)?;
    let twin = nix::unistd::dup(&fd)?;
    Ok(Box::new(move |f| {
        f.same("its thread", &tid.to_string(), &pid_line(&fd)?);
        f.same(
            "the same by its duplicate",
            &tid.to_string(),
            &pid_line(&twin)?,
        );
        f.that("it has not ended", !ended(&fd)?);
        f.same("it lives", &Ok(()), &signal(&fd, 0));
        Ok(())
    }))
}

fn outside(stage: &Stage) -> Result<Check> {
    let pid = stranger_that_waits()?;
    let fd = open(pid, 0)?;
    expect(stage, &fd, &format!("stands for process {pid} outside"))?;
    Ok(Box::new(move |f| {
        f.same("it still names it", &Ok(()), &signal(&fd, 0));
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => bail!("{e}"),
        }
    }))
}
