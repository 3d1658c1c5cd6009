//! What is known when all files were seen: which of them a ring refers to.

use std::collections::{BTreeMap, HashMap};

use super::record::{RcrRingFile, RcrRingThread};
use super::save::{Pointers, Rings};
use crate::file::error::{Stop, refuse};
use crate::file::examined::Saved;
use crate::file::identity::Descriptions;
use crate::sys::SysResult;
use crate::sys::kernel::Window;
use crate::tree::list_tids;

/// A process and a living thread of it.
type Holder = (i32, i32);

/// Addresses in the kernel of what processes of the tree have.
#[derive(Default)]
struct Known {
    /// Files, and their ids.
    files: HashMap<u64, u32>,
    /// What is behind them.
    behind: HashMap<u64, u32>,
    /// Threads.
    tasks: HashMap<u64, RcrRingThread>,
    /// Rings that threads have registered: address of the file.
    registered: Vec<(u64, RcrRingThread)>,
}

impl Rings {
    /// Finds the files and threads that rings refer to.
    pub(crate) fn settle(
        &self,
        window: Option<&Window>,
        files: &mut BTreeMap<u32, Saved>,
        descriptions: &Descriptions,
        holders: &[Holder],
    ) -> SysResult<Vec<(u32, Stop)>> {
        let Some(window) = window.filter(|_| !self.found.is_empty()) else {
            return Ok(Vec::new());
        };
        let known = look(window, descriptions, holders)?;
        let mut refusals = Vec::new();
        for (file, thread) in &known.registered {
            let id = known.files.get(file);
            let ring = id.and_then(|id| files.get_mut(id)?.extra.uring.as_mut());
            if let Some(ring) = ring {
                ring.registered.push(*thread);
                continue;
            }
            let any = self.found.keys().next().copied().unwrap_or(0);
            let reason = format!(
                "thread {} has one registered without a descriptor",
                thread.tid
            );
            let stop = refuse::<()>("io_uring", reason, "untag the unit");
            refusals.extend(stop.err().map(|s| (any, s)));
        }
        for (id, pointers) in &self.found {
            let Some(saved) = files.get_mut(id) else {
                continue;
            };
            let pids = descriptions.get(*id).map(|h| {
                let mut pids: Vec<i32> = h.slots.iter().map(|s| s.pid).collect();
                pids.dedup();
                pids.len()
            });
            if let Err(stop) = resolve(saved, pointers, &known, pids.unwrap_or(0)) {
                refusals.push((*id, stop));
            }
        }
        Ok(refusals)
    }
}

fn resolve(
    saved: &mut Saved,
    pointers: &Pointers,
    known: &Known,
    holders: usize,
) -> Result<(), Stop> {
    let Some(ring) = &mut saved.extra.uring else {
        return Ok(());
    };
    let advice = "turn io_uring off in the service's configuration, or untag the unit";
    for (slot, file) in &pointers.files {
        match known.files.get(file) {
            Some(&id) => ring.files.push(RcrRingFile { slot: *slot, id }),
            None => {
                let reason = format!("the file in its slot {slot} is open nowhere else");
                return refuse("io_uring", reason, advice);
            }
        }
    }
    if let Some(eventfd) = &pointers.eventfd {
        ring.eventfd = known.behind.get(eventfd).copied();
        if ring.eventfd.is_none() {
            let reason = "the eventfd registered with it is open nowhere else";
            return refuse("io_uring", reason, advice);
        }
    }
    if let Some(task) = &pointers.submitter {
        ring.submitter = known.tasks.get(task).copied();
        if ring.submitter.is_none() {
            let reason = "the thread that may use it has ended";
            return refuse("io_uring", reason, advice);
        }
    }
    if !ring.buffers.is_empty() && holders != 1 {
        let reason = "buffers are registered with it, and several processes have it";
        return refuse("io_uring", reason, advice);
    }
    Ok(())
}

fn look(window: &Window, descriptions: &Descriptions, holders: &[Holder]) -> SysResult<Known> {
    const SLOTS: usize = 16;
    let mut known = Known::default();
    for &(pid, voice) in holders {
        for f in window.files(voice)? {
            if let Some(held) = descriptions.at(pid, f.fd) {
                known.files.insert(f.file, held.id);
                known.behind.insert(f.private, held.id);
            }
        }
        // One that ends meanwhile has nothing.
        for tid in list_tids(pid).unwrap_or_default() {
            let Ok(at) = window.task(tid) else { continue };
            let thread = |index| RcrRingThread { pid, tid, index };
            known.tasks.insert(at, thread(0));
            let own = window.object("task_struct", at).number("io_uring")?;
            if own == 0 {
                continue;
            }
            let own = window.object("io_uring_task", own);
            let rings = own.bytes("registered_rings")?;
            for (index, word) in rings.chunks_exact(8).take(SLOTS).enumerate() {
                let file = u64::from_le_bytes(word.try_into().expect("8 bytes"));
                if file != 0 {
                    known.registered.push((file, thread(index as u32)));
                }
            }
        }
    }
    Ok(known)
}
