//! Processes: creation with a chosen pid, their memory, object identity.

use std::cmp::Ordering;
use std::ffi::c_void;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::{SysError, SysResult};

/// `struct clone_args` of clone3(2), linux/sched.h.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CloneArgs {
    /// `CLONE_*` flags.
    pub flags: u64,
    /// Where a pidfd is stored.
    pub pidfd: u64,
    /// Where the child's tid is stored in the child.
    pub child_tid: u64,
    /// Where the child's tid is stored in the parent.
    pub parent_tid: u64,
    /// Signal sent to the parent at exit.
    pub exit_signal: u64,
    /// Lowest byte of the stack.
    pub stack: u64,
    /// Its size.
    pub stack_size: u64,
    /// New TLS.
    pub tls: u64,
    /// Address of an array of wanted tids, innermost pid namespace first.
    pub set_tid: u64,
    /// Its length.
    pub set_tid_size: u64,
    /// File descriptor of a cgroup directory (`CLONE_INTO_CGROUP`).
    pub cgroup: u64,
}

/// Put the child into the cgroup of [`CloneArgs::cgroup`].
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// A new time namespace for children (unshare(2), clone3(2)).
pub const CLONE_NEWTIME: i32 = 0x80;

impl CloneArgs {
    /// The bytes of the struct, for use in a remote program.
    pub fn as_bytes(&self) -> [u8; 88] {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        let mut out = [0; 88];
        for (chunk, w) in out.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&w.to_ne_bytes());
        }
        out
    }
}

/// Makes a child that only waits to be traced, with the wanted ids, those of
/// the innermost PID namespace first; `flags` are `CLONE_NEW*`. It blocks every
/// signal, so that what is sent to its id waits for what becomes of it. It ends
/// when we do, or another process behind `lifeline`, a pidfd.
///
/// With `sibling` the child belongs to our own parent. The calling process
/// must have a single thread: the child is a fork of it.
pub fn spawn_waiting(
    set_tid: &[i32],
    flags: u64,
    cgroup: Option<RawFd>,
    sibling: bool,
    lifeline: BorrowedFd<'_>,
) -> SysResult<i32> {
    let mut args = CloneArgs {
        flags,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: set_tid.len() as u64,
        ..CloneArgs::default()
    };
    if sibling {
        args.flags |= libc::CLONE_PARENT as u64;
        args.exit_signal = 0;
    }
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd as u64;
    }
    let mask = swap_sigmask(!0)?;
    // SAFETY: `args` and `set_tid` live across the call. No CLONE_VM: the child
    // gets a copy of our memory and does nothing with it but wait.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    let made = match r {
        0 => {
            let mut end = libc::pollfd {
                fd: lifeline.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: a live pollfd; the process ends without running
            // destructors that are its parent's.
            unsafe {
                while libc::poll(&mut end, 1, -1) < 1 {}
                libc::_exit(1)
            }
        }
        r if r < 0 => Err(SysError::last("clone3", format!("pid {set_tid:?}"))),
        r => Ok(r as i32),
    };
    swap_sigmask(mask)?;
    made
}

/// Sets the signals that the calling thread blocks, those of the libc included;
/// gives those of before.
fn swap_sigmask(mask: u64) -> SysResult<u64> {
    let mut before = 0_u64;
    let (new, old) = (&raw const mask, &raw mut before);
    // SAFETY: both point to live masks of the eight bytes that are announced.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, new, old, 8) };
    match r {
        0 => Ok(before),
        _ => Err(SysError::last("rt_sigprocmask", "own thread")),
    }
}

/// Opens a pidfd (pidfd_open(2)).
pub fn pidfd_open(pid: i32) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if r < 0 {
        return Err(SysError::last("pidfd_open", format!("pid {pid}")));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(r as RawFd) })
}

/// Opens a pidfd for one thread (`PIDFD_THREAD`, Linux 6.9): its descriptors
/// can be taken even where the leader has ended.
pub fn pidfd_open_thread(tid: i32) -> SysResult<OwnedFd> {
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, PIDFD_THREAD) };
    if r < 0 {
        return Err(SysError::last("pidfd_open", format!("thread {tid}")));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(r as RawFd) })
}

/// A piece of another process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: usize,
}

/// IOV_MAX of process_vm_readv(2).
const IOV_MAX: usize = 1024;

fn transfer(
    pid: i32,
    local: *mut c_void,
    len: usize,
    spans: &[Span],
    write: bool,
) -> SysResult<()> {
    let call = if write {
        "process_vm_writev"
    } else {
        "process_vm_readv"
    };
    let mut done = 0usize;
    let mut rest: Vec<Span> = spans.iter().rev().copied().collect();
    while done < len {
        let remote: Vec<libc::iovec> = rest
            .iter()
            .rev()
            .take(IOV_MAX)
            .map(|s| libc::iovec {
                iov_base: s.start as *mut c_void,
                iov_len: s.len,
            })
            .collect();
        let want: usize = remote.iter().map(|v| v.iov_len).sum();
        let here = libc::iovec {
            // SAFETY: `done < len`, so the result stays inside the buffer.
            iov_base: unsafe { local.byte_add(done) },
            iov_len: want.min(len - done),
        };
        // SAFETY: `here` lies in the caller's buffer of `len` bytes; the remote
        // addresses are checked by the kernel against the other process.
        let n = unsafe {
            let (l, r, n) = (&raw const here, remote.as_ptr(), remote.len() as u64);
            if write {
                libc::process_vm_writev(pid, l, 1, r, n, 0)
            } else {
                libc::process_vm_readv(pid, l, 1, r, n, 0)
            }
        };
        if n <= 0 {
            let at = rest.last().map_or(0, |s| s.start);
            return Err(SysError::last(call, format!("pid {pid} at {at:#x}")));
        }
        done += n as usize;
        let mut left = n as usize;
        while left > 0 {
            let s = rest
                .last_mut()
                .expect("the kernel moved no more than was asked");
            let step = left.min(s.len);
            s.start += step as u64;
            s.len -= step;
            left -= step;
            if s.len == 0 {
                rest.pop();
            }
        }
    }
    Ok(())
}

/// Fills `buf` from the spans, one after the other (process_vm_readv(2)).
pub fn read_memory(pid: i32, spans: &[Span], buf: &mut [u8]) -> SysResult<()> {
    debug_assert_eq!(spans.iter().map(|s| s.len).sum::<usize>(), buf.len());
    transfer(pid, buf.as_mut_ptr().cast(), buf.len(), spans, false)
}

/// Writes `buf` into the spans, one after the other (process_vm_writev(2)).
pub fn write_memory(pid: i32, spans: &[Span], buf: &[u8]) -> SysResult<()> {
    debug_assert_eq!(spans.iter().map(|s| s.len).sum::<usize>(), buf.len());
    transfer(pid, buf.as_ptr().cast_mut().cast(), buf.len(), spans, true)
}

/// Writes pieces of memory, each to its address (process_vm_writev(2)).
pub fn write_parts(pid: i32, parts: &[(u64, &[u8])]) -> SysResult<()> {
    let mut rest = parts.iter().filter(|(_, bytes)| !bytes.is_empty());
    let mut batch: Vec<(u64, &[u8])> = Vec::with_capacity(IOV_MAX);
    loop {
        let room = IOV_MAX - batch.len();
        batch.extend(rest.by_ref().take(room));
        if batch.is_empty() {
            return Ok(());
        }
        let iovec = |base: *mut c_void, len| libc::iovec {
            iov_base: base,
            iov_len: len,
        };
        let local = |(_, b): &(u64, &[u8])| iovec(b.as_ptr().cast_mut().cast(), b.len());
        let remote = |(at, b): &(u64, &[u8])| iovec(*at as *mut c_void, b.len());
        let here: Vec<_> = batch.iter().map(local).collect();
        let there: Vec<_> = batch.iter().map(remote).collect();
        let count = batch.len() as u64;
        // SAFETY: the local pieces are live slices that are only read; the
        // remote addresses are checked by the kernel against the other process.
        let n =
            unsafe { libc::process_vm_writev(pid, here.as_ptr(), count, there.as_ptr(), count, 0) };
        if n <= 0 {
            let at = batch[0].0;
            return Err(SysError::last(
                "process_vm_writev",
                format!("pid {pid} at {at:#x}"),
            ));
        }
        let mut left = n as usize;
        let whole = batch.iter().take_while(|(_, b)| {
            let fits = b.len() <= left;
            left -= if fits { b.len() } else { 0 };
            fits
        });
        let whole = whole.count();
        batch.drain(..whole);
        if let Some((at, bytes)) = batch.first_mut() {
            *at += left as u64;
            *bytes = &bytes[left..];
        }
    }
}

/// What two tasks may share, for [`compare_object`] (`KCMP_*`, linux/kcmp.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// The address space.
    Vm = 1,
    /// The descriptor table.
    Files = 2,
    /// Working directory, root, umask.
    Fs = 3,
    /// Signal dispositions.
    Sighand = 4,
    /// System V semaphore undo list.
    Sysvsem = 6,
}

/// Orders two tasks by a kernel object of theirs; equal means they share it
/// (kcmp(2)).
pub fn compare_object(a: i32, b: i32, what: Shared) -> SysResult<Ordering> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) };
    match r {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(SysError::last("kcmp", format!("{a}, {b}"))),
    }
}

/// Address and length of a task's robust futex list (get_robust_list(2)).
pub fn robust_list(tid: i32) -> SysResult<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both pointers are live locals of the right size.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    if r < 0 {
        Err(SysError::last("get_robust_list", format!("task {tid}")))
    } else {
        Ok((head, len))
    }
}

/// Puts the calling process's future children into a new time namespace.
pub fn unshare_time() -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::unshare(CLONE_NEWTIME) };
    if r < 0 {
        Err(SysError::last("unshare(CLONE_NEWTIME)", "self"))
    } else {
        Ok(())
    }
}

/// Enters a namespace (setns(2)).
pub fn setns(fd: RawFd, kind: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::setns(fd, kind) };
    if r < 0 {
        Err(SysError::last("setns", format!("kind {kind:#x}")))
    } else {
        Ok(())
    }
}

/// Features with a large XSAVE state that this process may use
/// (`ARCH_GET_XCOMP_PERM`, Linux 5.16).
pub fn permitted_features() -> SysResult<u64> {
    const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
    let mut mask = 0u64;
    // SAFETY: `mask` is a live local of the size the call writes.
    let r = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &raw mut mask) };
    if r < 0 {
        Err(SysError::last("arch_prctl", "permitted features"))
    } else {
        Ok(mask)
    }
}

/// A task's core scheduling cookie (`PR_SCHED_CORE_GET`), 0 for none.
pub fn core_cookie(tid: i32) -> SysResult<u64> {
    const PR_SCHED_CORE: i32 = 62;
    let mut cookie = 0u64;
    // SAFETY: `cookie` is a live local of the size the call writes.
    let r = unsafe { libc::prctl(PR_SCHED_CORE, 0, tid, 0, &raw mut cookie) };
    if r < 0 {
        Err(SysError::last(
            "prctl(PR_SCHED_CORE)",
            format!("task {tid}"),
        ))
    } else {
        Ok(cookie)
    }
}

/// prctl(2) with an option that only reads and takes one number.
pub fn prctl_get(option: i32, which: i32) -> SysResult<i64> {
    // SAFETY: numbers only.
    let r = unsafe { libc::prctl(option, which, 0, 0, 0) };
    if r < 0 {
        Err(SysError::last("prctl", format!("option {option}")))
    } else {
        Ok(r.into())
    }
}

/// Sends a signal to one thread.
pub fn tgkill(pid: i32, tid: i32, signal: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if r < 0 {
        Err(SysError::last("tgkill", format!("task {tid}")))
    } else {
        Ok(())
    }
}

/// Sends a signal to one thread, whichever process it is of.
pub fn tkill(tid: i32, signal: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_tkill, tid, signal) };
    if r < 0 {
        Err(SysError::last("tkill", format!("task {tid}")))
    } else {
        Ok(())
    }
}

/// A clock's value in nanoseconds (clock_gettime(2)).
pub fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `ts` is a live local.
    let r = unsafe { libc::clock_gettime(clock, &mut ts) };
    assert_eq!(
        r,
        0,
        "the clocks used here exist on every kernel: {}",
        io::Error::last_os_error()
    );
    ts.tv_sec * 1_000_000_000 + ts.tv_nsec
}

/// An I/O priority (ioprio_get(2), `IOPRIO_WHO_PROCESS`).
pub fn ioprio_get(tid: i32) -> SysResult<i32> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) };
    if r < 0 {
        Err(SysError::last("ioprio_get", format!("task {tid}")))
    } else {
        Ok(r as i32)
    }
}

/// Sets an I/O priority (ioprio_set(2)).
pub fn ioprio_set(tid: i32, value: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid, value) };
    if r < 0 {
        Err(SysError::last("ioprio_set", format!("task {tid}")))
    } else {
        Ok(())
    }
}

/// `struct sched_attr` as far as every supported kernel knows it (48 bytes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedAttr {
    /// Size of this struct.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Static real-time priority.
    pub priority: u32,
    /// Deadline runtime, ns.
    pub runtime: u64,
    /// Deadline, ns.
    pub deadline: u64,
    /// Deadline period, ns.
    pub period: u64,
}

/// Reads scheduling attributes (sched_getattr(2)).
pub fn sched_getattr(tid: i32) -> SysResult<SchedAttr> {
    let mut a = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: `a` is a live local and its size is passed along.
    let r = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut a, size, 0) };
    if r < 0 {
        Err(SysError::last("sched_getattr", format!("task {tid}")))
    } else {
        Ok(a)
    }
}

/// Sets scheduling attributes (sched_setattr(2)).
pub fn sched_setattr(tid: i32, attr: &SchedAttr) -> SysResult<()> {
    let a = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        ..*attr
    };
    // SAFETY: `a` is a live local and carries its size.
    let r = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const a, 0) };
    if r < 0 {
        Err(SysError::last("sched_setattr", format!("task {tid}")))
    } else {
        Ok(())
    }
}
