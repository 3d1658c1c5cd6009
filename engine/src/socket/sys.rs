//! Raw calls on sockets, with typed edges.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::image::schema::SkUcredEntry;
use crate::sys::{SysError, SysResult};

/// `SIOCGSKNS`, linux/sockios.h: a descriptor of a socket's network namespace.
const SIOCGSKNS: u64 = 0x894c;
/// `SIOCOUTQNSD`, linux/sockios.h: bytes not sent yet.
const SIOCOUTQNSD: u64 = 0x894b;
/// asm-generic/sockios.h
const SIOCATMARK: u64 = 0x8905;

/// The network namespace of a socket.
pub(crate) fn socket_netns(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _, 0) };
    if r < 0 {
        return Err(SysError::last("ioctl(SIOCGSKNS)", fd.as_raw_fd()));
    }
    // SAFETY: just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

/// Whether the next byte of a stream is an urgent one (SIOCATMARK).
pub(crate) fn at_mark(fd: BorrowedFd<'_>) -> SysResult<bool> {
    Ok(count(fd, "ioctl(SIOCATMARK)", SIOCATMARK)? != 0)
}

fn count(fd: BorrowedFd<'_>, call: &'static str, request: u64) -> SysResult<u32> {
    let mut n: libc::c_int = 0;
    // SAFETY: the ioctl writes one int, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut n) };
    if r < 0 {
        return Err(SysError::last(call, fd.as_raw_fd()));
    }
    Ok(n as u32)
}

/// Bytes in a stream's send queue that the peer has not acknowledged.
pub(crate) fn bytes_unacknowledged(fd: BorrowedFd<'_>) -> SysResult<u32> {
    count(fd, "ioctl(SIOCOUTQ)", libc::TIOCOUTQ)
}

/// Bytes in a stream's send queue that were not sent yet.
pub(crate) fn bytes_unsent(fd: BorrowedFd<'_>) -> SysResult<u32> {
    count(fd, "ioctl(SIOCOUTQNSD)", SIOCOUTQNSD)
}

/// Receives with flags; the bytes that came.
pub(crate) fn receive_with(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> SysResult<usize> {
    // SAFETY: the buffer has the length given and lives across the call.
    let r = unsafe {
        libc::recv(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            flags,
        )
    };
    if r < 0 {
        return Err(SysError::last("recv", format!("{} bytes", buffer.len())));
    }
    Ok(r as usize)
}

/// Sends one packet to an address.
pub(crate) fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], address: &[u8]) -> SysResult<()> {
    // SAFETY: both slices live across the call and have the lengths given.
    let r = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    if r < 0 {
        return Err(SysError::last(
            "sendto",
            crate::file::sys::show_address(address),
        ));
    }
    Ok(())
}

/// Asks for an option whose value says what it is about.
pub(crate) fn option_about(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> SysResult<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the buffer has `len` bytes; the kernel reads and writes no more.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if r < 0 {
        let on = format!("level {level}, option {name}");
        return Err(SysError::last("getsockopt", on));
    }
    Ok(())
}

/// Runs `f` in a thread whose effective group is `gid`, and which ends with the call.
pub(crate) fn as_group<T: Send>(gid: u32, f: impl FnOnce() -> SysResult<T> + Send) -> SysResult<T> {
    std::thread::scope(|scope| {
        let work = || {
            // SAFETY: numbers only. The call itself, unlike the C library's
            // function, changes the group of this thread alone.
            let r = unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) };
            if r < 0 {
                return Err(SysError::last("setresgid", gid));
            }
            f()
        };
        let joined = scope.spawn(work).join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `f` in a thread with other effective ids and groups but all our
/// capabilities, which ends with the call.
pub(crate) fn as_ids<T: Send>(
    uid: u32,
    gid: u32,
    groups: &[u32],
    f: impl FnOnce() -> SysResult<T> + Send,
) -> SysResult<T> {
    const PR_SET_SECUREBITS: i32 = 28;
    // SECBIT_NO_SETUID_FIXUP
    const KEEP: i32 = 1 << 2;
    let become_it = || {
        let plain = uid == 0 && gid == 0;
        // SAFETY: numbers, and a list that lives across its call. The calls
        // themselves, unlike the C library's functions, change this thread alone.
        let r = unsafe {
            match plain || libc::syscall(libc::SYS_prctl, PR_SET_SECUREBITS, KEEP, 0, 0, 0) == 0 {
                false => -1,
                true => {
                    libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr())
                        | libc::syscall(libc::SYS_setresgid, -1, gid, -1)
                        | libc::syscall(libc::SYS_setresuid, -1, uid, -1)
                }
            }
        };
        match r {
            0 => Ok(()),
            _ => Err(SysError::last("setresuid", uid)),
        }
    };
    std::thread::scope(|scope| {
        let joined = scope.spawn(|| become_it().and_then(|()| f())).join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What comes along with a packet.
#[derive(Debug, Default)]
pub(crate) struct Ancillary {
    /// Descriptors, ours.
    pub files: Vec<OwnedFd>,
    /// The sender's ids.
    pub sender: Option<SkUcredEntry>,
    /// The sender's address, where it has a name.
    pub from: Option<Vec<u8>>,
    /// Messages of other levels: level, type, value.
    pub others: Vec<(i32, i32, Vec<u8>)>,
    /// To be sent with MSG_OOB.
    pub urgent: bool,
}

/// Room for control messages: descriptors (253 at most), credentials, a label.
const CONTROL_WORDS: usize = 512;

/// Looks at received data without taking it; `None` if there is none. How many
/// bytes were copied, and what came along.
pub(crate) fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> SysResult<Option<(usize, Ancillary)>> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut name = [0u8; size_of::<libc::sockaddr_storage>()];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_name = name.as_mut_ptr().cast();
    msg.msg_namelen = name.len() as libc::socklen_t;
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: all that `msg` points to lives across the call and has the sizes given.
    let r = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) };
    if r < 0 {
        let e = SysError::last("recvmsg", fd.as_raw_fd());
        return match e.errno {
            nix::errno::Errno::EAGAIN => Ok(None),
            _ => Err(e),
        };
    }
    let mut about = Ancillary::default();
    // SAFETY: the kernel filled `msg`; the macros walk inside msg_controllen.
    let mut c = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    while !c.is_null() {
        // SAFETY: non-null headers from the macros lie inside `control`.
        let head = unsafe { &*c };
        // SAFETY: as above; the data follows the header.
        let data: *const i32 = unsafe { libc::CMSG_DATA(c) }.cast();
        let words = (head.cmsg_len as usize - (data as usize - c as usize)) / size_of::<i32>();
        // SAFETY: the words lie inside `control`, which outlives them.
        let words = unsafe { std::slice::from_raw_parts(data, words) };
        match (head.cmsg_level, head.cmsg_type, words) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS, _) => {
                // SAFETY: the kernel installed these descriptors for us alone.
                let owned = words.iter().map(|&n| unsafe { OwnedFd::from_raw_fd(n) });
                about.files.extend(owned);
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &[pid, uid, gid]) => {
                about.sender = Some(SkUcredEntry {
                    uid: uid as u32,
                    gid: gid as u32,
                    pid: pid as u32,
                });
            }
            // A pidfd of the sender, made for us.
            (libc::SOL_SOCKET, SCM_PIDFD, &[n]) if n >= 0 => {
                // SAFETY: as with descriptors.
                drop(unsafe { OwnedFd::from_raw_fd(n) });
            }
            (libc::SOL_SOCKET, ..) => {}
            (level, kind, _) => {
                let bytes = head.cmsg_len as usize - (data as usize - c as usize);
                // SAFETY: as with the words.
                let value = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), bytes) };
                about.others.push((level, kind, value.to_vec()));
            }
        }
        // SAFETY: as above.
        c = unsafe { libc::CMSG_NXTHDR(&raw const msg, c) };
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        let e = nix::errno::Errno::EMSGSIZE;
        return Err(SysError::new("recvmsg", "control messages", e));
    }
    let len = msg.msg_namelen as usize;
    if len > 2 && len <= name.len() {
        about.from = Some(name[..len].to_vec());
    }
    Ok(Some((r as usize, about)))
}

/// `SCM_PIDFD`, linux/socket.h.
const SCM_PIDFD: i32 = 4;

/// Sends without waiting, with what goes along; how many bytes the socket took.
pub(crate) fn send_with(
    fd: BorrowedFd<'_>,
    data: &[u8],
    along: &Ancillary,
    to: Option<&[u8]>,
) -> SysResult<usize> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: an all-zero msghdr is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(to) = to {
        msg.msg_name = to.as_ptr().cast_mut().cast();
        msg.msg_namelen = to.len() as libc::socklen_t;
    }
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    let mut words = Vec::new();
    if let Some(s) = along.sender {
        let ids = [s.pid as i32, s.uid as i32, s.gid as i32];
        words.push((libc::SCM_CREDENTIALS, ids.to_vec()));
    }
    if !along.files.is_empty() {
        let numbers = along.files.iter().map(AsRawFd::as_raw_fd).collect();
        words.push((libc::SCM_RIGHTS, numbers));
    }
    let mut used = 0;
    for (kind, values) in &words {
        // struct cmsghdr: length, level, type; then the data, all padded to words.
        let len = 16 + 4 * values.len();
        control[used] = len as u64;
        control[used + 1] = u64::from(libc::SOL_SOCKET as u32) | (*kind as u64) << 32;
        for (i, v) in values.iter().enumerate() {
            control[used + 2 + i / 2] |= u64::from(*v as u32) << (32 * (i % 2));
        }
        used += len.div_ceil(8);
    }
    if used > 0 {
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = (8 * used) as _;
    }
    let mut flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    if along.urgent {
        flags |= libc::MSG_OOB;
    }
    // SAFETY: all that `msg` points to lives across the call and has the sizes given.
    let r = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const msg, flags) };
    if r < 0 {
        return Err(SysError::last("sendmsg", format!("{} bytes", data.len())));
    }
    Ok(r as usize)
}
