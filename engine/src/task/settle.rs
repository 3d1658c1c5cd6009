//! Brings a stopped thread to a point from which it can go on elsewhere.

use crate::remote::RemoteError;
use crate::sys::SysResult;
use crate::sys::process::{Span, read_memory};
use crate::sys::ptrace::{self, RseqConfiguration, Stop};

/// A vDSO call takes some hundred instructions; one that waits for the time
/// keeper's sequence counter may repeat itself.
const STEPS_MAX: usize = 100_000;

/// Steps the thread out of the vDSO, whose text does not survive as code.
pub fn leave_vdso(tid: i32, vdso: Option<(u64, u64)>) -> Result<(), RemoteError> {
    let Some((start, end)) = vdso else {
        return Ok(());
    };
    for _ in 0..STEPS_MAX {
        let ip = ptrace::get_regs(tid)?.rip;
        if !(start..end).contains(&ip) {
            return Ok(());
        }
        ptrace::single_step(tid)?;
        match ptrace::wait(tid)? {
            Stop::Signal(libc::SIGTRAP) => {}
            Stop::Gone(status) => return Err(RemoteError::Gone { tid, status }),
            stop => return Err(RemoteError::Strayed { tid, ip, stop }),
        }
    }
    let stop = Stop::Signal(libc::SIGTRAP);
    Err(RemoteError::Strayed {
        tid,
        ip: ptrace::get_regs(tid)?.rip,
        stop,
    })
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
