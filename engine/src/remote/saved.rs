//! What a task was doing before it worked for us.

use super::tracee::RemoteError;
use crate::arch::{self, WayBack};
use crate::ext::RcrDispatch;
use crate::sys::SysResult;
use crate::sys::ptrace::{self, Regs};

/// Registers, signal mask and where system calls go, to be put back.
#[derive(Debug, Clone)]
pub struct SavedRegs {
    tid: i32,
    regs: Regs,
    sigmask: u64,
    dispatch: Option<RcrDispatch>,
}

impl SavedRegs {
    /// Remembers them.
    pub fn take(tid: i32) -> SysResult<Self> {
        Ok(Self {
            tid,
            regs: ptrace::get_regs(tid)?,
            sigmask: ptrace::get_sigmask(tid)?,
            dispatch: ptrace::syscall_dispatch(tid)?.filter(|d| d.mode != 0),
        })
    }

    /// The task.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Where its system calls go, unless to the kernel.
    pub fn dispatch(&self) -> Option<&RcrDispatch> {
        self.dispatch.as_ref()
    }

    /// The registers as they were.
    pub fn regs(&self) -> &Regs {
        &self.regs
    }

    /// The signal mask as it was.
    pub fn sigmask(&self) -> u64 {
        self.sigmask
    }

    /// Code by which the task comes back to all this by itself, without a
    /// mapping of ours (start, 0 for none, and length). A call that the kernel
    /// was to restart is made anew.
    pub(super) fn way_back(&self, mapping: (u64, u64)) -> Vec<u8> {
        let way = WayBack {
            mapping,
            regs: &arch::restart_syscall(&self.regs),
            sigmask: self.sigmask,
            dispatch: self.dispatch(),
        };
        way.to_bytes()
    }

    /// Makes the task ours: all signals are blocked and system calls go to the
    /// kernel. Its way back, which must lie at `leave`, comes first: it would
    /// put right what comes after.
    pub fn depart(&self, leave: u64) -> Result<(), RemoteError> {
        ptrace::set_regs(self.tid, &arch::point_at(&self.regs, leave, 0, 0))?;
        ptrace::set_sigmask(self.tid, arch::REMOTE_SIGMASK)?;
        if self.dispatch.is_some() {
            ptrace::set_syscall_dispatch(self.tid, &RcrDispatch::default())?;
        }
        Ok(())
    }

    /// Puts all back; the registers as soon as nothing else has to be put right.
    pub fn put_back(&self) -> SysResult<()> {
        ptrace::set_sigmask(self.tid, self.sigmask)?;
        ptrace::set_regs(self.tid, &self.regs)?;
        match &self.dispatch {
            Some(d) => ptrace::set_syscall_dispatch(self.tid, d),
            None => Ok(()),
        }
    }
}
