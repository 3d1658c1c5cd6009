//! Time namespaces looked at and made by short-lived children: setns(2) and
//! unshare(2) with `CLONE_NEWTIME` want a process with a single thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::process::CLONE_NEWTIME;

const OFFSETS: &std::ffi::CStr = c"/proc/self/timens_offsets";

/// What `/proc/self/timens_offsets` shows inside of a time namespace.
pub fn read_offsets(ns: BorrowedFd<'_>) -> io::Result<String> {
    let (mut end, child) = start(|line| {
        // SAFETY: numbers, and pointers to live memory of the child.
        unsafe {
            if libc::setns(ns.as_raw_fd(), CLONE_NEWTIME) != 0 {
                return false;
            }
            let fd = libc::open(OFFSETS.as_ptr(), libc::O_RDONLY);
            let mut buf = [0u8; 256];
            let n = libc::read(fd, buf.as_mut_ptr().cast(), buf.len());
            n > 0 && libc::write(line, buf.as_ptr().cast(), n as usize) == n
        }
    })?;
    let mut text = String::new();
    let read = end.read_to_string(&mut text);
    end_child(child)?;
    read?;
    Ok(text)
}

/// A new time namespace with these offsets, in which nobody is.
pub fn make(offsets: &str) -> io::Result<OwnedFd> {
    let (mut end, child) = start(|line| {
        // SAFETY: numbers, and pointers to live memory of the child; it waits
        // to be killed while its namespace is looked at.
        unsafe {
            if libc::unshare(CLONE_NEWTIME) != 0 {
                return false;
            }
            let fd = libc::open(OFFSETS.as_ptr(), libc::O_WRONLY);
            let n = libc::write(fd, offsets.as_ptr().cast(), offsets.len());
            if n != offsets.len() as isize || libc::write(line, c"+".as_ptr().cast(), 1) != 1 {
                return false;
            }
            libc::close(line);
            loop {
                libc::pause();
            }
        }
    })?;
    let mut word = String::new();
    let made = end.read_to_string(&mut word).and_then(|_| match &*word {
        "+" => File::open(format!("/proc/{child}/ns/time_for_children")),
        _ => Err(io::Error::other("a time namespace could not be made")),
    });
    let _ = kill(child, Signal::SIGKILL);
    // ECHILD: whoever ignores SIGCHLD has nothing to reap.
    let _ = waitpid(child, None);
    Ok(made?.into())
}

/// Starts a child that does `work` with the end of a pipe to write to.
fn start(work: impl FnOnce(i32) -> bool) -> io::Result<(File, Pid)> {
    let (end, line) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: the child makes system calls on memory laid out before the fork
    // and leaves, as signal-safety(7) asks for after a fork of a process that
    // may have threads.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let done = work(line.as_raw_fd());
            // SAFETY: leaves at once.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        ForkResult::Parent { child } => Ok((end.into(), child)),
    }
}

fn end_child(child: Pid) -> io::Result<()> {
    match waitpid(child, None) {
        Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) | Err(nix::errno::Errno::ECHILD) => Ok(()),
        other => Err(io::Error::other(format!("time namespace: {other:?}"))),
    }
}
