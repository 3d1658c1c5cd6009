//! ptrace(2) requests used on stopped tasks.
//!
//! All requests must come from the thread that seized the task.

use std::cell::RefCell;
use std::mem::{size_of, zeroed};

use nix::errno::Errno;

use crate::ext::RcrDispatch;

use super::{SysError, SysResult};

/// General purpose registers of an x86-64 task (`struct user_regs_struct`).
pub type Regs = libc::user_regs_struct;

/// `PTRACE_O_SUSPEND_SECCOMP` (linux/ptrace.h); needs CAP_SYS_ADMIN.
pub const O_SUSPEND_SECCOMP: i32 = 1 << 21;
/// What a running program is worked with. Stops at calls carry a number that is
/// no signal (`PTRACE_O_TRACESYSGOOD`): a task whose tracer dies before it has
/// taken note of such a stop sends itself what it carries (ptrace_report_syscall
/// in the kernel), and would die of SIGTRAP.
pub const O_VISIT: i32 = O_SUSPEND_SECCOMP | libc::PTRACE_O_TRACESYSGOOD;
/// Stop and attach children made by fork, vfork and clone.
pub const O_TRACE_CHILDREN: i32 =
    libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE;

/// What a task is made with that is not complete before it is let go: should we
/// be killed, it ends (`PTRACE_O_EXITKILL`), and so do those it has made.
pub const O_RAISE: i32 = O_VISIT | O_TRACE_CHILDREN | libc::PTRACE_O_EXITKILL;

/// What `PTRACE_O_TRACESYSGOOD` adds to SIGTRAP.
const CALL_MARK: i32 = 0x80;

const GETSIGMASK: u32 = 0x420a;
const SETSIGMASK: u32 = 0x420b;
const PEEKSIGINFO: u32 = 0x4209;
const SECCOMP_GET_FILTER: u32 = 0x420c;
const SECCOMP_GET_METADATA: u32 = 0x420d;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const SET_SYSCALL_DISPATCH: u32 = 0x4210;
const GET_SYSCALL_DISPATCH: u32 = 0x4211;
const NT_X86_XSTATE: usize = 0x202;
const NT_PRSTATUS: usize = 1;

fn request(
    req: u32,
    name: &'static str,
    tid: i32,
    addr: usize,
    data: usize,
) -> SysResult<libc::c_long> {
    // SAFETY: every caller in this file passes, as `addr` and `data`, either
    // plain numbers or pointers to live local buffers of the size the request
    // documents; the kernel touches no other memory of ours.
    let r = unsafe { libc::syscall(libc::SYS_ptrace, req as libc::c_long, tid, addr, data) };
    if r < 0 {
        Err(SysError::last(name, format!("task {tid}")))
    } else {
        Ok(r)
    }
}

/// Attaches without stopping (`PTRACE_SEIZE`).
pub fn seize(tid: i32, options: i32) -> SysResult<()> {
    request(libc::PTRACE_SEIZE, "PTRACE_SEIZE", tid, 0, options as usize).map(drop)
}

/// Asks a seized task to stop (`PTRACE_INTERRUPT`).
pub fn interrupt(tid: i32) -> SysResult<()> {
    request(libc::PTRACE_INTERRUPT, "PTRACE_INTERRUPT", tid, 0, 0).map(drop)
}

/// Lets a stopped task run, delivering `signal` (0: none).
pub fn cont(tid: i32, signal: i32) -> SysResult<()> {
    request(libc::PTRACE_CONT, "PTRACE_CONT", tid, 0, signal as usize).map(drop)
}

/// Runs to the next entry or exit of a system call, delivering `signal` (0: none).
pub fn to_syscall(tid: i32, signal: i32) -> SysResult<()> {
    let signal = signal as usize;
    request(libc::PTRACE_SYSCALL, "PTRACE_SYSCALL", tid, 0, signal).map(drop)
}

/// Runs one instruction.
pub fn single_step(tid: i32) -> SysResult<()> {
    request(libc::PTRACE_SINGLESTEP, "PTRACE_SINGLESTEP", tid, 0, 0).map(drop)
}

/// Sets what a stopped task is traced with.
pub fn set_options(tid: i32, options: i32) -> SysResult<()> {
    let options = options as usize;
    request(
        libc::PTRACE_SETOPTIONS,
        "PTRACE_SETOPTIONS",
        tid,
        0,
        options,
    )
    .map(drop)
}

/// Ends tracing; the task goes on, with `signal` delivered (0: none).
pub fn detach(tid: i32, signal: i32) -> SysResult<()> {
    request(
        libc::PTRACE_DETACH,
        "PTRACE_DETACH",
        tid,
        0,
        signal as usize,
    )
    .map(drop)
}

/// Reads a message that came with a ptrace event (`PTRACE_GETEVENTMSG`).
pub fn event_message(tid: i32) -> SysResult<u64> {
    let mut v: libc::c_ulong = 0;
    request(
        libc::PTRACE_GETEVENTMSG,
        "PTRACE_GETEVENTMSG",
        tid,
        0,
        &raw mut v as usize,
    )?;
    Ok(v)
}

/// Reads the general purpose registers.
pub fn get_regs(tid: i32) -> SysResult<Regs> {
    // SAFETY: the struct is plain integers; all-zero is a valid value.
    let mut regs: Regs = unsafe { zeroed() };
    let iov = libc::iovec {
        iov_base: (&raw mut regs).cast(),
        iov_len: size_of::<Regs>(),
    };
    request(
        libc::PTRACE_GETREGSET,
        "PTRACE_GETREGSET(NT_PRSTATUS)",
        tid,
        NT_PRSTATUS,
        &raw const iov as usize,
    )?;
    Ok(regs)
}

/// Writes the general purpose registers.
pub fn set_regs(tid: i32, regs: &Regs) -> SysResult<()> {
    let iov = libc::iovec {
        iov_base: (&raw const *regs).cast_mut().cast(),
        iov_len: size_of::<Regs>(),
    };
    request(
        libc::PTRACE_SETREGSET,
        "PTRACE_SETREGSET(NT_PRSTATUS)",
        tid,
        NT_PRSTATUS,
        &raw const iov as usize,
    )
    .map(drop)
}

/// Reads the whole XSAVE area in the kernel's user layout (`NT_X86_XSTATE`).
pub fn get_xstate(tid: i32) -> SysResult<Vec<u8>> {
    thread_local! {
        // AMX makes the area about 11 KiB; the kernel writes no more than we offer.
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 64 << 10]);
    }
    BUFFER.with_borrow_mut(|buffer| {
        let mut iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        request(
            libc::PTRACE_GETREGSET,
            "PTRACE_GETREGSET(NT_X86_XSTATE)",
            tid,
            NT_X86_XSTATE,
            &raw mut iov as usize,
        )?;
        Ok(buffer[..iov.iov_len].to_vec())
    })
}

/// Writes the XSAVE area.
pub fn set_xstate(tid: i32, area: &[u8]) -> SysResult<()> {
    let iov = libc::iovec {
        iov_base: area.as_ptr().cast_mut().cast(),
        iov_len: area.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        "PTRACE_SETREGSET(NT_X86_XSTATE)",
        tid,
        NT_X86_XSTATE,
        &raw const iov as usize,
    )
    .map(drop)
}

/// Reads the blocked-signal mask.
pub fn get_sigmask(tid: i32) -> SysResult<u64> {
    let mut mask = 0u64;
    request(
        GETSIGMASK,
        "PTRACE_GETSIGMASK",
        tid,
        8,
        &raw mut mask as usize,
    )?;
    Ok(mask)
}

/// Writes the blocked-signal mask.
pub fn set_sigmask(tid: i32, mask: u64) -> SysResult<()> {
    request(
        SETSIGMASK,
        "PTRACE_SETSIGMASK",
        tid,
        8,
        &raw const mask as usize,
    )
    .map(drop)
}

/// A raw `siginfo_t`.
pub type RawSiginfo = [u8; 128];

/// What comes with the signal a task is about to get.
pub fn signal_info(tid: i32) -> SysResult<RawSiginfo> {
    let mut info = [0; 128];
    let at = info.as_mut_ptr() as usize;
    request(libc::PTRACE_GETSIGINFO, "PTRACE_GETSIGINFO", tid, 0, at)?;
    Ok(info)
}

/// Copies the pending signals, private to the thread or shared by the process.
pub fn peek_signals(tid: i32, shared: bool) -> SysResult<Vec<RawSiginfo>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut all = Vec::new();
    loop {
        let args = Args {
            off: all.len() as u64,
            flags: u32::from(shared),
            nr: 32,
        };
        let mut buf = [[0u8; 128]; 32];
        let n = request(
            PEEKSIGINFO,
            "PTRACE_PEEKSIGINFO",
            tid,
            &raw const args as usize,
            buf.as_mut_ptr() as usize,
        )?;
        if n == 0 {
            return Ok(all);
        }
        all.extend_from_slice(&buf[..n as usize]);
    }
}

/// A task's rseq registration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address of the area, 0 when none is registered.
    pub pointer: u64,
    /// Its registered size in bytes.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

/// Reads the rseq registration (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13).
pub fn rseq_configuration(tid: i32) -> SysResult<RseqConfiguration> {
    let mut c = RseqConfiguration::default();
    request(
        GET_RSEQ_CONFIGURATION,
        "PTRACE_GET_RSEQ_CONFIGURATION",
        tid,
        size_of::<RseqConfiguration>(),
        &raw mut c as usize,
    )?;
    Ok(c)
}

/// Reads where a task's system calls go (`PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG`,
/// Linux 6.4); `None` where the kernel cannot tell.
pub fn syscall_dispatch(tid: i32) -> SysResult<Option<RcrDispatch>> {
    let mut words = [0u64; 4];
    let got = request(
        GET_SYSCALL_DISPATCH,
        "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG",
        tid,
        size_of::<[u64; 4]>(),
        words.as_mut_ptr() as usize,
    );
    match got {
        Ok(_) => Ok(Some(RcrDispatch {
            mode: words[0],
            selector: words[1],
            offset: words[2],
            len: words[3],
        })),
        Err(e) if matches!(e.errno, Errno::EIO | Errno::EINVAL) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets where a task's system calls go.
pub fn set_syscall_dispatch(tid: i32, d: &RcrDispatch) -> SysResult<()> {
    let words = [d.mode, d.selector, d.offset, d.len];
    request(
        SET_SYSCALL_DISPATCH,
        "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG",
        tid,
        size_of::<[u64; 4]>(),
        words.as_ptr() as usize,
    )
    .map(drop)
}

/// The `index`-th seccomp filter, newest first: its instructions and flags.
///
/// `None` past the last one.
pub fn seccomp_filter(tid: i32, index: usize) -> SysResult<Option<(Vec<libc::sock_filter>, u64)>> {
    let n = match request(
        SECCOMP_GET_FILTER,
        "PTRACE_SECCOMP_GET_FILTER",
        tid,
        index,
        0,
    ) {
        Ok(n) => n as usize,
        Err(e) if e.errno == Errno::ENOENT => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut insns = vec![
        libc::sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0
        };
        n
    ];
    request(
        SECCOMP_GET_FILTER,
        "PTRACE_SECCOMP_GET_FILTER",
        tid,
        index,
        insns.as_mut_ptr() as usize,
    )?;
    let mut meta = [index as u64, 0u64];
    request(
        SECCOMP_GET_METADATA,
        "PTRACE_SECCOMP_GET_METADATA",
        tid,
        size_of::<[u64; 2]>(),
        meta.as_mut_ptr() as usize,
    )?;
    Ok(Some((insns, meta[1])))
}

/// How a traced task was found by [`wait`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It was about to get this signal; SIGTRAP also stands for the entry or exit
    /// of a system call.
    Signal(i32),
    /// A `PTRACE_EVENT_*` other than STOP.
    Event(i32),
    /// `PTRACE_EVENT_STOP`: our interrupt, a new task, or (signal other than
    /// SIGTRAP) a group stop.
    Stopped(i32),
    /// It ended with this wait status.
    Gone(i32),
}

/// Waits until the task stops or ends.
pub fn wait(tid: i32) -> SysResult<Stop> {
    loop {
        if let Some(stop) = wait_with(tid, 0)? {
            return Ok(stop);
        }
    }
}

/// Whether the task has stopped or ended.
pub fn try_wait(tid: i32) -> SysResult<Option<Stop>> {
    wait_with(tid, libc::WNOHANG)
}

fn wait_with(tid: i32, options: i32) -> SysResult<Option<Stop>> {
    let mut status = 0;
    // SAFETY: `status` is a live local; the call writes nothing else.
    let r = unsafe { libc::waitpid(tid, &mut status, libc::__WALL | options) };
    match r {
        0 => return Ok(None),
        r if r < 0 && Errno::last() == Errno::EINTR => return Ok(None),
        r if r < 0 => return Err(SysError::last("waitpid", format!("task {tid}"))),
        _ => {}
    }
    if !libc::WIFSTOPPED(status) {
        return Ok(Some(Stop::Gone(status)));
    }
    let signal = libc::WSTOPSIG(status);
    Ok(Some(match status >> 16 {
        0 => Stop::Signal(signal & !CALL_MARK),
        libc::PTRACE_EVENT_STOP => Stop::Stopped(signal),
        event => Stop::Event(event),
    }))
}
