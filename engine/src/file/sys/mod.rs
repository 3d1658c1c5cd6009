//! Raw calls on descriptors, with typed edges.

mod bpf;
mod notify;
mod pidfd;
mod socket;
mod tty;
mod uring;

use std::ffi::{CStr, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::sys::{SysError, SysResult};

pub(crate) use bpf::*;
pub(crate) use notify::*;
pub(crate) use pidfd::*;
pub(crate) use socket::*;
pub(crate) use tty::*;
pub(crate) use uring::*;

/// `TFD_IOC_SET_TICKS`: `_IOW('T', 0, u64)`, linux/timerfd.h.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
/// `KCMP_FILE` and `KCMP_EPOLL_TFD`, linux/kcmp.h.
const KCMP_FILE: c_int = 0;
const KCMP_EPOLL_TFD: c_int = 7;
/// `F_GETOWNER_UIDS`, linux/fcntl.h.
const F_GETOWNER_UIDS: c_int = 17;
const F_SETOWN_EX: c_int = 15;
const F_GETOWN_EX: c_int = 16;
const F_SETSIG: c_int = 10;
const F_GETSIG: c_int = 11;

fn owned(call: &'static str, on: impl ToString, r: i64) -> SysResult<OwnedFd> {
    if r < 0 {
        return Err(SysError::last(call, on));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(r as RawFd) })
}

fn done(call: &'static str, on: impl ToString, r: i64) -> SysResult<i64> {
    if r < 0 {
        Err(SysError::last(call, on))
    } else {
        Ok(r)
    }
}

/// A duplicate of another process's descriptor (pidfd_getfd(2)).
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned("pidfd_getfd", format!("fd {fd}"), r)
}

/// Orders two of our own descriptors by their open file descriptions.
pub(crate) fn kcmp_files(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> SysResult<std::cmp::Ordering> {
    let me = std::process::id();
    // SAFETY: numbers only.
    let r = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            me,
            me,
            KCMP_FILE,
            a.as_raw_fd(),
            b.as_raw_fd(),
        )
    };
    match done("kcmp", "two files", r)? {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 => Ok(std::cmp::Ordering::Greater),
        _ => Err(SysError::new("kcmp", "two files", Errno::EINVAL)),
    }
}

/// Whether our `file` is what our `epoll` watches as its `nth` entry of number `tfd`.
pub(crate) fn epoll_watches(
    epoll: BorrowedFd<'_>,
    tfd: u32,
    nth: u32,
    file: BorrowedFd<'_>,
) -> SysResult<bool> {
    // struct kcmp_epoll_slot: efd, tfd, toff.
    let slot: [u32; 3] = [epoll.as_raw_fd() as u32, tfd, nth];
    let me = std::process::id();
    // SAFETY: `slot` is the struct this kind of comparison reads, alive across the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            me,
            me,
            KCMP_EPOLL_TFD,
            file.as_raw_fd(),
            slot.as_ptr(),
        )
    };
    Ok(done("kcmp", format!("epoll target {tfd}"), r)? == 0)
}

/// How a path is resolved by [`openat2`].
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens `path` as if `root` were the root directory.
pub(crate) fn open_in_root(
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: c_int,
    mode: u32,
) -> SysResult<OwnedFd> {
    const RESOLVE_IN_ROOT: u64 = 0x10;
    let how = OpenHow {
        flags: (flags | libc::O_CLOEXEC) as u64,
        mode: mode.into(),
        resolve: RESOLVE_IN_ROOT,
    };
    // SAFETY: the path is NUL-terminated, `how` has the size given; both live across the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<OpenHow>(),
        )
    };
    owned("openat2", path.to_string_lossy(), r)
}

/// Opens the file behind one of our descriptors once more: a new description.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: c_int) -> SysResult<OwnedFd> {
    let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
    // SAFETY: NUL-terminated path, alive across the call.
    let r = unsafe {
        libc::open(
            path.as_ptr().cast(),
            flags & !libc::O_NOFOLLOW | libc::O_CLOEXEC,
        )
    };
    owned("open", &path[..path.len() - 1], r.into())
}

/// Status flags of a description (`F_GETFL`).
pub(crate) fn status_flags(fd: BorrowedFd<'_>) -> SysResult<c_int> {
    // SAFETY: numbers only.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    done("fcntl(F_GETFL)", fd.as_raw_fd(), r.into()).map(|r| r as c_int)
}

/// Sets the status flags that may be changed after opening (`F_SETFL`).
pub(crate) fn set_status_flags(fd: BorrowedFd<'_>, flags: c_int) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) };
    done("fcntl(F_SETFL)", format!("flags {flags:#o}"), r.into()).map(drop)
}

/// A `fcntl` that takes and gives a number.
pub(crate) fn fcntl_int(
    fd: BorrowedFd<'_>,
    call: &'static str,
    cmd: c_int,
    arg: c_int,
) -> SysResult<c_int> {
    // SAFETY: callers use this for commands with a number as argument only.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), cmd, arg) };
    done(call, fd.as_raw_fd(), r.into()).map(|r| r as c_int)
}

/// Who gets a description's SIGIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// 0: nobody.
    pub pid: i32,
    /// Signal instead of SIGIO, or 0.
    pub signal: i32,
    /// Credentials on whose behalf signals are sent.
    pub uid: u32,
    pub euid: u32,
}

/// Reads a description's owner.
pub(crate) fn owner(fd: BorrowedFd<'_>) -> SysResult<Owner> {
    let raw = fd.as_raw_fd();
    let mut ex = [0i32; 2];
    // SAFETY: `struct f_owner_ex` is two ints, alive across the call.
    let r = unsafe { libc::fcntl(raw, F_GETOWN_EX, ex.as_mut_ptr()) };
    done("fcntl(F_GETOWN_EX)", raw, r.into())?;
    // SAFETY: numbers only.
    let signal = unsafe { libc::fcntl(raw, F_GETSIG) };
    done("fcntl(F_GETSIG)", raw, signal.into())?;
    let mut uids = [0u32; 2];
    if ex[1] == 0 {
        // On nobody's behalf.
        return Ok(Owner {
            kind: ex[0],
            signal,
            ..Owner::default()
        });
    }
    // SAFETY: the call writes two uid_t, alive across the call.
    let r = unsafe { libc::fcntl(raw, F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    done("fcntl(F_GETOWNER_UIDS)", raw, r.into())?;
    Ok(Owner {
        kind: ex[0],
        pid: ex[1],
        signal,
        uid: uids[0],
        euid: uids[1],
    })
}

/// Numbers of the calls that set an owner, for remote programs: `F_SETOWN_EX`, `F_SETSIG`.
pub(crate) const SET_OWNER: (i32, i32) = (F_SETOWN_EX, F_SETSIG);

/// Sets a timerfd's expirations not yet read.
pub(crate) fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> SysResult<()> {
    // SAFETY: the ioctl reads one u64, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    done("ioctl(TFD_IOC_SET_TICKS)", ticks, r.into()).map(drop)
}

/// Makes a timerfd.
pub(crate) fn timerfd_create(clock: c_int) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) };
    owned("timerfd_create", format!("clock {clock}"), r.into())
}

/// Arms a timerfd. Times are `(seconds, nanoseconds)`.
pub(crate) fn timerfd_settime(
    fd: BorrowedFd<'_>,
    flags: c_int,
    value: (i64, i64),
    interval: (i64, i64),
) -> SysResult<()> {
    let spec = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: interval.0,
            tv_nsec: interval.1,
        },
        it_value: libc::timespec {
            tv_sec: value.0,
            tv_nsec: value.1,
        },
    };
    // SAFETY: `spec` lives across the call; no old value is asked for.
    let r = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &spec, std::ptr::null_mut()) };
    done("timerfd_settime", format!("{value:?}"), r.into()).map(drop)
}

/// Makes a signalfd for a 64-bit kernel mask.
pub(crate) fn signalfd(mask: u64) -> SysResult<OwnedFd> {
    // SAFETY: the mask is the kernel's 8-byte sigset, alive across the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    };
    owned("signalfd4", format!("mask {mask:#x}"), r)
}

/// Bytes waiting in a pipe or socket.
pub(crate) fn bytes_waiting(fd: BorrowedFd<'_>) -> SysResult<usize> {
    let mut n: c_int = 0;
    // SAFETY: the ioctl writes one int, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) };
    done("ioctl(FIONREAD)", fd.as_raw_fd(), r.into())?;
    Ok(n as usize)
}

/// Filesystem type magic of a file.
pub(crate) fn filesystem(fd: BorrowedFd<'_>) -> SysResult<i64> {
    let s = nix::sys::statfs::fstatfs(fd).map_err(|e| SysError::new("fstatfs", "fd", e))?;
    Ok(s.filesystem_type().0)
}

/// Lifts our own limit of open files to its maximum: every file of a tree is held at once.
pub(crate) fn raise_open_file_limit() -> SysResult<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let failed = |e| SysError::new("setrlimit", "RLIMIT_NOFILE", e);
    let max = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .unwrap_or(1 << 20);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    if soft >= max {
        return Ok(());
    }
    // Above the hard limit only root goes; without it, the hard limit is what there is.
    setrlimit(Resource::RLIMIT_NOFILE, max, max.max(hard))
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .map_err(failed)
}

/// Our duplicate of a descriptor of ours.
pub(crate) fn dup(fd: impl AsFd) -> SysResult<OwnedFd> {
    fd.as_fd().try_clone_to_owned().map_err(|e| {
        let errno = e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        SysError::new("fcntl(F_DUPFD_CLOEXEC)", fd.as_fd().as_raw_fd(), errno)
    })
}
