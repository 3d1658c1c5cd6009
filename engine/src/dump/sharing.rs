//! Kernel objects that several processes share (`CLONE_VM` and its kin).

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::Refusal;
use crate::freeze::Frozen;
use crate::image::schema::TaskKobjIdsEntry;
use crate::sys::process::{Shared, compare_object};
use crate::sys::{SysError, SysResult};
use crate::tree::Process;

/// The kinds, in the order of [`Sharing::owners`], and how they are called.
const KINDS: [(Shared, &str); 4] = [
    (Shared::Vm, "address space (CLONE_VM)"),
    (Shared::Files, "descriptor table (CLONE_FILES)"),
    (Shared::Fs, "working directory (CLONE_FS)"),
    (Shared::Sighand, "signal dispositions (CLONE_SIGHAND)"),
];

/// Whose objects the processes of a tree use: their own, or those of the
/// first process that has the same.
pub struct Sharing {
    owners: [BTreeMap<i32, i32>; 4],
}

impl Sharing {
    /// Compares all living processes.
    pub fn find(frozen: &Frozen) -> SysResult<Self> {
        let live: Vec<&Process> = frozen
            .processes
            .iter()
            .map(|p| &p.info)
            .filter(|p| !p.is_zombie())
            .collect();
        let mut owners: [BTreeMap<i32, i32>; 4] = Default::default();
        for ((kind, _), owners) in KINDS.iter().zip(&mut owners) {
            *owners = groups(&live, *kind)?;
        }
        Ok(Self { owners })
    }

    fn owner(&self, kind: usize, pid: i32) -> i32 {
        self.owners[kind].get(&pid).copied().unwrap_or(pid)
    }

    /// Whether the address space of a process is saved with it.
    pub fn owns_memory(&self, pid: i32) -> bool {
        self.owner(0, pid) == pid
    }

    /// Whether the descriptor table of a process is saved with it.
    pub fn owns_files(&self, pid: i32) -> bool {
        self.owner(1, pid) == pid
    }

    /// Numbers the four objects of a process.
    ///
    /// `id` gives the images' numbers of processes.
    pub fn number(&self, pid: i32, ids: &mut TaskKobjIdsEntry, id: impl Fn(i32) -> i32) {
        let id = |kind| id(self.owner(kind, pid)) as u32;
        (ids.vm_id, ids.files_id) = (id(0), id(1));
        (ids.fs_id, ids.sighand_id) = (id(2), id(3));
    }

    /// Sharing that no birth makes again: who shares has to be made by its
    /// parent or by a brother that has all of the objects.
    pub fn refusals(&self, frozen: &Frozen, entered: impl Fn(i32) -> bool) -> Vec<Refusal> {
        let mut out = Vec::new();
        let all: Vec<&Process> = frozen.processes.iter().map(|p| &p.info).collect();
        for (at, p) in all.iter().enumerate().filter(|(_, p)| !p.is_zombie()) {
            let shared: Vec<usize> = (0..KINDS.len())
                .filter(|&k| self.owner(k, p.pid) != p.pid)
                .collect();
            let Some(&first) = shared.first() else {
                continue;
            };
            let fits = |q: &&&Process| {
                let same = |&k: &usize| self.owner(k, q.pid) == self.owner(k, p.pid);
                let near = q.pid == p.ppid || q.ppid == p.ppid;
                !q.is_zombie() && near && shared.iter().all(same)
            };
            let mut refuse = |kind: usize, reason: String| {
                out.push(Refusal {
                    pid: p.pid,
                    comm: p.comm.clone(),
                    object: KINDS[kind].1.to_owned(),
                    reason,
                    advice: "untag the unit".into(),
                });
            };
            if !all[..at].iter().any(|q| fits(&q)) {
                let with = self.owner(first, p.pid);
                refuse(
                    first,
                    format!(
                        "it is shared with process {with}, which is neither parent nor brother"
                    ),
                );
            }
            if shared.contains(&2) && entered(p.pid) {
                let with = self.owner(2, p.pid);
                refuse(
                    2,
                    format!(
                        "it is shared with process {with} in a mount or user namespace of its own"
                    ),
                );
            }
        }
        out
    }
}

/// For each process the first one that has the same object.
fn groups(live: &[&Process], kind: Shared) -> SysResult<BTreeMap<i32, i32>> {
    let mut failed: Option<SysError> = None;
    let mut sorted = live.to_vec();
    // The sort is stable: of those that share, the first of the tree is first.
    sorted.sort_by(|a, b| {
        compare_object(a.voice(), b.voice(), kind).unwrap_or_else(|e| {
            failed = Some(e);
            Ordering::Equal
        })
    });
    if let Some(e) = failed {
        return Err(e);
    }
    let mut out = BTreeMap::new();
    let mut owner: Option<&Process> = None;
    for p in sorted {
        let first = match owner {
            Some(o) if compare_object(o.voice(), p.voice(), kind)? == Ordering::Equal => o,
            _ => p,
        };
        out.insert(p.pid, first.pid);
        owner = Some(first);
    }
    Ok(out)
}
