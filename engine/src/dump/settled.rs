//! Work inside a running program that leaves no trace: whenever a task is let
//! go, even since we are killed, it goes its way back to what it was doing.
//!
//! ```text
//!  as it was ─► at its way back ─► our mapping, programs ─► at its way back ─► as it was
//!               (in the vDSO)  ◄── whoever lets go here ends up there ──
//! ```
//! The thread in which programs run holds the mapping: it would take it away. In
//! the moment in which it passes from one thread to another it would stay behind;
//! the next dump takes it away then.

use std::cell::RefCell;

use crate::memory::MemoryError;
use crate::memory::maps::Vma;
use crate::memory::pagemap::{PAGE, Pagemap};
use crate::memory::vdso::Vdso;
use crate::remote::{
    Arena, Footpath, Outcome, Program, RemoteError, SavedRegs, Tracee, left_behind,
};
use crate::sys::ptrace;
use crate::task::settle;
use crate::tree::Process;

/// Room for a program that takes mappings away.
const CLEANING_BYTES: u64 = 64 << 10;

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
}

/// The threads of a process that have not ended.
pub fn living(p: &Process) -> impl Iterator<Item = i32> {
    let tids = p.tids.iter().copied();
    tids.filter(|&t| t != p.pid || !p.leader_is_dead())
}

/// Brings all threads of a process out of its vDSO, and takes away what a killed
/// dump has left in it. Returns whether its mappings may have changed.
pub fn tidy(p: &Process, vmas: &[Vma]) -> Result<bool, RemoteError> {
    let Some(vdso) = Vdso::find(vmas) else {
        return Ok(false);
    };
    let text = Some((vdso.text.start, vdso.text.end));
    let mut changed = false;
    for tid in living(p) {
        changed |= settle::leave_vdso(tid, text)?;
    }
    Footpath::find(p.voice(), text)?;
    let old = left_behind(p.voice(), vmas);
    if let Some(tid) = living(p).next()
        && !old.is_empty()
    {
        let settled = Settled::new(tid, Some(&vdso))?;
        let workshop = Workshop::open(&settled, Some(&vdso), CLEANING_BYTES)?;
        let mut prog = Program::new();
        for (start, len) in old {
            let args = [start.into(), len.into()];
            prog.call(libc::SYS_munmap, "munmap of an arena left behind", &args);
        }
        workshop.run(&prog)?;
        changed = true;
    }
    Ok(changed)
}

/// A mapping of ours in a process in which programs run, gone when dropped.
pub struct Workshop<'a> {
    leader: &'a Settled,
    path: Footpath,
    arena: Arena,
    /// The thread that works for us.
    holder: RefCell<Option<SavedRegs>>,
}

impl<'a> Workshop<'a> {
    /// Maps `bytes` in the process of a settled leader.
    pub fn open(leader: &'a Settled, vdso: Option<&Vdso>, bytes: u64) -> Result<Self, RemoteError> {
        let tid = leader.tid;
        let path = Footpath::find(tid, vdso.map(|v| (v.text.start, v.text.end)))?;
        path.lay(&leader.saved, (0, bytes))?;
        leader.saved.depart(path.leave())?;
        let mut shop = Self {
            leader,
            path,
            arena: Arena {
                base: 0,
                len: bytes,
            },
            holder: RefCell::new(Some(leader.saved.clone())),
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let args = [0, bytes, rw as u64, flags as u64, u64::MAX, 0];
        let task = Tracee { tid };
        let base = task.call_at(path.call(), "mmap of our arena", libc::SYS_mmap, args)?;
        shop.arena.base = base as u64;
        path.lay(&leader.saved, (shop.arena.base, bytes))?;
        task.furnish_arena(path.call(), shop.arena)?;
        Ok(shop)
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
        self.pass_to(&thread.saved)?;
        let task = Tracee { tid: thread.tid };
        task.run_homeward(self.arena, program, self.path.leave())
    }

    /// Makes a thread the one that works for us.
    fn pass_to(&self, saved: &SavedRegs) -> Result<(), RemoteError> {
        let mut holder = self.holder.borrow_mut();
        if holder.as_ref().is_some_and(|h| h.tid() == saved.tid()) {
            return Ok(());
        }
        if let Some(before) = holder.take() {
            before.put_back()?;
        }
        self.path.lay(saved, (self.arena.base, self.arena.len))?;
        saved.depart(self.path.leave())?;
        *holder = Some(saved.clone());
        Ok(())
    }

    fn close(&self) -> Result<(), RemoteError> {
        if self.holder.borrow().is_none() {
            self.pass_to(&self.leader.saved)?;
        }
        if let Some(holder) = self.holder.take() {
            if self.arena.base != 0 {
                let task = Tracee { tid: holder.tid() };
                task.next_call(self.path.leave(), "munmap of our arena")?;
            }
            holder.put_back()?;
        }
        Ok(self.path.clear()?)
    }
}

impl Drop for Workshop<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::error!(pid = self.leader.tid, "our mapping stays behind: {e}");
        }
    }
}
