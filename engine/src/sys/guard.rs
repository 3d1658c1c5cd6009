//! A promise kept even if this process is killed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

/// A child that writes a text into a file as soon as this process is gone, or
/// the value is dropped.
#[derive(Debug)]
pub struct Guard {
    child: nix::unistd::Pid,
    line: Option<OwnedFd>,
}

impl Guard {
    /// Starts the child.
    pub fn write_at_death(file: &Path, text: &str) -> io::Result<Self> {
        let path = CString::new(file.as_os_str().as_bytes())?;
        let (end, line) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: until it exits the child only makes system calls on memory
        // that was laid out before the fork, as signal-safety(7) asks for after
        // a fork of a process that may have threads.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                child,
                line: Some(line),
            }),
            ForkResult::Child => {
                // SAFETY: numbers and pointers to live memory; see above. The
                // session of its own keeps a terminal's signals away.
                unsafe {
                    libc::setsid();
                    libc::close(line.as_raw_fd());
                    let mut byte = 0u8;
                    while libc::read(end.as_raw_fd(), (&raw mut byte).cast(), 1) < 0
                        && *libc::__errno_location() == libc::EINTR
                    {}
                    let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                    libc::write(fd, text.as_ptr().cast(), text.len());
                    libc::_exit(0)
                }
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.line = None;
        // ECHILD: whoever ignores SIGCHLD has nothing to reap.
        let _ = waitpid(self.child, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_when_dropped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let guard = Guard::write_at_death(file.path(), "0").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"");
        drop(guard);
        assert_eq!(std::fs::read(file.path()).unwrap(), b"0");
    }
}
