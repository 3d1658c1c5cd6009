//! Kernel calls about mounts and namespaces that no crate wraps.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Flags of a mount: `MOUNT_ATTR_*` of linux/mount.h.
pub(super) mod attr {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const ATIME_MASK: u64 = 0x70;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
    pub const ALL: u64 = RDONLY | NOSUID | NODEV | NOEXEC | ATIME_MASK | NODIRATIME | NOSYMFOLLOW;
}

/// Propagation types for [`mount_setattr`] (linux/mount.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Propagation {
    Unbindable = libc::MS_UNBINDABLE,
    Private = libc::MS_PRIVATE,
    Slave = libc::MS_SLAVE,
    Shared = libc::MS_SHARED,
}

/// Changes the mount that `fd` stands on the root of, and all below it if `recursive`.
///
/// mount_setattr(2), since 5.12.
pub(super) fn mount_setattr(
    fd: impl AsFd,
    recursive: bool,
    attrs: Option<u64>,
    propagation: Option<Propagation>,
) -> Result<(), Errno> {
    let attr = libc::mount_attr {
        attr_set: attrs.unwrap_or(0),
        attr_clr: if attrs.is_some() { attr::ALL } else { 0 },
        propagation: propagation.map_or(0, |p| p as u64),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a constant C string and `attr` is a live struct of the size given.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if r == 0 { Ok(()) } else { Err(last_errno()) }
}

/// `NS_GET_*` requests of ioctl_ns(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum NsRelation {
    /// The user namespace that owns this namespace.
    Owner = 0xb701,
    /// The parent of this user or PID namespace.
    Parent = 0xb702,
}

/// A descriptor of a related namespace.
///
/// EPERM if it lies outside of what the caller may see.
pub(super) fn ns_relative(ns: impl AsFd, relation: NsRelation) -> Result<OwnedFd, Errno> {
    // SAFETY: these requests take no argument and return a new descriptor.
    let fd = unsafe { libc::ioctl(ns.as_fd().as_raw_fd(), relation as u64 as _) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Uid (of the caller's user namespace) that made this user namespace.
pub(super) fn ns_owner_uid(ns: impl AsFd) -> Result<u32, Errno> {
    const NS_GET_OWNER_UID: u64 = 0xb704;
    let mut uid: libc::uid_t = 0;
    // SAFETY: the request writes one uid_t where the pointer says.
    let r = unsafe { libc::ioctl(ns.as_fd().as_raw_fd(), NS_GET_OWNER_UID as _, &mut uid) };
    if r < 0 { Err(last_errno()) } else { Ok(uid) }
}

/// A child process in a new user namespace, waiting to be killed.
///
/// The namespace's creator, in the host's eyes, is `owner_uid`.
pub(super) fn spawn_in_new_userns(owner_uid: u32, ready: &OwnedFd) -> Result<libc::pid_t, Errno> {
    let ready = ready.as_raw_fd();
    // SAFETY: the child of a threaded process may only make async-signal-safe calls:
    // it makes plain system calls on numbers, touches no lock and no heap, and never returns.
    unsafe {
        let pid = libc::fork();
        if pid != 0 {
            return if pid < 0 { Err(last_errno()) } else { Ok(pid) };
        }
        let mut status = 0_i32;
        if owner_uid != 0
            && libc::syscall(libc::SYS_setresuid, owner_uid, owner_uid, owner_uid) != 0
            || libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER) != 0
        {
            status = *libc::__errno_location();
        }
        // After the change of uid, which clears it.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::write(ready, (&raw const status).cast(), size_of::<i32>());
        loop {
            libc::pause();
        }
    }
}

/// Gives the calling thread namespaces of its own, and always its own root directory.
pub(super) fn unshare(kinds: UnshareFlags) -> Result<(), Errno> {
    let kinds = kinds.difference(UnshareFlags::FILES);
    // SAFETY: the descriptor table stays shared, so descriptors mean the same on all threads.
    unsafe { unshare_unsafe(kinds | UnshareFlags::FS) }
}

fn last_errno() -> Errno {
    // SAFETY: errno's location is always valid for the calling thread.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// getsockopt(2) for options that read the buffer before they fill it.
pub(super) fn socket_question(
    fd: impl AsFd,
    level: i32,
    name: i32,
    buffer: &mut [u8],
) -> Result<usize, Errno> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: buffer and length are alive across the call, and the length is the buffer's.
    let r = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            buffer.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if r == 0 {
        Ok(len as usize)
    } else {
        Err(last_errno())
    }
}

/// A child process that has entered a user namespace and made namespaces of
/// those kinds (`CLONE_NEW*`) in it, waiting to be killed.
pub(super) fn spawn_with_namespaces(
    user: impl AsFd,
    kinds: i32,
    ready: &OwnedFd,
) -> Result<libc::pid_t, Errno> {
    let (user, ready) = (user.as_fd().as_raw_fd(), ready.as_raw_fd());
    // SAFETY: as in `spawn_in_new_userns`: system calls on numbers alone.
    unsafe {
        let pid = libc::fork();
        if pid != 0 {
            return if pid < 0 { Err(last_errno()) } else { Ok(pid) };
        }
        let mut status = 0_i32;
        if libc::syscall(libc::SYS_setns, user, libc::CLONE_NEWUSER) != 0
            || libc::syscall(libc::SYS_unshare, kinds) != 0
        {
            status = *libc::__errno_location();
        }
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::write(ready, (&raw const status).cast(), size_of::<i32>());
        loop {
            libc::pause();
        }
    }
}
