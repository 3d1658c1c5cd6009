//! Raw calls on descriptors, with typed edges.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::sys::{SysError, SysResult};

/// `TFD_IOC_SET_TICKS`: `_IOW('T', 0, u64)`, linux/timerfd.h.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
/// `SIOCUNIXFILE`, linux/un.h: an O_PATH descriptor of a bound unix socket's file.
const SIOCUNIXFILE: u64 = 0x89e0;
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

/// The file a unix socket is bound to, as an O_PATH descriptor.
pub(crate) fn unix_socket_file(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    owned("ioctl(SIOCUNIXFILE)", fd.as_raw_fd(), r.into())
}

/// A socket option's bytes, at most `max` of them.
pub(crate) fn socket_option(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    max: usize,
) -> SysResult<Vec<u8>> {
    let mut bytes = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    // SAFETY: the buffer has `len` bytes; the kernel writes no more and says how many.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    done(
        "getsockopt",
        format!("level {level}, option {name}"),
        r.into(),
    )?;
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// A socket option that is an int.
pub(crate) fn socket_option_int(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> SysResult<i32> {
    let b = socket_option(fd, level, name, 4)?;
    match b.as_slice() {
        // Some options write a single byte.
        [b] => Ok(i32::from(*b)),
        &[a, b, c, d] => Ok(i32::from_ne_bytes([a, b, c, d])),
        _ => Err(SysError::new(
            "getsockopt",
            format!("option {name}"),
            Errno::EINVAL,
        )),
    }
}

/// Sets a socket option.
pub(crate) fn set_socket_option(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    bytes: &[u8],
) -> SysResult<()> {
    // SAFETY: the kernel reads `bytes.len()` bytes of a live slice.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            bytes.as_ptr().cast(),
            bytes.len() as libc::socklen_t,
        )
    };
    done(
        "setsockopt",
        format!("level {level}, option {name}"),
        r.into(),
    )
    .map(drop)
}

/// Installs a classic BPF filter of 8-byte instructions.
pub(crate) fn attach_filter(fd: BorrowedFd<'_>, insns: &[u64]) -> SysResult<()> {
    let prog = libc::sock_fprog {
        len: insns.len() as u16,
        filter: insns.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `prog` and the instructions live across the call; the kernel only reads them.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const prog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    done("setsockopt(SO_ATTACH_FILTER)", insns.len(), r.into()).map(drop)
}

/// The classic BPF filter of a socket.
pub(crate) fn socket_filter(fd: BorrowedFd<'_>) -> SysResult<Vec<u64>> {
    let mut insns = vec![0u64; 4096]; // BPF_MAXINSNS
    let mut len = insns.len() as libc::socklen_t;
    // SAFETY: for this option the length counts instructions of 8 bytes, of which the
    // buffer has `len`.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            insns.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    done("getsockopt(SO_GET_FILTER)", "", r.into())?;
    insns.truncate(len as usize);
    Ok(insns)
}

/// Makes a socket.
pub(crate) fn socket(family: c_int, kind: c_int, protocol: c_int) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    owned(
        "socket",
        format!("family {family}, type {kind}, protocol {protocol}"),
        r.into(),
    )
}

/// Makes a pair of connected unix sockets.
pub(crate) fn socket_pair(kind: c_int) -> SysResult<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the call writes two ints, alive across the call.
    let r = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    done("socketpair", format!("type {kind}"), r.into())?;
    Ok((
        owned("socketpair", "", fds[0].into())?,
        owned("socketpair", "", fds[1].into())?,
    ))
}

type AddressCall = unsafe extern "C" fn(c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> c_int;

fn address(fd: BorrowedFd<'_>, call: &'static str, f: AddressCall) -> SysResult<Vec<u8>> {
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = bytes.len() as libc::socklen_t;
    // SAFETY: `f` is getsockname or getpeername; the buffer has `len` bytes.
    let r = unsafe { f(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) };
    done(call, fd.as_raw_fd(), r.into())?;
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// The raw address a socket is bound to (`sockaddr` with its family).
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> SysResult<Vec<u8>> {
    address(fd, "getsockname", libc::getsockname)
}

/// The raw address of a socket's peer, or `None` if it has none.
pub(crate) fn peer_address(fd: BorrowedFd<'_>) -> SysResult<Option<Vec<u8>>> {
    match address(fd, "getpeername", libc::getpeername) {
        Ok(a) => Ok(Some(a)),
        Err(e) if e.errno == Errno::ENOTCONN => Ok(None),
        Err(e) => Err(e),
    }
}

/// Binds a socket to a raw address.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> SysResult<()> {
    // SAFETY: the kernel reads `address.len()` bytes of a live slice.
    let r = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done("bind", show_address(address), r.into()).map(drop)
}

/// Connects a socket to a raw address.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> SysResult<()> {
    // SAFETY: the kernel reads `address.len()` bytes of a live slice.
    let r = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done("connect", show_address(address), r.into()).map(drop)
}

/// Makes a socket listen.
pub(crate) fn listen(fd: BorrowedFd<'_>, backlog: c_int) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::listen(fd.as_raw_fd(), backlog) };
    done("listen", format!("backlog {backlog}"), r.into()).map(drop)
}

/// Takes a connection from a listening socket.
pub(crate) fn accept(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: no address is asked for.
    let r = unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    owned("accept4", fd.as_raw_fd(), r.into())
}

/// Shuts a socket down; whether it was connected makes no difference.
///
/// The kernel marks an unconnected stream socket as shut down all the same and
/// then says ENOTCONN.
pub(crate) fn shutdown(fd: BorrowedFd<'_>, how: c_int) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::shutdown(fd.as_raw_fd(), how) };
    match done("shutdown", how, r.into()) {
        Err(e) if e.errno == Errno::ENOTCONN => Ok(()),
        other => other.map(drop),
    }
}

/// Sends bytes without waiting; says how many the socket took.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> SysResult<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes of a live slice.
    let r = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    done("send", format!("{} bytes", bytes.len()), r as i64).map(|n| n as usize)
}

/// One look into a socket's receive queue.
#[derive(Debug)]
pub(crate) struct Peeked {
    /// What was copied into the buffer.
    pub copied: usize,
    /// Descriptors or other ancillary data came along.
    pub ancillary: Option<i32>,
}

/// Looks at received data without taking it; `None` if there is none.
pub(crate) fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> SysResult<Option<Peeked>> {
    let mut control = [0u64; 128];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: all that `msg` points to lives across the call and has the sizes given.
    let r = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) };
    let copied = match done("recvmsg", fd.as_raw_fd(), r as i64) {
        Ok(n) => n as usize,
        Err(e) if e.errno == Errno::EAGAIN => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut ancillary = None;
    // SAFETY: the kernel filled `msg`; the macros walk inside msg_controllen.
    let mut c = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    while !c.is_null() {
        // SAFETY: non-null headers from the macros lie inside `control`.
        let head = unsafe { &*c };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the data of this header lies inside `control`, ints follow it.
            let data: *const c_void = unsafe { libc::CMSG_DATA(c) }.cast();
            let room = head.cmsg_len - (data as usize - c as usize);
            for i in 0..room / size_of::<RawFd>() {
                // SAFETY: the kernel installed these descriptors for us alone;
                // dropping closes them.
                drop(unsafe { OwnedFd::from_raw_fd(*data.cast::<RawFd>().add(i)) });
            }
        }
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type != libc::SCM_CREDENTIALS {
            ancillary = Some(head.cmsg_type);
        }
        // SAFETY: as above.
        c = unsafe { libc::CMSG_NXTHDR(&raw const msg, c) };
    }
    Ok(Some(Peeked { copied, ancillary }))
}

/// Whether a socket's peer sends nothing more, or it takes nothing more.
pub(crate) fn hung_up(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut one = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call; no waiting.
    let r = unsafe { libc::poll(&raw mut one, 1, 0) };
    done("poll", fd.as_raw_fd(), i64::from(r))?;
    Ok(one.revents & libc::POLLRDHUP != 0)
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

/// A raw address for messages.
pub(crate) fn show_address(address: &[u8]) -> String {
    let family = address
        .get(..2)
        .map(|b| i32::from(u16::from_ne_bytes([b[0], b[1]])));
    match (family, address.len()) {
        (Some(libc::AF_UNIX), 2) => "unnamed".into(),
        (Some(libc::AF_UNIX), _) if address[2] == 0 => {
            format!("@{}", String::from_utf8_lossy(&address[3..]))
        }
        (Some(libc::AF_UNIX), _) => String::from_utf8_lossy(&address[2..])
            .trim_end_matches('\0')
            .to_owned(),
        (Some(libc::AF_INET), 16..) => {
            let port = u16::from_be_bytes([address[2], address[3]]);
            let ip = std::net::Ipv4Addr::new(address[4], address[5], address[6], address[7]);
            format!("{ip}:{port}")
        }
        (Some(libc::AF_INET6), 24..) => {
            let port = u16::from_be_bytes([address[2], address[3]]);
            let ip: [u8; 16] = address[8..24].try_into().expect("16 bytes");
            format!("[{}]:{port}", std::net::Ipv6Addr::from(ip))
        }
        _ => format!("{address:02x?}"),
    }
}

/// Our duplicate of a descriptor of ours.
pub(crate) fn dup(fd: impl AsFd) -> SysResult<OwnedFd> {
    fd.as_fd().try_clone_to_owned().map_err(|e| {
        let errno = e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        SysError::new("fcntl(F_DUPFD_CLOEXEC)", fd.as_fd().as_raw_fd(), errno)
    })
}
