//! Sleeps that a stop of ours interrupted.
//!
//! A thread that sleeps until a timeout runs for a moment when it is let go, and
//! from then on the kernel tells that it has slept since that moment. So it is
//! noted here since when it really does.

use std::collections::BTreeMap;

use crate::freeze::Frozen;
use crate::sys::SysResult;
use crate::sys::ptrace::{self, Regs};

/// `ERESTART_RESTARTBLOCK` (linux/errno.h) as `rax` shows it.
const RESTART_BLOCK: i64 = -516;

/// A thread in a sleep that the kernel goes on with by itself.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Sleeper {
    /// The thread.
    #[prost(int32, required, tag = "1")]
    pub tid: i32,
    /// Since when, CLOCK_MONOTONIC, nanoseconds.
    #[prost(int64, required, tag = "2")]
    pub since_ns: i64,
    /// Instruction pointer, which with the rest tells whether it is still it.
    #[prost(uint64, required, tag = "3")]
    pub ip: u64,
    /// Stack pointer.
    #[prost(uint64, required, tag = "4")]
    pub sp: u64,
    /// First two arguments of its call.
    #[prost(uint64, required, tag = "5")]
    pub first: u64,
    /// See `first`.
    #[prost(uint64, required, tag = "6")]
    pub second: u64,
}

impl Sleeper {
    fn of(tid: i32, since_ns: i64, r: &Regs) -> Self {
        Self {
            tid,
            since_ns,
            ip: r.rip,
            sp: r.rsp,
            first: r.rdi,
            second: r.rsi,
        }
    }
}

/// Sleepers by thread id.
#[derive(Debug, Clone, Default)]
pub struct Sleepers(BTreeMap<i32, Sleeper>);

impl Sleepers {
    /// What images told.
    pub(super) fn from_records(records: &[Sleeper]) -> Self {
        Self(records.iter().map(|r| (r.tid, *r)).collect())
    }

    /// What images are told.
    pub(super) fn records(&self) -> Vec<Sleeper> {
        self.0.values().copied().collect()
    }

    /// Since when a stopped thread sleeps, if it is in the sleep noted here.
    pub(crate) fn since(&self, tid: i32, regs: &Regs) -> Option<i64> {
        let known = self.0.get(&tid)?;
        let continued = regs.orig_rax == libc::SYS_restart_syscall as u64;
        let same = *known == Sleeper::of(tid, known.since_ns, regs);
        (continued && same).then_some(known.since_ns)
    }

    /// Notes who sleeps in a frozen tree.
    pub(super) fn note(&mut self, frozen: &Frozen) -> SysResult<()> {
        let mut now = BTreeMap::new();
        for (tid, since) in frozen.naps.since() {
            let regs = ptrace::get_regs(tid)?;
            if regs.rax as i64 == RESTART_BLOCK {
                let since = self.since(tid, &regs).unwrap_or(since);
                now.insert(tid, Sleeper::of(tid, since, &regs));
            }
        }
        self.0 = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_is_known_while_it_is_the_same() {
        // SAFETY: plain integers; all-zero is valid.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        regs.rip = 0x1002;
        regs.rdi = 7;
        let sleepers = Sleepers::from_records(&[Sleeper::of(3, 35, &regs)]);
        assert_eq!(sleepers.since(3, &regs), None);
        regs.orig_rax = libc::SYS_restart_syscall as u64;
        assert_eq!(sleepers.since(3, &regs), Some(35));
        assert_eq!(sleepers.since(4, &regs), None);
        regs.rdi = 8;
        assert_eq!(sleepers.since(3, &regs), None);
    }
}
