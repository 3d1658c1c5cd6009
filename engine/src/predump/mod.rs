//! Pre-dump: memory written while its owners run, so that the dump has only
//! what they have changed since.
//!
//! ```text
//! freeze ─► watch, note what was written ─► thaw ─► write pages     (again and again)
//! freeze ─► dump::dump_onto: unchanged pages stay in the parent images
//! ```
//! The tree stands still only while its page tables are looked through. Images
//! refer to the ones before them as CRIU's do: a directory holds a symlink
//! `parent`, a pagemap entries that say that the pages are there.
//!
//! A page is taken from a parent only if its mapping has been watched without a
//! break since the page was read, and nobody has written to it. What is read
//! while the tree runs may be torn or of a new mapping: then it was written to
//! or is not watched, and the next generation has it again.

mod asleep;
mod dedup;
pub mod keeper;
mod live;
pub(crate) mod ranges;
mod tracking;

use std::ops::Range;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::clock::Clocks;
use crate::freeze::{FreezeError, freeze};
use crate::image::schema::InventoryEntry;
use crate::image::{ImageError, ImageSink, ImageSource, Kind, names, put_records};
use crate::memory::MemoryError;
use crate::memory::heritage::Owners;
use crate::memory::pages::{self, Runs};
use crate::namespace::NamespaceError;
use crate::namespace::pid::Numbering;
use crate::remote::RemoteError;
use crate::sys::SysError;
use crate::tree::{Process, Tree};

pub use dedup::dedup;
pub use keeper::{RcrTracking, take, tracked};
pub use tracking::Tracking;

/// Why a pre-dump failed. The tree runs on, and is no longer tracked.
#[derive(Debug, thiserror::Error)]
pub enum PreDumpError {
    /// The kernel cannot tell which pages were written to.
    #[error(
        "this kernel does not track writes: it needs Linux 6.7 with CONFIG_USERFAULTFD; dump without a pre-dump"
    )]
    Unsupported,
    /// A process could not be watched.
    #[error("process {pid}: its writes cannot be tracked")]
    Userfault {
        /// The process.
        pid: i32,
        /// The kernel's answer to userfaultfd(2).
        #[source]
        errno: Errno,
    },
    /// The process that should hold the tracking ended at once.
    #[error("the process that keeps the tracking (pid {pid}) has ended")]
    Keeper {
        /// Its pid.
        pid: i32,
    },
    /// The tracking began with other images than those given as parent.
    #[error("the parent images are not those the tracking began with")]
    Generation,
    /// A file of /proc could not be read.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The tree could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The processes' ids could not be told.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Memory could not be saved.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A remote program failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// An image could not be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl PreDumpError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What a generation of images refers to: the one before it.
pub struct Parent<'a> {
    /// Its images.
    pub images: &'a dyn ImageSource,
    /// What is known of writes since.
    pub tracking: Tracking,
}

/// How a pre-dump is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct PreDumpOptions {
    /// The tracking goes on when this program has ended: a small process keeps
    /// it, until the tree has ended or a further dump takes it over.
    pub keep: bool,
    /// Pages that several processes have in common since a fork are left to the
    /// one that has them first, as [`crate::dump::DumpOptions::pages_once`] does.
    pub pages_once: bool,
}

/// What a pre-dump did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PreDumpStats {
    /// Processes that are tracked.
    pub processes: usize,
    /// Bytes of page content written.
    pub page_bytes: u64,
    /// Bytes that stay in the parent.
    pub parent_bytes: u64,
    /// How long the tree stood still.
    pub frozen: Duration,
}

/// A process's pages as the freeze found them.
struct Pages {
    pid: i32,
    /// The process's id in images.
    id: i32,
    /// A living thread of it.
    voice: i32,
    written: Vec<Range<u64>>,
    unchanged: Vec<Range<u64>>,
    /// What another process has as well and saves.
    common: Vec<Range<u64>>,
}

/// Writes the memory of a running tree, and notes from now on what it writes.
pub fn pre_dump(
    tree: &Tree,
    parent: Option<Parent<'_>>,
    sink: &mut dyn ImageSink,
    options: PreDumpOptions,
) -> Result<(Tracking, PreDumpStats), PreDumpError> {
    let (images, mut tracking) = match parent {
        Some(p) => {
            p.tracking.belongs_to(p.images)?;
            (Some(p.images), p.tracking)
        }
        None => (None, Tracking::default()),
    };
    let clocks = Clocks::now();
    let frozen = freeze(tree)?;
    let start = Instant::now();
    let mut found = tracking.renew(&frozen)?;
    let numbering = Numbering::of(frozen.processes.iter().map(|p| &p.info))?;
    for p in &mut found {
        p.id = numbering.id(p.pid);
    }
    if options.pages_once && found.len() > 1 {
        leave_to_owners(&mut found)?;
    }
    frozen.thaw();
    let mut stats = PreDumpStats {
        processes: found.len(),
        frozen: start.elapsed(),
        ..PreDumpStats::default()
    };
    for (index, p) in found.iter().enumerate() {
        save(p, images, index as u32 + 1, sink, &mut stats)?;
    }
    let inventory = InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        lsmtype: Some(0),
        dump_uptime: Some((clocks.boottime / 1000) as u64),
        ..InventoryEntry::default()
    };
    put_records(sink, Kind::Inventory, names::INVENTORY, &[inventory])?;
    let record = tracking.record(options.keep)?;
    put_records(sink, Kind::RcrTasks, keeper::IMAGE, &[record])?;
    Ok((tracking, stats))
}

/// Finds what processes have in common. They must be stopped.
fn leave_to_owners(found: &mut [Pages]) -> Result<(), PreDumpError> {
    let mut owners = Owners::default();
    for p in found {
        let all = ranges::join(&p.written, &p.unchanged);
        let common = owners.look(p.pid, p.voice, &mut Runs::of(&all))?;
        for c in common {
            ranges::push(&mut p.common, c.range());
        }
    }
    Ok(())
}

fn save(
    p: &Pages,
    parent: Option<&dyn ImageSource>,
    pages_id: u32,
    sink: &mut dyn ImageSink,
    stats: &mut PreDumpStats,
) -> Result<(), PreDumpError> {
    let there = match parent {
        Some(source) => covered(source, p.id)?,
        None => Vec::new(),
    };
    let kept = ranges::both(&p.unchanged, &there);
    let fresh = ranges::join(&p.written, &ranges::without(&p.unchanged, &there));
    // What is in no generation is with the owner, or in the dump.
    let fresh = ranges::without(&fresh, &p.common);
    stats.parent_bytes += ranges::bytes(&kept);
    stats.page_bytes += live::save(p, &fresh, &kept, pages_id, sink)?;
    Ok(())
}

/// The pages of a process that images have, themselves or in their parents.
fn covered(images: &dyn ImageSource, id: i32) -> Result<Vec<Range<u64>>, PreDumpError> {
    let mut out = Vec::new();
    for range in pages::listed(images, &names::pagemap(id))? {
        ranges::push(&mut out, range);
    }
    Ok(out)
}

/// Pages of a process, `id` in images, that a dump may leave in its parent
/// images.
pub(crate) fn keep(
    parent: &Parent<'_>,
    p: &Process,
    id: i32,
) -> Result<Vec<Range<u64>>, PreDumpError> {
    let unchanged = parent.tracking.unchanged(p)?;
    if unchanged.is_empty() {
        return Ok(unchanged);
    }
    Ok(ranges::both(&unchanged, &covered(parent.images, id)?))
}
