//! Work inside a running program that leaves no trace: registers, signal mask
//! and mappings are as before whenever nothing of ours runs, so a task goes on
//! unharmed even if we are killed.

use crate::arch;
use crate::memory::MemoryError;
use crate::memory::pagemap::{PAGE, Pagemap};
use crate::memory::vdso::Vdso;
use crate::remote::{Arena, Outcome, Program, RemoteError, SavedRegs, Tracee, find_syscall};
use crate::sys::process::{Span, write_memory};
use crate::sys::ptrace;
use crate::task::settle;

/// A thread brought to a stop from which it can go on anywhere.
pub struct Settled {
    pub tid: i32,
    pub saved: SavedRegs,
}

impl Settled {
    /// Settles a stopped thread.
    pub fn new(tid: i32, vdso: Option<&Vdso>) -> Result<Self, RemoteError> {
        settle::leave_vdso(tid, vdso.map(|v| (v.text.start, v.text.end)))?;
        settle::abort_rseq(tid, &ptrace::rseq_configuration(tid)?)?;
        Ok(Self {
            tid,
            saved: SavedRegs::take(tid)?,
        })
    }

    /// Works with the thread while every signal is blocked, so that none is
    /// consumed, and puts it back as it was.
    fn with<T>(
        &self,
        work: impl FnOnce(Tracee) -> Result<T, RemoteError>,
    ) -> Result<T, RemoteError> {
        self.saved.block_signals()?;
        let result = work(Tracee { tid: self.tid });
        self.saved.put_back()?;
        result
    }
}

/// A mapping of ours in a process in which programs run, gone when dropped.
pub struct Workshop<'a> {
    leader: &'a Settled,
    insn: u64,
    arena: Arena,
}

impl<'a> Workshop<'a> {
    /// Maps `bytes` in the process of a settled leader.
    pub fn open(leader: &'a Settled, vdso: Option<&Vdso>, bytes: u64) -> Result<Self, RemoteError> {
        let insn = find_syscall(leader.tid, vdso.map(|v| (v.text.start, v.text.end)))?;
        let arena = leader.with(|t| t.map_arena(insn, None, bytes))?;
        Ok(Self {
            leader,
            insn,
            arena,
        })
    }

    /// Whether the kernel has filled our mapping by itself, as it does for
    /// memory that is locked (mlockall(2)).
    pub fn is_populated(&self) -> Result<bool, MemoryError> {
        let last = self.arena.end() - PAGE..self.arena.end();
        let pagemap = Pagemap::open(self.leader.tid)
            .map_err(MemoryError::io(format!("pagemap of {}", self.leader.tid)))?;
        let there = pagemap.is_present(last);
        there.map_err(MemoryError::io("pagemap"))
    }

    /// Runs a program in the leader.
    pub fn run(&self, program: &Program) -> Result<Outcome, RemoteError> {
        self.run_in(self.leader, program)
    }

    /// Runs a program in any settled thread of the process.
    pub fn run_in(&self, thread: &Settled, program: &Program) -> Result<Outcome, RemoteError> {
        let at = self.arena.frame();
        let regs = arch::restart_syscall(thread.saved.regs());
        let xstate = ptrace::get_xstate(thread.tid)?;
        let frame = arch::return_frame(at, &regs, &xstate, thread.saved.sigmask());
        let frame = frame.ok_or(RemoteError::TooLarge {
            tid: thread.tid,
            need: xstate.len(),
            have: arch::FRAME_BYTES_MAX,
        })?;
        let span = Span {
            start: at,
            len: frame.len(),
        };
        write_memory(thread.tid, &[span], &frame)?;
        thread.with(|t| t.run(self.arena, program))
    }
}

impl Drop for Workshop<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.leader.with(|t| t.unmap_arena(self.insn, self.arena)) {
            tracing::error!(pid = self.leader.tid, "our mapping stays behind: {e}");
        }
    }
}
