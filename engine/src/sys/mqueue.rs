//! POSIX message queues (mq_overview(7)), by the system calls themselves: names
//! are without a slash.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{SysError, SysResult};

/// Room of a queue, and what is in it (`struct mq_attr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Messages it has room for.
    pub messages_max: i64,
    /// Bytes of the longest message.
    pub bytes_max: i64,
    /// Messages in it.
    pub messages: i64,
}

fn owned(r: i64, name: &CStr) -> SysResult<OwnedFd> {
    if r < 0 {
        return Err(SysError::last("mq_open", name.to_string_lossy()));
    }
    // SAFETY: just given to us by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(r as i32) })
}

/// Opens a queue of the calling thread's IPC namespace.
pub fn open(name: &CStr, flags: i32) -> SysResult<OwnedFd> {
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: a string that lives across the call, and numbers.
    let r = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) };
    owned(r, name)
}

/// Makes a queue that must not be there yet; it never waits.
pub fn create(name: &CStr, mode: u32, room: &Attributes) -> SysResult<OwnedFd> {
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let attr: [i64; 8] = [0, room.messages_max, room.bytes_max, 0, 0, 0, 0, 0];
    // SAFETY: a string and a structure that live across the call, and numbers.
    let r = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, mode, attr.as_ptr()) };
    owned(r, name)
}

/// Takes a queue's name away.
pub fn unlink(name: &CStr) -> SysResult<()> {
    // SAFETY: a string that lives across the call.
    let r = unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    match r {
        0 => Ok(()),
        _ => Err(SysError::last("mq_unlink", name.to_string_lossy())),
    }
}

/// A queue's room and how much is in it.
pub fn attributes(queue: BorrowedFd<'_>) -> SysResult<Attributes> {
    let mut attr = [0_i64; 8];
    let (fd, new) = (queue.as_raw_fd(), 0);
    // SAFETY: the call fills the structure.
    let r = unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd, new, attr.as_mut_ptr()) };
    match r {
        0 => Ok(Attributes {
            messages_max: attr[1],
            bytes_max: attr[2],
            messages: attr[3],
        }),
        _ => Err(SysError::last("mq_getsetattr", fd)),
    }
}

/// Puts a message in.
pub fn send(queue: BorrowedFd<'_>, message: &[u8], priority: u32) -> SysResult<()> {
    let (fd, none) = (queue.as_raw_fd(), 0);
    let (at, len) = (message.as_ptr(), message.len());
    // SAFETY: the message lives across the call, which only reads it.
    let r = unsafe { libc::syscall(libc::SYS_mq_timedsend, fd, at, len, priority, none) };
    match r {
        0 => Ok(()),
        _ => Err(SysError::last("mq_timedsend", fd)),
    }
}
