//! Dump: a frozen tree into images.
//!
//! ```text
//! Frozen ─► namespaces ─► each process: threads, files, mappings, pages ─► shared objects ─► Dumped
//! ```
//! After success the images are whole and the tree is still frozen: the caller
//! thaws or kills it. After failure the tree is frozen as before, unharmed.

mod check;
mod facts;
mod hidden;
mod numbers;
mod pages;
mod process;
mod settled;
mod sharing;
mod thread;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::unistd::Pid;

use crate::Refusal;
use crate::clock::{Clocks, Offsets};
use crate::content::{self, ContentError};
use crate::ext::{self, RcrInventory};
use crate::file::{FileError, FilePolicy, FileSaver};
use crate::freeze::Frozen;
use crate::image::schema::{FdinfoEntry, InventoryEntry, PstreeEntry, TimensEntry, Timespec};
use crate::image::{ImageError, ImageSink, Kind, names, put_records};
use crate::memory::MemoryError;
use crate::memory::heritage::SharedPages;
use crate::memory::maps::{self, Vma};
use crate::memory::pages::Runs;
use crate::memory::shmem::Objects;
use crate::memory::sysv::Segments;
use crate::memory::vdso::Vdso;
use crate::namespace::pid::Numbering;
use crate::namespace::{self, MountPolicy, NamespaceError, NsIds, NsKind};
use crate::predump::{Parent, PreDumpError};
use crate::remote::RemoteError;
use crate::sys::{SysError, parallel};
use crate::task::nap::Naps;
use crate::task::seccomp::FilterTable;

use sharing::Sharing;

pub use check::{Checked, check, estimate_bytes, examine};
pub(crate) use process::open_voice;
pub(crate) use settled::{Settled, Workshop};

/// Name of the tree that holds [`DumpOptions::carry`].
pub(crate) const CARRIED: &str = "carried";

/// How a dump is made.
#[derive(Debug)]
pub struct DumpOptions {
    /// What happens with files that lead out of the tree.
    pub files: FilePolicy,
    /// What may be taken for granted about mounts.
    pub mounts: MountPolicy,
    /// Paths on the host whose content lives in RAM and goes along: runtime
    /// directories, pid files.
    pub carry: Vec<PathBuf>,
    /// Pages that several processes have in common since a fork are written
    /// once. CRIU cannot read such images, and says so; without this they are
    /// written with each of the processes, as it does.
    pub pages_once: bool,
    /// Pages of large private mappings are not written: whoever restores asks
    /// for them, and the tree has to stand until then.
    pub lazy: bool,
    /// Network namespaces come back with `lo` alone; whoever restores fills them.
    pub empty_net: bool,
    /// Network namespaces, by inode number, that are not saved; the restore
    /// gets others for them under these names.
    pub external_nets: BTreeMap<u64, String>,
    /// Processes whose writes a pre-dump of ours tracks: the userfaultfd that
    /// their mappings show is no obstacle.
    pub tracked: BTreeSet<i32>,
}

impl DumpOptions {
    /// Takes our own tracking out of what mappings show.
    fn leave_out_tracking(&self, pid: i32, vmas: &mut [Vma]) {
        if self.tracked.contains(&pid) {
            leave_out_tracking(vmas);
        }
    }
}

fn leave_out_tracking(vmas: &mut [Vma]) {
    for v in vmas {
        v.flags.retain(|f| f != b"uw");
    }
}

impl Default for DumpOptions {
    fn default() -> Self {
        Self {
            files: FilePolicy::frozen(),
            mounts: MountPolicy::default(),
            carry: Vec::new(),
            pages_once: false,
            lazy: false,
            empty_net: false,
            external_nets: BTreeMap::new(),
            tracked: BTreeSet::new(),
        }
    }
}

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Things that cannot be carried.
    #[error("{}", list(.0))]
    Refused(Vec<Refusal>),
    /// A file of /proc could not be read.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// An open file could not be saved.
    #[error(transparent)]
    File(#[from] FileError),
    /// Memory could not be saved.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A namespace could not be saved.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// What has changed since a pre-dump could not be found out.
    #[error(transparent)]
    PreDump(#[from] PreDumpError),
    /// Files in RAM could not be saved.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A remote program failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl DumpError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

fn list(refusals: &[Refusal]) -> String {
    refusals
        .iter()
        .map(Refusal::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

/// What a dump did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// Bytes of page content.
    pub page_bytes: u64,
    /// Bytes of page content that stay in the parent images.
    pub parent_bytes: u64,
    /// Descriptors that lead to the journal.
    pub journal: Vec<JournalStream>,
    /// Processes by their ids in the images.
    pub pids: BTreeMap<i32, i32>,
}

/// A descriptor connected to the journal (`/run/systemd/journal/stdout`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalStream {
    /// The process that holds it.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// The open file's id: equal for duplicates.
    pub file_id: u32,
}

/// Mappings with all of this in common are of one file, opened alike.
#[derive(Debug, PartialEq, Eq, Hash)]
struct MappedFile {
    /// Device and inode number, as the mappings show them.
    file: ((u32, u32), u64),
    name: Vec<u8>,
    flags: i32,
    mnt_ns: u32,
}

/// State of a dump in progress.
struct Dump<'a> {
    sink: &'a mut dyn ImageSink,
    sharing: Sharing,
    naps: &'a Naps,
    facts: facts::All,
    parent: Option<&'a Parent<'a>>,
    /// Offsets of the first process's time namespace.
    offsets: Offsets,
    /// That namespace, by its inode number.
    time_ns: u64,
    files: FileSaver,
    /// Files behind mappings, as their records are numbered.
    mapped: HashMap<MappedFile, u32>,
    filters: FilterTable,
    shared: Objects,
    segments: Segments,
    namespaces: numbers::Table,
    /// Ids as the images use them.
    numbering: Numbering,
    tables: Vec<(i32, Vec<FdinfoEntry>)>,
    next_pages_id: u32,
    stats: DumpStats,
}

/// A process that was looked at and whose threads can go on anywhere.
struct Ready {
    vmas: Vec<Vma>,
    threads: Vec<Settled>,
    /// The pages to save.
    runs: Runs,
    /// Those of them that an earlier process has as well.
    common: Vec<SharedPages>,
    /// Those of them that stay where they are.
    far: Vec<Range<u64>>,
}

/// Fewer processes than this for each are not worth a thread.
const PROCESSES_MIN: usize = 4;

/// Looks at all mappings, refuses what cannot be carried, and settles every
/// thread before any memory is read: leaving the vDSO runs code of the process.
fn settle(frozen: &Frozen, tracked: impl Fn(i32) -> bool) -> Result<Vec<Ready>, DumpError> {
    let mut refusals = Vec::new();
    let mut out: Vec<Ready> = Vec::new();
    let read = parallel::map(&frozen.processes, PROCESSES_MIN, |p| {
        match p.info.is_zombie() {
            true => Ok(Vec::new()),
            false => maps::read(p.info.voice()),
        }
    });
    for (p, vmas) in frozen.processes.iter().map(|p| &p.info).zip(read) {
        let what = || format!("mappings of {} (pid {})", p.comm, p.pid);
        let mut vmas = vmas.map_err(DumpError::io(what()))?;
        if !p.is_zombie() {
            if settled::tidy(p, &vmas)? {
                vmas = maps::read(p.voice()).map_err(DumpError::io(what()))?;
            }
            if tracked(p.pid) {
                leave_out_tracking(&mut vmas);
            }
            refusals.extend(check::process(p, &vmas)?);
        }
        out.push(Ready {
            vmas,
            threads: Vec::new(),
            runs: Runs::default(),
            common: Vec::new(),
            far: Vec::new(),
        });
    }
    if !refusals.is_empty() {
        return Err(DumpError::Refused(refusals));
    }
    for (p, ready) in frozen.processes.iter().zip(&mut out) {
        if p.info.is_zombie() {
            continue;
        }
        let vdso = Vdso::find(&ready.vmas);
        let living = settled::living(&p.info);
        ready.threads = living
            .map(|tid| Settled::new(tid, vdso.as_ref()))
            .collect::<Result<_, _>>()?;
    }
    Ok(out)
}

fn sharing_of(frozen: &Frozen) -> Result<Sharing, DumpError> {
    let sharing = Sharing::find(frozen)?;
    let host = NsIds::own()?;
    let mut entered = std::collections::BTreeSet::new();
    for p in frozen.processes.iter().map(|p| &p.info) {
        if !p.is_zombie() {
            let ids = NsIds::of(Pid::from_raw(p.voice()))?;
            if !ids.same(&host, NsKind::Mnt) || !ids.same(&host, NsKind::User) {
                entered.insert(p.pid);
            }
        }
    }
    let refusals = sharing.refusals(frozen, |pid| entered.contains(&pid));
    match refusals.is_empty() {
        true => Ok(sharing),
        false => Err(DumpError::Refused(refusals)),
    }
}

/// Saves a frozen tree.
pub fn dump(
    frozen: &Frozen,
    sink: &mut dyn ImageSink,
    options: &DumpOptions,
) -> Result<DumpStats, DumpError> {
    dump_whole(frozen, sink, options, None)
}

/// Saves a frozen tree; pages that have not changed since a pre-dump, or an
/// earlier dump, stay in its images. Those belong to the result for good: the
/// restoring source must give them below [`crate::image::PARENT_PREFIX`].
pub fn dump_onto(
    frozen: &Frozen,
    sink: &mut dyn ImageSink,
    options: &DumpOptions,
    parent: &Parent<'_>,
) -> Result<DumpStats, DumpError> {
    parent.tracking.belongs_to(parent.images)?;
    dump_whole(frozen, sink, options, Some(parent))
}

fn dump_whole(
    frozen: &Frozen,
    sink: &mut dyn ImageSink,
    options: &DumpOptions,
    parent: Option<&Parent<'_>>,
) -> Result<DumpStats, DumpError> {
    let clocks = Clocks::now();
    let _namespaces = NsIds::remember();
    let ours = |pid| options.tracked.contains(&pid) || parent.is_some_and(|p| p.tracking.has(pid));
    let mut settled = settle(frozen, ours)?;
    let sharing = sharing_of(frozen)?;
    pages::find(frozen, &sharing, &mut settled)?;
    if options.lazy && parent.is_none() {
        pages::leave(frozen, &mut settled);
    }
    let mut dump = Dump {
        sink,
        sharing,
        naps: &frozen.naps,
        facts: facts::gather(frozen),
        parent,
        offsets: offsets_of(frozen)?,
        time_ns: NsIds::of(first_voice(frozen))?.get(NsKind::Time),
        files: FileSaver::new(options.files)?,
        mapped: HashMap::new(),
        filters: FilterTable::default(),
        shared: Objects::default(),
        segments: Segments::default(),
        namespaces: numbers::Table::new()?,
        numbering: Numbering::of(frozen.processes.iter().map(|p| &p.info))?,
        tables: Vec::new(),
        next_pages_id: 1,
        stats: DumpStats::default(),
    };
    let mut tree = Vec::new();
    for (p, settled) in frozen.processes.iter().zip(settled) {
        dump.files.note_process(p.info.pid);
        dump.process(p, settled, options)?;
        dump.stats.processes += 1;
        dump.stats
            .pids
            .insert(dump.numbering.id(p.info.pid), p.info.pid);
        dump.stats.threads += p.info.tids.len();
        let number = |v: i32| dump.numbering.id(v) as u32;
        // A parent outside of the dump is none.
        let has_parent = frozen.processes.iter().any(|q| q.info.pid == p.info.ppid);
        tree.push(PstreeEntry {
            pid: number(p.info.pid),
            ppid: if has_parent { number(p.info.ppid) } else { 0 },
            pgid: number(p.info.pgid),
            sid: number(p.info.sid),
            threads: p.info.tids.iter().copied().map(number).collect(),
        });
    }
    let Dump {
        sink,
        sharing: _,
        naps: _,
        facts: _,
        parent: _,
        offsets: _,
        time_ns: _,
        mut files,
        mapped: _,
        filters,
        shared,
        segments,
        mut namespaces,
        numbering,
        tables,
        mut next_pages_id,
        mut stats,
    } = dump;
    files.settle()?;
    if !files.refusals().is_empty() {
        return Err(DumpError::Refused(files.refusals().to_vec()));
    }
    namespaces.save_nets(&mut files, options, sink)?;
    stats.page_bytes += shared.bytes()? as u64;
    shared.save(&mut next_pages_id, sink)?;
    segments.save(sink)?;
    let streams = files.journal_streams();
    for (pid, table) in &tables {
        let found = table.iter().filter(|e| streams.contains(&e.id));
        stats.journal.extend(found.map(|e| JournalStream {
            pid: *pid,
            fd: e.fd as i32,
            file_id: e.id,
        }));
    }
    if numbering.is_inner() {
        files.renumber(|pid| numbering.id(pid));
    }
    frozen.hold(files.finish(sink)?);
    numbering.save(sink)?;
    put_records(sink, Kind::Seccomp, names::SECCOMP, &[filters.into_entry()])?;
    put_records(sink, Kind::Pstree, names::PSTREE, &tree)?;
    if !options.carry.is_empty() {
        let root = std::fs::File::open("/").map_err(DumpError::io("open /"))?;
        content::save_paths(root.as_fd(), &options.carry, CARRIED, sink)?;
    }
    namespace::save_host(&options.mounts, sink)?;
    save_inventory(frozen, clocks, &namespaces, sink)?;
    Ok(stats)
}

/// What the first process's time namespace adds to the clocks.
fn offsets_of(frozen: &Frozen) -> Result<Offsets, DumpError> {
    Offsets::of(first_voice(frozen).as_raw()).map_err(DumpError::io("time namespace"))
}

/// The first process that lives, else this one.
fn first_voice(frozen: &Frozen) -> Pid {
    let live = frozen.processes.iter().find(|p| !p.info.is_zombie());
    live.map_or(Pid::this(), |p| Pid::from_raw(p.info.voice()))
}

fn save_inventory(
    frozen: &Frozen,
    clocks: Clocks,
    namespaces: &numbers::Table,
    sink: &mut dyn ImageSink,
) -> Result<(), DumpError> {
    let theirs = offsets_of(frozen)?;
    let ours = Offsets::of(Pid::this().as_raw()).map_err(DumpError::io("time namespace"))?;
    let timens = |ns: i64| Timespec {
        tv_sec: ns.div_euclid(1_000_000_000) as u64,
        tv_nsec: ns.rem_euclid(1_000_000_000) as u64,
    };
    let uname = nix::sys::utsname::uname().map_err(|e| DumpError::io("uname")(e.into()))?;
    let inventory = RcrInventory {
        version: ext::VERSION,
        realtime_ns: clocks.realtime,
        monotonic_ns: clocks.monotonic - ours.monotonic + theirs.monotonic,
        boottime_ns: clocks.boottime - ours.boottime + theirs.boottime,
        boot_id: boot_id().map_err(DumpError::io("boot_id"))?,
        kernel_release: uname.release().to_string_lossy().into_owned(),
        monotonic_offset_ns: theirs.monotonic,
        boottime_offset_ns: theirs.boottime,
    };
    let clock = TimensEntry {
        monotonic: timens(inventory.monotonic_ns),
        boottime: timens(inventory.boottime_ns),
    };
    put_records(sink, Kind::Timens, names::TIMENS, &[clock])?;
    put_records(sink, Kind::RcrTasks, ext::INVENTORY, &[inventory])?;
    let entry = InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        root_ids: Some(namespaces.host_ids()),
        root_cg_set: Some(1),
        lsmtype: Some(0),
        dump_uptime: Some((clocks.boottime / 1000) as u64),
        ..InventoryEntry::default()
    };
    Ok(put_records(
        sink,
        Kind::Inventory,
        names::INVENTORY,
        &[entry],
    )?)
}

/// This boot's id, as the kernel writes it.
pub(crate) fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}
