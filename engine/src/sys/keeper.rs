//! A process that does nothing but hold descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::unistd::{ForkResult, fork};

/// Starts a process that holds `held`, at the numbers they have here, until all
/// processes behind the pidfds `until` have ended. Returns its pid. It belongs
/// to nobody's session and goes on when we end.
pub fn hold(held: &[BorrowedFd<'_>], until: &[BorrowedFd<'_>]) -> io::Result<i32> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let raw = |fds: &[BorrowedFd<'_>]| fds.iter().map(|f| f.as_raw_fd()).collect::<Vec<_>>();
    let mut kept = [raw(held), raw(until), vec![0, 1, 2]].concat();
    kept.sort_unstable();
    kept.dedup();
    let event = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut waits: Vec<libc::pollfd> = raw(until).into_iter().map(event).collect();
    // SAFETY: until it exits the child only makes system calls on memory that
    // was laid out before the fork, as signal-safety(7) asks for after a fork
    // of a process that may have threads.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            // SAFETY: numbers and pointers to live memory; see above.
            unsafe {
                libc::setsid();
                libc::chdir(c"/".as_ptr());
                libc::prctl(libc::PR_SET_NAME, c"rcr-keeper".as_ptr());
                for n in 0..3 {
                    libc::dup2(null.as_raw_fd(), n);
                }
                let mut next = 0;
                for &fd in &kept {
                    if fd > next {
                        libc::close_range(next as u32, fd as u32 - 1, 0);
                    }
                    next = fd + 1;
                }
                libc::close_range(next as u32, u32::MAX, 0);
                let mut left = waits.len();
                while left > 0 {
                    let n = libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, -1);
                    if n < 0 && *libc::__errno_location() != libc::EINTR {
                        break;
                    }
                    for w in &mut waits {
                        if w.fd >= 0 && w.revents != 0 {
                            // Negative numbers are not looked at.
                            w.fd = -1;
                            left -= 1;
                        }
                    }
                }
                libc::_exit(0)
            }
        }
    }
}

/// Ends a process behind a pidfd (pidfd_send_signal(2)).
pub fn end(pidfd: BorrowedFd<'_>) -> super::SysResult<()> {
    let (fd, signal) = (pidfd.as_raw_fd(), libc::SIGKILL);
    // SAFETY: numbers, and no siginfo.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, 0, 0) };
    if r < 0 && nix::errno::Errno::last() != nix::errno::Errno::ESRCH {
        return Err(super::SysError::last("pidfd_send_signal", "keeper"));
    }
    Ok(())
}
