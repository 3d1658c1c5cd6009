//! What mappings have beyond CRIU's schema: `rcr-mm-PID.img`, where there is
//! anything to tell.

use super::MemoryError;
use super::maps::Vma;
use super::policy::{self, Policy};
use crate::image::{ImageSink, ImageSource, Kind, get_records, put_records};
use crate::remote::{OpId, Outcome, Program};

/// `mseal(2)` (Linux 6.10).
const SYS_MSEAL: i64 = 462;
const MADV_GUARD_INSTALL: i32 = 102;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

/// Once per address space.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrMm {
    /// Mappings with more than the schema tells.
    #[prost(message, repeated, tag = "1")]
    pub vmas: Vec<VmaExtra>,
    /// Flags of mlockall(2) for mappings to come, 0 for none.
    #[prost(int32, required, tag = "2")]
    pub lock_future: i32,
    /// KSM merges everything (`PR_SET_MEMORY_MERGE`, Linux 6.4).
    #[prost(bool, required, tag = "3")]
    pub merge_all: bool,
    /// Memory policies that are not the default one.
    #[prost(message, repeated, tag = "4")]
    pub policies: Vec<VmaPolicy>,
}

/// The memory policy of a range.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VmaPolicy {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// The policy.
    #[prost(message, required, tag = "3")]
    pub policy: Policy,
}

/// A range of one mapping.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct VmaExtra {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Locked pages are those that were touched (`MLOCK_ONFAULT`).
    #[prost(bool, required, tag = "3")]
    pub lock_on_fault: bool,
    /// Nothing may change it any more (mseal(2)).
    #[prost(bool, required, tag = "4")]
    pub sealed: bool,
}

fn image(pid: i32) -> String {
    format!("rcr-mm-{pid}.img")
}

impl RcrMm {
    /// What the list of mappings tells.
    pub fn of(vmas: &[Vma]) -> Self {
        let extra = |v: &Vma| VmaExtra {
            start: v.start,
            end: v.end,
            lock_on_fault: v.has(b"lf"),
            sealed: v.has(b"sl"),
        };
        let told = |e: &VmaExtra| e.lock_on_fault || e.sealed;
        Self {
            vmas: vmas.iter().map(extra).filter(told).collect(),
            ..Self::default()
        }
    }

    /// Writes what is not as usual.
    pub fn save(&self, pid: i32, sink: &mut dyn ImageSink) -> Result<(), MemoryError> {
        if *self == Self::default() {
            return Ok(());
        }
        let list = std::slice::from_ref(self);
        Ok(put_records(sink, Kind::RcrTasks, &image(pid), list)?)
    }

    /// Reads it back.
    pub fn load(source: &dyn ImageSource, pid: i32) -> Result<Self, MemoryError> {
        let mut list: Vec<Self> = get_records(source, Kind::RcrTasks, &image(pid))?;
        Ok(list.pop().unwrap_or_default())
    }

    /// Notes the memory policy of a range; ranges come ascending.
    pub fn note_policy(&mut self, start: u64, end: u64, policy: Policy) {
        match self.policies.last_mut() {
            Some(l) if l.end == start && l.policy == policy => l.end = end,
            _ => self.policies.push(VmaPolicy { start, end, policy }),
        }
    }

    /// Whether the pages of the mapping at `start` are locked as they come.
    pub fn locks_on_fault(&self, start: u64) -> bool {
        let n = self.vmas.partition_point(|v| v.end <= start);
        let found = self.vmas.get(n).filter(|v| v.start <= start);
        found.is_some_and(|v| v.lock_on_fault)
    }

    /// Adds what is to be done when nothing else changes the memory any more.
    pub fn restore(&self, p: &mut Program) {
        if self.merge_all {
            let args = [PR_SET_MEMORY_MERGE, 1, 0, 0, 0].map(Into::into);
            p.call(libc::SYS_prctl, "let KSM merge all", &args);
        }
        if self.lock_future != 0 {
            let args = [self.lock_future.into()];
            p.call(libc::SYS_mlockall, "lock mappings to come", &args);
        }
        for v in &self.policies {
            policy::restore_mapping(p, v);
        }
        for v in self.vmas.iter().filter(|v| v.sealed) {
            let args = [v.start.into(), (v.end - v.start).into(), 0.into()];
            p.call(SYS_MSEAL, format!("seal {:x}-{:x}", v.start, v.end), &args);
        }
    }
}

/// Adds the question whether KSM merges everything.
pub fn query(p: &mut Program) -> OpId {
    let args = [PR_GET_MEMORY_MERGE, 0, 0, 0, 0].map(Into::into);
    p.try_call(libc::SYS_prctl, "read the state of KSM", &args)
}

/// The answer to [`query`].
pub fn answer(out: &Outcome, asked: OpId) -> bool {
    out.result(asked) == 1
}

/// Adds the calls that make guard regions again.
pub fn install_guards(p: &mut Program, guards: impl Iterator<Item = (u64, u64)>) {
    for (start, end) in guards {
        let args = [
            start.into(),
            (end - start).into(),
            MADV_GUARD_INSTALL.into(),
        ];
        p.call(libc::SYS_madvise, format!("guard {start:x}-{end:x}"), &args);
    }
}
