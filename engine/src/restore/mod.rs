//! Restore: images into a tree of stopped processes, which then go on at once.
//!
//! ```text
//! images ─► namespaces, clocks ─► births (pids, sessions, groups; memory that is
//!   inherited) ─► each process: memory swapped, pages, files, limits, ids
//!   ─► threads ─► seccomp, capabilities
//! ─► Restored ─► resume
//! ```
//! The calling process must have a single thread: the processes start as forks
//! of it. After failure nothing that was made is left. Until
//! [`Restored::resume`] no instruction of the restored programs has run.

mod births;
mod fds;
mod foreign;
mod images;
mod lazy;
mod memory;
mod process;
mod threads;
mod verify;
mod worlds;

use std::collections::BTreeMap;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::arch;
use crate::content::{self, ContentError};
use crate::dump::CARRIED;
use crate::file::{BuildError, FileBuilder, FileError, SilentConnections};
use crate::freeze::let_go;
use crate::image::{ImageError, ImageSource};
use crate::memory::{MemoryError, sysv};
use crate::namespace::{self, NamespaceError, NsKind, VethEnd};
use crate::remote::{Arena, RemoteError, Tracee};
use crate::sys::SysError;
use crate::sys::process::tgkill;
use crate::sys::ptrace;
use crate::task::{nap, registers};
use crate::tree::Stat;

use images::Images;

pub(crate) use lazy::can_wait;
pub use lazy::{PageOrigin, WORTH_WAITING, pagers, serve};
pub use verify::{Verified, verify};

/// For a stop that was sent to take hold, and between two looks.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
const STOP_POLL: Duration = Duration::from_millis(1);

/// How a restore is made.
#[derive(Debug, Default)]
pub struct RestoreOptions {
    /// Make the roots of the tree children of the caller's own parent.
    pub sibling: bool,
    /// Where cgroup2 is mounted, to put every process where it was; the
    /// directories must exist. `None`: they stay in the caller's cgroup.
    pub cgroup_mount: Option<PathBuf>,
    /// Regular file that takes what is written to connections with the
    /// journal, until they are made anew.
    pub journal_interim: Option<PathBuf>,
    /// Network namespaces that stand in for those that were not saved, by name.
    pub nets: BTreeMap<String, OwnedFd>,
    /// Where the host's ends of pairs go instead of where they were.
    pub veths: Vec<VethEnd>,
    /// Nothing is mounted on the host that was there at the dump and is not
    /// now: for who restores on a machine that is up.
    pub host_as_it_is: bool,
    /// What the root directory of the tree's own mount namespace shows instead
    /// of what it did: a mount point.
    pub root: Option<PathBuf>,
    /// What is bound for mounts that were not saved, by their names.
    pub external_mounts: BTreeMap<String, PathBuf>,
    /// Let processes run before all of their memory is filled: a process of
    /// ours stays and fills mappings with at least this many bytes of content,
    /// what is touched first. [`WORTH_WAITING`] is a good number.
    pub lazy: Option<u64>,
    /// Who fills it in the place of a process of ours: a connection to one that
    /// runs [`serve`] on the same images.
    pub pager: Option<UnixStream>,
    /// Ends of pipes in the place of those that led outside, by their names.
    pub pipes: BTreeMap<String, OwnedFd>,
    /// No network is up, as in early boot: connections are made all the same,
    /// and speak when it is.
    pub without_network: bool,
}

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A pid is taken by somebody else.
    #[error("pid {pid} is taken by {comm}")]
    PidTaken {
        /// The pid.
        pid: i32,
        /// Who has it.
        comm: String,
    },
    /// Process groups or sessions cannot be made as they were.
    #[error("process {pid}: {what}")]
    Tree {
        /// The process.
        pid: i32,
        /// What does not fit.
        what: String,
    },
    /// A thread got another id than wanted, again and again.
    #[error("thread id {tid} could not be had: other programs start too many processes")]
    Tid {
        /// The id.
        tid: i32,
    },
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// An image is missing or wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file could not be made again.
    #[error(transparent)]
    File(#[from] FileError),
    /// A part of a file could not be made again.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Memory could not be made again.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A namespace could not be made again.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Files in RAM could not be made again.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A remote program failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

impl RestoreError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// A restored tree, every thread stopped. Dropping it kills the tree.
#[derive(Debug)]
pub struct Restored {
    images: Images,
    /// For each process: our mapping in it and the instruction to leave with,
    /// where the mapping is its own.
    ways_out: BTreeMap<i32, (Arena, Option<u64>)>,
    made: births::Made,
    connections: SilentConnections,
    pager: Option<lazy::Lazy>,
    _not_send: PhantomData<*const ()>,
}

impl Restored {
    /// All process ids, parents before children.
    pub fn pids(&self) -> Vec<i32> {
        self.images.processes.iter().map(|p| p.pid).collect()
    }

    /// The process that fills memory while the tree runs, after a lazy restore.
    /// It ends when all is there.
    pub fn pager(&self) -> Option<i32> {
        self.pager.as_ref().and_then(lazy::Lazy::pid)
    }

    /// Gives every thread its registers and lets all go.
    pub fn resume(mut self) -> Result<(), RestoreError> {
        if let Some(pager) = self.pager.take() {
            pager.go_live()?;
        }
        std::mem::take(&mut self.connections).speak()?;
        let mut regs = BTreeMap::new();
        for (p, live) in self.images.live() {
            let (arena, _) = self.ways_out[&p.pid];
            for t in live.threads.iter().filter(|t| p.lives(t.tid)) {
                let call = t.ext.nap.as_ref().map(|n| n.call);
                let saved = arch::make_again(&registers::load(&t.info.gpregs), call);
                let again = match &t.ext.nap {
                    Some(n) => nap::restore(t.tid, arena, &saved, n)?,
                    None => None,
                };
                regs.insert(t.tid, again.unwrap_or(saved));
            }
        }
        for (p, _) in self.images.live() {
            let (arena, insn) = self.ways_out[&p.pid];
            if let Some(insn) = insn {
                Tracee { tid: p.pid }.unmap_arena(insn, arena)?;
            }
        }
        for (p, live) in self.images.live() {
            if let Some(status) = p.ext.dead_leader {
                let way = self
                    .images
                    .memory_of(live)
                    .and_then(|o| self.ways_out[&o].1);
                threads::end_leader(p.pid, status, live, way)?;
            }
            for t in live.threads.iter().filter(|t| p.lives(t.tid)) {
                ptrace::set_regs(t.tid, &regs[&t.tid])?;
                if let Some(dispatch) = &t.ext.dispatch {
                    ptrace::set_syscall_dispatch(t.tid, dispatch)?;
                }
                ptrace::set_sigmask(t.tid, t.core.blk_sigset.unwrap_or(live.tc.blk_sigset))?;
            }
        }
        // Nothing is left to be done for them: from here on they live without us.
        // Were we killed in between, some would, and some would not.
        for (p, live) in self.images.live() {
            for t in live.threads.iter().filter(|t| p.lives(t.tid)) {
                ptrace::set_options(t.tid, ptrace::O_VISIT)?;
            }
        }
        for (p, live) in self.images.live() {
            if p.ext.stop_signal != 0 {
                let first = live.threads.iter().find(|t| p.lives(t.tid));
                tgkill(p.pid, first.map_or(p.pid, |t| t.tid), libc::SIGSTOP)?;
            }
        }
        let all = self.images.live().flat_map(|(p, live)| {
            let threads = live.threads.iter().filter(|t| p.lives(t.tid));
            threads.map(|t| t.tid)
        });
        let_go(all)?;
        for (p, live) in self.images.live().filter(|(p, _)| p.ext.stop_signal != 0) {
            let threads = live.threads.iter().filter(|t| p.lives(t.tid));
            threads.for_each(|t| await_stop(t.tid));
        }
        self.made.release();
        Ok(())
    }
}

/// Waits until a thread that was told to stop has: who looks at it next expects
/// that. Not for long, as somebody else may have told it to go on.
fn await_stop(tid: i32) {
    let end = Instant::now() + STOP_PATIENCE;
    while Stat::read(tid).is_ok_and(|s| !"TZX".contains(s.state)) && Instant::now() < end {
        std::thread::sleep(STOP_POLL);
    }
}

/// The kinds of namespaces that some process of a dump has for its own, of
/// those that belong to no other object: network, IPC, UTS.
pub fn own_namespaces(source: &dyn ImageSource) -> Result<Vec<NsKind>, RestoreError> {
    let images = Images::load(source)?;
    let host = images.host_ids;
    let mut found = Vec::new();
    for (_, live) in images.live() {
        for (kind, own, outer) in [
            (NsKind::Net, live.ids.net_ns_id, host.net_ns_id),
            (NsKind::Ipc, live.ids.ipc_ns_id, host.ipc_ns_id),
            (NsKind::Uts, live.ids.uts_ns_id, host.uts_ns_id),
        ] {
            if own.is_some() && own != outer && !found.contains(&kind) {
                found.push(kind);
            }
        }
    }
    Ok(found)
}

/// Makes the tree of a dump again, stopped.
pub fn restore(
    source: &dyn ImageSource,
    options: &RestoreOptions,
) -> Result<Restored, RestoreError> {
    let images = Images::load(source)?;
    if options.pager.is_none() {
        memory::all_here(source, &images)?;
    }
    let missing = match options.host_as_it_is {
        true => Vec::new(),
        false => namespace::prepare_host(source)?,
    };
    for (place, reason) in &missing {
        tracing::warn!("{}: not mounted: {reason}", place.display());
    }
    let root = File::open("/").map_err(RestoreError::io("open /"))?;
    if source
        .names()
        .iter()
        .any(|n| *n == content::list_name(CARRIED))
    {
        content::restore_paths(root.as_fd(), source, CARRIED)?;
    }
    let mut worlds = worlds::Worlds::build(source, &images, options)?;
    worlds.make_times(&images)?;
    worlds.enter_clocks(&images)?;
    let env = worlds::Env::new(&worlds, &images, options.journal_interim.as_deref())?;
    let mut files = FileBuilder::new(source, &env)?;
    files.inherit(&options.pipes)?;
    if options.without_network {
        files.without_network()?;
    }
    if images.foreign {
        let tables = images.live();
        files.derive_records(tables.map(|(p, live)| (p.id, live.fdinfo.as_slice())));
    }
    sysv::restore(source)?;
    let mut made = births::Made::default();
    let mut memory = memory::Memory::new(source, &images, &mut files);
    let ways = births::bear(&images, options, &mut made, &mut memory, &worlds)?;
    worlds.mount_procs(&images, &ways)?;
    if let Some(at_least) = options.lazy {
        memory.come_later(at_least, options.pager.as_ref())?;
    }
    let mut ways_out = BTreeMap::new();
    // All memory first: it needs descriptors of its own, for which shared
    // tables are emptied.
    for (p, live) in images.live() {
        let birth = &ways[&p.pid];
        let insn = match live.owns.memory {
            true => Some(memory.complete(p, live, birth)?),
            false => None,
        };
        ways_out.insert(p.pid, (birth.arena, insn));
    }
    let pager = memory.pager.take();
    let mut step = process::Step {
        images: &images,
        worlds: &worlds,
        files: memory.files,
    };
    for (p, _) in images.live() {
        step.zombies_of(p, &ways[&p.pid])?;
    }
    env.set_newborns(&ways);
    step.files.connect()?;
    env.set_newborns(&BTreeMap::new());
    for (p, live) in images.live() {
        step.process(p, live, &ways[&p.pid])?;
    }
    sysv::settle(source)?;
    worlds.settle(source)?;
    files.seal()?;
    files.send_under_way()?;
    let connections = files.connections()?;
    files.finish()?;
    Ok(Restored {
        images,
        ways_out,
        made,
        connections,
        pager,
        _not_send: PhantomData,
    })
}
