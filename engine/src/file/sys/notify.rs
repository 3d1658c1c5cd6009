//! Raw calls of inotify(7), fanotify(7) and file handles.

use std::ffi::{CString, c_int};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{done, owned};
use crate::sys::SysResult;

/// Bytes of the largest handle (`MAX_HANDLE_SZ`, linux/fcntl.h).
const MAX_HANDLE_BYTES: usize = 128;

/// Makes an inotify instance.
pub(crate) fn inotify_init() -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    owned("inotify_init1", "", r.into())
}

/// Watches the file behind one of our descriptors; gives the watch's number.
pub(crate) fn inotify_add_watch(
    instance: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    mask: u32,
) -> SysResult<i32> {
    let path = magic_link(target);
    // SAFETY: NUL-terminated path, alive across the call.
    let r = unsafe { libc::inotify_add_watch(instance.as_raw_fd(), path.as_ptr(), mask) };
    done("inotify_add_watch", format!("mask {mask:#x}"), r.into()).map(|r| r as i32)
}

/// Ends a watch.
pub(crate) fn inotify_rm_watch(instance: BorrowedFd<'_>, wd: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::inotify_rm_watch(instance.as_raw_fd(), wd) };
    done("inotify_rm_watch", wd, r.into()).map(drop)
}

/// Makes a fanotify group.
pub(crate) fn fanotify_init(flags: u32, event_flags: u32) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe {
        libc::syscall(
            libc::SYS_fanotify_init,
            flags | libc::FAN_CLOEXEC,
            event_flags,
        )
    };
    owned("fanotify_init", format!("flags {flags:#x}"), r)
}

/// Adds a mark to the file behind one of our descriptors, its mount or its
/// file system, as `flags` say.
pub(crate) fn fanotify_mark(
    group: BorrowedFd<'_>,
    flags: u32,
    mask: u64,
    target: BorrowedFd<'_>,
) -> SysResult<()> {
    let path = magic_link(target);
    // SAFETY: NUL-terminated path, alive across the call; the rest are numbers.
    let r = unsafe {
        libc::syscall(
            libc::SYS_fanotify_mark,
            group.as_raw_fd(),
            flags,
            mask,
            libc::AT_FDCWD,
            path.as_ptr(),
        )
    };
    done("fanotify_mark", format!("mask {mask:#x}"), r).map(drop)
}

/// Opens, as O_PATH, the file of a handle in the file system of the current
/// directory (open_by_handle_at(2)).
pub(crate) fn open_by_handle_here(kind: u32, handle: &[u8]) -> SysResult<OwnedFd> {
    #[repr(C)]
    struct FileHandle {
        bytes: u32,
        kind: c_int,
        handle: [u8; MAX_HANDLE_BYTES],
    }
    let mut h = FileHandle {
        bytes: handle.len() as u32,
        kind: kind as c_int,
        handle: [0; MAX_HANDLE_BYTES],
    };
    let Some(room) = h.handle.get_mut(..handle.len()) else {
        let on = format!("a handle of {} bytes", handle.len());
        return Err(crate::sys::SysError::new(
            "open_by_handle_at",
            on,
            nix::errno::Errno::EINVAL,
        ));
    };
    room.copy_from_slice(handle);
    // SAFETY: `h` is a file_handle followed by as many bytes as it says, alive
    // across the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            libc::AT_FDCWD,
            &raw mut h,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    owned("open_by_handle_at", format!("type {kind}"), r)
}

/// Gives the calling thread a working directory of its own, and goes there.
pub(crate) fn go_alone(dir: BorrowedFd<'_>) -> SysResult<()> {
    // SAFETY: numbers only; affects the calling thread alone.
    let r = unsafe { libc::unshare(libc::CLONE_FS) };
    done("unshare", "CLONE_FS", r.into())?;
    // SAFETY: numbers only.
    let r = unsafe { libc::fchdir(dir.as_raw_fd()) };
    done("fchdir", dir.as_raw_fd(), r.into()).map(drop)
}

fn magic_link(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("no NUL in it")
}
