//! Which pages were written to since somebody looked last.
//!
//! Each process gets a userfaultfd that it makes itself and does not keep; the
//! kernel then notes writes in the page tables. It counts only what lies in a
//! mapping that is still watched: what was mapped since, by whomever, is not,
//! nor is a process that was forked, executed something or took over a pid.

use std::cmp::Ordering;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::asleep::Sleepers;
use super::keeper::{self, RcrTracking};
use super::{Pages, PreDumpError};
use crate::clock::Clocks;
use crate::dump::{Settled, Workshop, open_voice};
use crate::file::sys::pidfd_getfd;
use crate::freeze::Frozen;
use crate::image::{ImageSource, Kind, get_records};
use crate::memory::layout::TASK_SIZE;
use crate::memory::maps::{self, Vma};
use crate::memory::vdso::Vdso;
use crate::memory::vma::{self, Class};
use crate::remote::Program;
use crate::sys::SysResult;
use crate::sys::pagemap::{self, Query, Region};
use crate::sys::process::{Shared, compare_object};
use crate::sys::userfault::{USER_MODE_ONLY, WriteWatch};
use crate::tree::Process;

/// Room for our programs in a process.
const ARENA_BYTES: u64 = 64 << 10;

/// Processes whose writes are noted. When it is dropped, the kernel forgets.
#[derive(Debug, Default)]
pub struct Tracking {
    pub(super) watches: BTreeMap<i32, WriteWatch>,
    /// Processes that share the memory of a watched one.
    pub(super) mates: BTreeSet<i32>,
    /// Sleeps that its stops interrupted.
    pub(crate) sleepers: Sleepers,
    /// Names the images it belongs to; anew each time writes are counted anew.
    pub(super) generation: u64,
}

impl Tracking {
    /// Whether a process's memory is tracked.
    pub fn has(&self, pid: i32) -> bool {
        self.watches.contains_key(&pid) || self.mates.contains(&pid)
    }

    /// Checks that writes have been counted since these images were made.
    pub(crate) fn belongs_to(&self, images: &dyn ImageSource) -> Result<(), PreDumpError> {
        let records: Vec<RcrTracking> = get_records(images, Kind::RcrTasks, keeper::IMAGE)?;
        match records.first() {
            Some(r) if r.generation == self.generation => Ok(()),
            _ => Err(PreDumpError::Generation),
        }
    }

    /// What belongs into the images that were made with it; with `keep` it
    /// outlives this program.
    pub fn record(&self, keep: bool) -> Result<RcrTracking, PreDumpError> {
        Ok(RcrTracking {
            generation: self.generation,
            keeper: keep.then(|| keeper::start(self)).transpose()?,
            sleepers: self.sleepers.records(),
        })
    }

    /// Watches the whole of a frozen tree and counts writes anew. What it finds
    /// belongs to the time before.
    pub(super) fn renew(&mut self, frozen: &Frozen) -> Result<Vec<Pages>, PreDumpError> {
        self.sleepers.note(frozen)?;
        self.extend(frozen)?;
        self.generation = Clocks::now().realtime as u64 ^ (u64::from(std::process::id()) << 40);
        let watched = frozen.processes.iter().map(|p| &p.info);
        let watched = watched.filter(|p| self.watches.contains_key(&p.pid));
        let look = |p: &Process| {
            Ok(Pages {
                pid: p.pid,
                id: p.pid,
                voice: p.voice(),
                unchanged: self.unchanged(p)?,
                written: self.take_written(p)?,
                common: Vec::new(),
            })
        };
        watched.map(look).collect()
    }

    /// Counts the writes of a frozen tree anew, after a dump whose images are
    /// to be the parent of further ones.
    pub fn start_over(&mut self, frozen: &Frozen) -> Result<(), PreDumpError> {
        self.renew(frozen).map(drop)
    }

    /// Watches everything in a frozen tree that is not watched yet. What cannot
    /// be watched is left alone: it is written whole by the dump.
    fn extend(&mut self, frozen: &Frozen) -> Result<(), PreDumpError> {
        let alive = frozen.processes.iter().map(|p| &p.info);
        let alive: Vec<_> = alive.filter(|p| !p.is_zombie()).collect();
        self.watches
            .retain(|pid, _| alive.iter().any(|p| p.pid == *pid));
        self.mates.clear();
        let mut seen: Vec<&Process> = Vec::new();
        for p in alive {
            let place = match search(p, &seen)? {
                Ok(_) => {
                    self.watches.remove(&p.pid);
                    self.mates.insert(p.pid);
                    continue;
                }
                Err(place) => place,
            };
            let what = format!("mappings of {}", p.pid);
            let vmas = maps::read(p.voice()).map_err(PreDumpError::io(what))?;
            if !may_be_watched(p, &vmas, self.watches.contains_key(&p.pid))? {
                self.watches.remove(&p.pid);
                continue;
            }
            // One that belongs to an address space of the past watches nothing.
            if !vmas.iter().any(|v| v.has(b"uw")) {
                self.watches.remove(&p.pid);
            }
            if let Entry::Vacant(entry) = self.watches.entry(p.pid) {
                let Some(watch) = make(p, &vmas)? else {
                    continue;
                };
                entry.insert(watch);
            }
            let watch = &self.watches[&p.pid];
            for v in vmas.iter().filter(|v| is_trackable(v) && !v.has(b"uw")) {
                watch.add(&(v.start..v.end))?;
            }
            seen.insert(place, p);
        }
        Ok(())
    }

    /// Pages of a process that were written to, and are counted anew from here
    /// on. The process must be stopped.
    fn take_written(&self, p: &Process) -> Result<Vec<Range<u64>>, PreDumpError> {
        let query = Query {
            all_of: pagemap::WATCHED | pagemap::WRITTEN,
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            none_of: pagemap::FILE | pagemap::ZERO,
            protect: true,
            ..Query::default()
        };
        find(p.voice(), query)
    }

    /// Pages of a process that were not written to since.
    pub(crate) fn unchanged(&self, p: &Process) -> Result<Vec<Range<u64>>, PreDumpError> {
        if !self.watches.contains_key(&p.pid) {
            return Ok(Vec::new());
        }
        let query = Query {
            all_of: pagemap::WATCHED,
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            none_of: pagemap::WRITTEN | pagemap::FILE | pagemap::ZERO,
            ..Query::default()
        };
        find(p.voice(), query)
    }
}

/// Looks for a process with the same memory in a list ordered by it; else says
/// where this one belongs.
fn search(p: &Process, sorted: &[&Process]) -> SysResult<Result<usize, usize>> {
    let mut failed = None;
    let found = sorted.binary_search_by(|other| {
        compare_object(other.voice(), p.voice(), Shared::Vm).unwrap_or_else(|e| {
            failed = Some(e);
            Ordering::Equal
        })
    });
    failed.map_or(Ok(found), Err)
}

fn find(pid: i32, query: Query) -> Result<Vec<Range<u64>>, PreDumpError> {
    let path = format!("/proc/{pid}/pagemap");
    let file = File::open(&path).map_err(PreDumpError::io(path))?;
    let scan = |query: Query| -> SysResult<Option<Vec<Range<u64>>>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        let note = |r: Region| match out.last_mut() {
            Some(last) if last.end == r.start => last.end = r.end,
            _ => out.push(r.start..r.end),
        };
        Ok(pagemap::scan(&file, (0, TASK_SIZE), query, note)?.then_some(out))
    };
    let without_guards = Query {
        none_of: query.none_of | pagemap::GUARD,
        ..query
    };
    let found = match scan(without_guards)? {
        Some(found) => Some(found),
        None => scan(query)?,
    };
    found.ok_or(PreDumpError::Unsupported)
}

/// Private anonymous memory. Everything else is small, or others may write to
/// it without a trace in these page tables.
fn is_trackable(v: &Vma) -> bool {
    let plain = matches!(vma::classify(v), Ok(Class::AnonPrivate));
    plain && !v.has(b"dp") && !v.has(b"ht")
}

/// A process is left alone where a userfaultfd of its own, or of somebody
/// else, is at work, and where devices may write to its memory at any time
/// without a fault: io_uring and kernel AIO keep pages for that.
fn may_be_watched(p: &Process, vmas: &[Vma], watched: bool) -> Result<bool, PreDumpError> {
    let foreign = |v: &Vma| v.has(b"um") || v.has(b"ui") || (v.has(b"uw") && !watched);
    let ring = |v: &Vma| v.name.starts_with(b"/[aio]") || v.name.starts_with(b"anon_inode:");
    if vmas.iter().any(|v| foreign(v) || ring(v)) {
        return Ok(false);
    }
    let dir = format!("/proc/{}/fd", p.voice());
    for entry in std::fs::read_dir(&dir).map_err(PreDumpError::io(&dir))? {
        let entry = entry.map_err(PreDumpError::io(&dir))?;
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        if target.starts_with("anon_inode:[io_uring]") || target.contains("[userfaultfd]") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Has a process make its userfaultfd and takes it away. `None`: it may not
/// open one more file.
fn make(p: &Process, vmas: &[Vma]) -> Result<Option<WriteWatch>, PreDumpError> {
    let pid = p.pid;
    let vdso = Vdso::find(vmas);
    let thread = Settled::new(p.voice(), vdso.as_ref())?;
    let workshop = Workshop::open(&thread, vdso.as_ref(), ARENA_BYTES)?;
    let mut prog = Program::new();
    let flags = libc::O_CLOEXEC | USER_MODE_ONLY;
    let op = prog.try_call(libc::SYS_userfaultfd, "watch for writes", &[flags.into()]);
    let number = workshop.run(&prog)?.result(op) as i32;
    if number < 0 {
        return match Errno::from_raw(-number) {
            Errno::ENOSYS | Errno::EINVAL => Err(PreDumpError::Unsupported),
            Errno::EMFILE | Errno::ENFILE => Ok(None),
            errno => Err(PreDumpError::Userfault { pid, errno }),
        };
    }
    let ours = open_voice(p).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), number));
    let mut prog = Program::new();
    prog.call(libc::SYS_close, "close it there", &[number.into()]);
    workshop.run(&prog)?;
    let watch = WriteWatch::new(ours?)?;
    Ok(Some(watch.ok_or(PreDumpError::Unsupported)?))
}
