//! Brings a stopped thread to a point from which it can go on elsewhere.

use crate::arch::SYSCALL_INSN;
use crate::remote::RemoteError;
use crate::sys::SysResult;
use crate::sys::process::{Span, read_memory};
use crate::sys::ptrace::{self, Regs, RseqConfiguration, Stop};

/// A vDSO call takes some hundred instructions; a thread that does little else
/// is seldom met elsewhere.
const TRIES_MAX: usize = 100_000;

/// Lets the thread run on until it is out of the vDSO, whose text does not
/// survive as code. Returns whether it ran at all.
///
/// It makes no call outside of the vDSO. Single steps would do as well, but were
/// we killed between two of them, the thread would die of the next.
pub fn leave_vdso(tid: i32, vdso: Option<(u64, u64)>) -> Result<bool, RemoteError> {
    let Some((start, end)) = vdso else {
        return Ok(false);
    };
    let inside = |ip: u64| (start..end).contains(&ip);
    if !inside(ptrace::get_regs(tid)?.rip) {
        return Ok(false);
    }
    let mut signal = 0;
    for _ in 0..TRIES_MAX {
        ptrace::to_syscall(tid, signal)?;
        ptrace::interrupt(tid)?;
        signal = 0;
        let stop = match ptrace::wait(tid)? {
            Stop::Gone(status) => return Err(RemoteError::Gone { tid, status }),
            stop => stop,
        };
        let regs = ptrace::get_regs(tid)?;
        let at_call = stop == Stop::Signal(libc::SIGTRAP) && regs.orig_rax as i64 >= 0;
        match stop {
            Stop::Signal(_) if at_call && inside(regs.rip) => {}
            Stop::Signal(_) if at_call => {
                take_call_back(tid)?;
                return Ok(true);
            }
            // One that had been on its way takes its course.
            Stop::Signal(s) => signal = s,
            _ if !inside(regs.rip) => return Ok(true),
            _ => {}
        }
    }
    let stop = Stop::Stopped(libc::SIGTRAP);
    Err(RemoteError::Strayed {
        tid,
        ip: ptrace::get_regs(tid)?.rip,
        stop,
    })
}

/// A thread that stands at the entry of a call stands before it again.
fn take_call_back(tid: i32) -> Result<(), RemoteError> {
    let entered = ptrace::get_regs(tid)?;
    let none = Regs {
        orig_rax: u64::MAX,
        ..entered
    };
    ptrace::set_regs(tid, &none)?;
    loop {
        ptrace::to_syscall(tid, 0)?;
        match ptrace::wait(tid)? {
            Stop::Signal(libc::SIGTRAP) => break,
            // Our interrupt.
            Stop::Stopped(_) => {}
            Stop::Gone(status) => return Err(RemoteError::Gone { tid, status }),
            stop => {
                let ip = entered.rip;
                return Err(RemoteError::Strayed { tid, ip, stop });
            }
        }
    }
    let before = Regs {
        rip: entered.rip - SYSCALL_INSN.len() as u64,
        rax: entered.orig_rax,
        orig_rax: u64::MAX,
        ..entered
    };
    Ok(ptrace::set_regs(tid, &before)?)
}

/// A thread stopped inside an rseq critical section takes its abort path, as
/// after any preemption: the kernel forgets the section once the thread runs
/// something else (include/uapi/linux/rseq.h).
pub fn abort_rseq(tid: i32, rseq: &RseqConfiguration) -> SysResult<()> {
    if rseq.pointer == 0 {
        return Ok(());
    }
    let word = |at: u64| -> SysResult<u64> {
        let mut b = [0; 8];
        read_memory(tid, &[Span { start: at, len: 8 }], &mut b)?;
        Ok(u64::from_le_bytes(b))
    };
    let section = word(rseq.pointer + 8)?;
    if section == 0 {
        return Ok(());
    }
    let (start, len, abort) = (word(section + 8)?, word(section + 16)?, word(section + 24)?);
    let mut regs = ptrace::get_regs(tid)?;
    if regs.rip.wrapping_sub(start) < len {
        regs.rip = abort;
        regs.orig_rax = u64::MAX;
        ptrace::set_regs(tid, &regs)?;
    }
    Ok(())
}
