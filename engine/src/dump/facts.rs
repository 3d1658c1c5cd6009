//! What /proc and the scheduler tell of threads that stand still, asked by
//! several threads of ours at once.

use std::collections::HashMap;
use std::io;

use crate::ext::RcrThread;
use crate::freeze::Frozen;
use crate::image::schema::ThreadCoreEntry;
use crate::sys::parallel;
use crate::task::status::Status;
use crate::task::{knobs, sched};

/// Fewer threads than this for each are not worth one.
const SHARE_MIN: usize = 16;

/// What was told of one thread.
pub(super) struct Facts {
    pub status: Status,
    /// With the scheduling state, nothing else.
    pub core: ThreadCoreEntry,
    pub ext: RcrThread,
    pub seen: knobs::Seen,
}

/// Of all living threads, by their ids.
pub(super) type All = HashMap<i32, io::Result<Facts>>;

/// Asks about all living threads of a tree.
pub(super) fn gather(frozen: &Frozen) -> All {
    let live = frozen.processes.iter().filter(|p| !p.info.is_zombie());
    let threads = live.flat_map(|p| {
        let living = |t: &i32| *t != p.info.pid || !p.info.leader_is_dead();
        let tids = p.info.tids.iter().copied().filter(living);
        tids.map(|tid| (p.info.pid, tid))
    });
    let threads: Vec<(i32, i32)> = threads.collect();
    let told = parallel::map(&threads, SHARE_MIN, |&(pid, tid)| of_thread(pid, tid));
    threads.into_iter().map(|(_, tid)| tid).zip(told).collect()
}

fn of_thread(pid: i32, tid: i32) -> io::Result<Facts> {
    let mut core = ThreadCoreEntry::default();
    let mut ext = RcrThread::default();
    sched::save(pid, tid, &mut core, &mut ext)?;
    Ok(Facts {
        status: Status::read_thread(pid, tid)?,
        core,
        ext,
        seen: knobs::look(pid, tid)?,
    })
}
