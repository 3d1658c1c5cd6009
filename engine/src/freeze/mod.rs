//! Freeze: every thread of a tree stopped, and let go again on any error.
//!
//! After success every thread is in ptrace-stop and belongs to the calling
//! thread. After failure, or when [`Frozen`] is dropped, all run on as before.

mod cgroup;
mod paused;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::Refusal;
use crate::file::Connections;
use crate::sys::process::{Shared, compare_object};
use crate::sys::ptrace::{self, Stop};
use crate::sys::text;
use crate::sys::{SysError, SysResult};
use crate::task::nap::Naps;
use crate::tree::{Process, Tree, list_all_tids, thread_is_dead};

pub use cgroup::CgroupFreezer;
use paused::Paused;

/// How long the end of a PID namespace is waited for.
const INIT_PATIENCE: Duration = Duration::from_millis(200);

/// Why a tree could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A file of /proc or of the cgroup could not be read or written.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The cgroup's tasks did not stop in time.
    #[error(
        "{cgroup}: tasks did not freeze within {seconds} s (one may be in uninterruptible sleep)"
    )]
    Timeout {
        /// The cgroup directory.
        cgroup: String,
        /// The time allowed.
        seconds: u64,
    },
    /// There is nothing to freeze.
    #[error("the tree has no processes")]
    Empty,
    /// Something keeps the tree from being stopped at all.
    #[error("{0}")]
    Refused(Refusal),
    /// A task did not stop in time.
    #[error(
        "task {tid} of {comm} (pid {pid}) did not stop within {seconds} s (it may be in uninterruptible sleep)"
    )]
    Stuck {
        /// The task.
        tid: i32,
        /// Its process.
        pid: i32,
        /// Its name.
        comm: String,
        /// The time allowed.
        seconds: u64,
    },
    /// ptrace failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// How long a task may take to stop unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a parent may wait in vfork(2) while its child prepares itself.
const VFORK_PATIENCE: Duration = Duration::from_secs(1);

/// A frozen process.
#[derive(Debug)]
pub struct FrozenProcess {
    /// The process table's view, taken after everything stood still.
    pub info: Process,
    /// The job-control signal that had stopped it before, or 0.
    pub stop_signal: i32,
}

/// A tree in which every thread is stopped. Dropping it lets all run on.
#[derive(Debug)]
pub struct Frozen {
    /// The processes, parents before children; zombies too.
    pub processes: Vec<FrozenProcess>,
    /// What threads were sleeping in when they were stopped.
    pub naps: Naps,
    traced: BTreeSet<i32>,
    connections: RefCell<Connections>,
    paused: Paused,
    /// ptrace belongs to a thread.
    _not_send: PhantomData<*const ()>,
}

impl Frozen {
    /// Lets go of tasks that are no part of the tree after all: their ids
    /// belonged to members that ended while we looked.
    fn forget_strangers(&mut self, processes: &[Process]) {
        let members: BTreeSet<i32> = processes.iter().flat_map(|p| &p.tids).copied().collect();
        for &tid in self.traced.difference(&members) {
            if let Err(e) = ptrace::detach(tid, 0)
                && e.errno != nix::errno::Errno::ESRCH
            {
                tracing::warn!(tid, "detach: {e}");
            }
        }
        self.traced.retain(|t| members.contains(t));
    }

    /// Lets every thread run on, as if nothing had happened.
    pub fn thaw(self) {}

    /// Keeps the packets of the tree's connections away until it runs on, or,
    /// if it is killed, until it is restored.
    pub(crate) fn hold(&self, connections: Connections) {
        *self.connections.borrow_mut() = connections;
    }

    /// Kills every process; to be used when their images are safe.
    pub fn kill(mut self) {
        let live = self.processes.iter().filter(|p| !p.info.is_zombie());
        self.traced.clear();
        if let Err(e) = self.connections.borrow_mut().silence() {
            tracing::error!("connections end as a kill ends them: {e}");
        }
        kill_and_reap(&live.map(|p| p.info.pid).collect::<Vec<_>>());
    }
}

/// Kills processes whose threads we trace, and waits until they are gone; a
/// process that is somebody else's child is left to its parent.
pub(crate) fn kill_and_reap(pids: &[i32]) {
    // A leader cannot be waited for before its threads are.
    let (mut in_turn, mut inits) = (Vec::new(), Vec::new());
    for &pid in pids {
        let tids = list_all_tids(pid).unwrap_or_default();
        let threads = tids.into_iter().filter(|&t| t != pid);
        if crate::namespace::pid::is_init_below(pid) {
            inits.extend(threads.chain([pid]));
        } else {
            in_turn.extend(threads);
        }
        let target = nix::unistd::Pid::from_raw(pid);
        match nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(e) => tracing::warn!(pid, "kill: {e}"),
        }
    }
    let leaders = pids.iter().filter(|pid| !inits.contains(pid));
    for tid in in_turn.into_iter().chain(leaders.copied()) {
        while let Ok(stop) = ptrace::wait(tid) {
            if matches!(stop, Stop::Gone(_)) {
                break;
            }
        }
    }
    // The last thread of a PID namespace's first process ends when everybody
    // else of the namespace is reaped: its other threads, in any order, and
    // whoever is somebody else's to reap (zap_pid_ns_processes in the
    // kernel), whom we have to let do it.
    await_ends(inits);
}

/// Waits for threads that we trace and that are about to end, in any order:
/// only then their parents are told.
fn await_ends(mut tids: Vec<i32>) {
    let end = Instant::now() + INIT_PATIENCE;
    while !tids.is_empty() && Instant::now() < end {
        tids.retain(|&tid| !matches!(ptrace::try_wait(tid), Ok(Some(Stop::Gone(_))) | Err(_)));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets all these threads go, which we trace; gives the first failure. Those that
/// are let go first may kill others: these are left to their parents.
pub(crate) fn let_go(tids: impl Iterator<Item = i32>) -> SysResult<()> {
    let mut killed = Vec::new();
    let mut result = Ok(());
    for tid in tids {
        match ptrace::detach(tid, 0) {
            Err(e) if e.errno == Errno::ESRCH => killed.push(tid),
            done => result = result.and(done),
        }
    }
    await_ends(killed);
    result
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Before anybody runs on.
        self.paused.pause();
        if let Err(e) = let_go(self.traced.iter().copied()) {
            tracing::warn!("{e}");
        }
    }
}

/// Freezes a tree.
pub fn freeze(tree: &Tree) -> Result<Frozen, FreezeError> {
    freeze_within(tree, PATIENCE)
}

/// Freezes a tree of which each task may take `patience` to stop.
pub fn freeze_within(tree: &Tree, patience: Duration) -> Result<Frozen, FreezeError> {
    let io_error = |source| FreezeError::Io {
        what: "reading the process table".into(),
        source,
    };
    let mut processes = tree.scan().map_err(io_error)?;
    let naps = Naps::note(&processes).map_err(|source| FreezeError::Io {
        what: "looking at sleeping threads".into(),
        source,
    })?;
    let freezer = tree.cgroup().map(CgroupFreezer::freeze).transpose()?;
    let mut frozen = Frozen {
        processes: Vec::new(),
        naps,
        traced: BTreeSet::new(),
        connections: RefCell::default(),
        paused: Paused::default(),
        _not_send: PhantomData,
    };
    let mut stop_signals = BTreeMap::new();
    let mut dead = BTreeSet::new();
    // A task may fork or clone until it is stopped; when one whole look finds
    // nobody new, everybody is stopped.
    loop {
        let mut grown = false;
        for p in processes.iter().filter(|p| !p.is_zombie()) {
            let (mut stopping, mut failed) = (Vec::new(), None);
            for &tid in &p.tids {
                if frozen.traced.contains(&tid) || dead.contains(&tid) {
                    continue;
                }
                grown = true;
                if p.leader_is_dead() && tid == p.pid {
                    dead.insert(tid);
                    continue;
                }
                match seize(tid, p, &mut frozen.traced) {
                    Ok(true) => stopping.push(tid),
                    Ok(false) => {}
                    Err(e) => failed = failed.or(Some(e)),
                }
            }
            // Before its children are stopped: it may wait for one in vfork(2).
            // Also after a failure: nobody can be let go before it has stopped.
            for tid in stopping {
                match await_stop(tid, p, patience, &mut frozen.traced) {
                    Ok(Some(signal)) => drop(stop_signals.insert(p.pid, signal)),
                    Ok(None) => {}
                    Err(e) => failed = failed.or(Some(e)),
                }
            }
            if let Some(e) = failed {
                return Err(e);
            }
        }
        if !grown {
            frozen.forget_strangers(&processes);
            frozen.naps.all_stopped();
            frozen.processes = processes
                .into_iter()
                .map(|info| {
                    let stop_signal = stop_signals.get(&info.pid).copied().unwrap_or(0);
                    FrozenProcess { info, stop_signal }
                })
                .collect();
            break;
        }
        processes = tree.scan_knowing(&frozen.traced).map_err(io_error)?;
    }
    // Stopped by ptrace from here on; in a frozen cgroup they could not run
    // the programs we give them.
    drop(freezer);
    if frozen.processes.iter().all(|p| p.info.is_zombie()) {
        return Err(FreezeError::Empty);
    }
    frozen.paused = Paused::thaw(&frozen.processes)?;
    Ok(frozen)
}

/// Attaches to a task and asks it to stop; whether it was there.
fn seize(tid: i32, process: &Process, traced: &mut BTreeSet<i32>) -> Result<bool, FreezeError> {
    match ptrace::seize(tid, ptrace::O_VISIT) {
        Ok(()) => {
            traced.insert(tid);
        }
        Err(e) if e.errno == nix::errno::Errno::ESRCH => return Ok(false),
        // It ended meanwhile.
        Err(_) if thread_is_dead(process.pid, tid) => return Ok(false),
        Err(e) => {
            let tracer = tracer_of(tid);
            if tracer != 0 {
                return Err(FreezeError::Refused(traced_by(process, tid, tracer)));
            }
            return Err(e.into());
        }
    }
    match ptrace::interrupt(tid) {
        // It ended meanwhile: the wait tells.
        Err(e) if e.errno != nix::errno::Errno::ESRCH => Err(e.into()),
        _ => Ok(true),
    }
}

/// Waits until a task that was asked to has stopped. Returns the job-control
/// signal it was stopped by before, if any.
fn await_stop(
    tid: i32,
    process: &Process,
    patience: Duration,
    traced: &mut BTreeSet<i32>,
) -> Result<Option<i32>, FreezeError> {
    let mut stopped_by = None;
    loop {
        match wait_bounded(tid, process, patience)? {
            Stop::Stopped(libc::SIGTRAP) => return Ok(None),
            Stop::Stopped(signal) if stopped_by == Some(signal) => return Ok(stopped_by),
            // A task in a job-control stop traps when it is seized, and our
            // interrupt may still be ahead of it: one more trap takes it away.
            Stop::Stopped(signal) => {
                stopped_by = Some(signal);
                ptrace::interrupt(tid)?;
                ptrace::cont(tid, 0)?;
            }
            // A signal was on its way: it takes its course, our stop comes next.
            Stop::Signal(signal) => ptrace::cont(tid, signal)?,
            Stop::Event(_) => ptrace::cont(tid, 0)?,
            Stop::Gone(_) => {
                traced.remove(&tid);
                return Ok(None);
            }
        }
    }
}

/// Waits for a stop of a task, or until it is clear that none will come.
fn wait_bounded(tid: i32, process: &Process, patience: Duration) -> Result<Stop, FreezeError> {
    let start = Instant::now();
    loop {
        match ptrace::try_wait(tid) {
            Ok(Some(stop)) => return Ok(stop),
            Ok(None) => {}
            // It changed its id by execve(2), or is gone without a word.
            Err(e) if e.errno == nix::errno::Errno::ECHILD => return Ok(Stop::Gone(0)),
            Err(e) => return Err(e.into()),
        }
        let waited = start.elapsed();
        if waited < Duration::from_millis(1) {
            std::thread::yield_now();
            continue;
        }
        if waited > VFORK_PATIENCE
            && let Some(child) = vfork_child(process.pid, tid)
        {
            return Err(FreezeError::Refused(in_vfork(process, tid, child)));
        }
        if waited > patience {
            let (pid, comm) = (process.pid, process.comm.clone());
            let seconds = patience.as_secs();
            return Err(FreezeError::Stuck {
                tid,
                pid,
                comm,
                seconds,
            });
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What would keep a process from being stopped, as it is now.
pub(crate) fn refusals(p: &Process) -> Vec<Refusal> {
    let of_thread = |&tid: &i32| match tracer_of(tid) {
        0 => Some(in_vfork(p, tid, lasting_vfork(p.pid, tid)?)),
        tracer => Some(traced_by(p, tid, tracer)),
    };
    p.tids.iter().filter_map(of_thread).collect()
}

fn traced_by(p: &Process, tid: i32, tracer: i32) -> Refusal {
    Refusal {
        pid: p.pid,
        comm: p.comm.clone(),
        object: "ptrace".into(),
        reason: format!("thread {tid} is traced by process {tracer}"),
        advice: "detach the debugger first".into(),
    }
}

fn in_vfork(p: &Process, tid: i32, child: i32) -> Refusal {
    Refusal {
        pid: p.pid,
        comm: p.comm.clone(),
        object: "vfork".into(),
        reason: format!("thread {tid} waits until its child {child} runs a program"),
        advice: "try again".into(),
    }
}

/// As [`vfork_child`], where it is the same child for longer than it takes to
/// run a program.
fn lasting_vfork(pid: i32, tid: i32) -> Option<i32> {
    let child = vfork_child(pid, tid)?;
    std::thread::sleep(VFORK_PATIENCE);
    vfork_child(pid, tid).filter(|c| *c == child)
}

/// The child that a task waits for in vfork(2) or clone(2) with `CLONE_VFORK`:
/// a call that nothing but the child's end or execve(2) ends.
fn vfork_child(pid: i32, tid: i32) -> Option<i32> {
    let dir = format!("/proc/{pid}/task/{tid}");
    let call = text::read_string(format!("{dir}/syscall")).ok()?;
    let number: i64 = call.split(' ').next()?.parse().ok()?;
    if ![libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&number) {
        return None;
    }
    // Killable, so shown as uninterruptible.
    let stat = text::read_string(format!("{dir}/stat")).ok()?;
    if !stat.rsplit(") ").next()?.starts_with('D') {
        return None;
    }
    let children = text::read_string(format!("{dir}/children")).ok()?;
    let shares = |c: &i32| {
        let order = compare_object(tid, *c, Shared::Vm);
        order.is_ok_and(|o| o == std::cmp::Ordering::Equal)
    };
    children
        .split_ascii_whitespace()
        .filter_map(|w| w.parse().ok())
        .rfind(shares)
}

/// Who traces a task; 0 for nobody.
fn tracer_of(tid: i32) -> i32 {
    let text = text::read_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("TracerPid:"));
    line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
}
