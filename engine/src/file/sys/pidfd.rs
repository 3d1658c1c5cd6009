//! Raw calls on pidfds.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{done, owned};
use crate::sys::SysResult;

/// `PIDFD_THREAD`: linux/pidfd.h.
pub(crate) const PIDFD_THREAD: c_int = libc::O_EXCL;
/// `PIDFD_GET_INFO`: `_IOWR(0xFF, 11, struct pidfd_info)`, with the struct's
/// first 64 bytes, which every kernel that has the call knows.
const PIDFD_GET_INFO: u64 = 0xc040_ff0b;
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// Opens a pidfd with flags.
pub(crate) fn pidfd_open(pid: i32, flags: c_int) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    owned("pidfd_open", format!("pid {pid}"), r)
}

/// The wait status of a process that is gone, where the kernel keeps it
/// (Linux 6.15).
pub(crate) fn pidfd_exit_status(fd: BorrowedFd<'_>) -> Option<i32> {
    // struct pidfd_info: mask, cgroup id, eleven ids, exit code.
    let mut info = [0u64; 8];
    info[0] = PIDFD_INFO_EXIT;
    // SAFETY: the ioctl reads and writes the 64 bytes its number names, alive
    // across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    (r == 0 && info[0] & PIDFD_INFO_EXIT != 0).then_some((info[7] >> 32) as i32)
}

/// Pidfds, as many as `flags` has entries, of one process that has ended with
/// the given wait status and is gone.
///
/// The calling process must have a single thread: the process is a fork of it.
pub(crate) fn pidfds_of_the_dead(status: i32, flags: &[c_int]) -> SysResult<Vec<OwnedFd>> {
    with_a_dying_process(status, |child| {
        flags.iter().map(|&f| pidfd_open(child, f)).collect()
    })
}

/// What `take` makes of a process that ends with the given wait status and is
/// gone afterwards.
///
/// The calling process must have a single thread: the process is a fork of it.
pub(crate) fn with_a_dying_process<T>(
    status: i32,
    take: impl FnOnce(i32) -> SysResult<T>,
) -> SysResult<T> {
    // SAFETY: the child makes plain system calls only.
    let child = unsafe { libc::fork() };
    done("fork", "a process that ends at once", child.into())?;
    if child == 0 {
        let signal = status & 0x7f;
        if signal != 0 {
            // SAFETY: plain calls; no core is written, and nothing of ours runs
            // on after the signal.
            unsafe {
                let none = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                libc::signal(signal, libc::SIG_DFL);
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
                libc::kill(libc::getpid(), signal);
            }
        }
        // SAFETY: ends the child.
        unsafe { libc::_exit(status >> 8 & 0xff) };
    }
    let taken = take(child);
    // SAFETY: waits for the child made above.
    let r = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    done("waitpid", child, r.into())?;
    taken
}
