//! Which processes belong together.

use crate::sys::text;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

/// Where a set of processes comes from; who is in it is found at the freeze.
#[derive(Debug, Clone)]
pub enum Tree {
    /// All processes in a cgroup v2 directory and below it.
    Cgroup(PathBuf),
    /// A process and its descendants.
    Root(i32),
}

/// A process as the process table shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// `comm` of the leader.
    pub comm: String,
    /// One letter, as in `/proc/PID/stat`.
    pub state: char,
    /// Wait status of a zombie.
    pub exit_code: i32,
    /// Signal its parent gets when it ends.
    pub exit_signal: i32,
    /// `PF_*` flags.
    pub flags: u32,
    /// Thread ids, the leader first.
    pub tids: Vec<i32>,
}

impl Process {
    /// Reads one process; `None` when it is gone.
    pub fn read(pid: i32) -> io::Result<Option<Self>> {
        match list_tids(pid) {
            Ok(tids) => Self::with_threads(pid, tids),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn with_threads(pid: i32, tids: Vec<i32>) -> io::Result<Option<Self>> {
        let stat = match text::read(format!("/proc/{pid}/stat")) {
            Ok(s) => s,
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        let stat = Stat::parse(&stat).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat is not understood"),
            )
        })?;
        let exit_code = stat.number(52) as i32;
        Ok(Some(Process {
            pid,
            ppid: stat.number(4) as i32,
            pgid: stat.number(5) as i32,
            sid: stat.number(6) as i32,
            exit_code,
            exit_signal: stat.number(38) as i32,
            flags: stat.number(9) as u32,
            comm: stat.comm,
            state: stat.state,
            tids,
        }))
    }

    /// Whether it has ended and waits to be reaped.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.tids.len() <= 1
    }

    /// Whether its first thread has ended while others live on.
    pub fn leader_is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.tids.len() > 1
    }

    /// A living thread, through which `/proc` shows what the process has: an
    /// ended leader has neither memory nor files any more.
    pub fn voice(&self) -> i32 {
        match self.leader_is_dead() {
            true => self.tids[1],
            false => self.pid,
        }
    }
}

/// The fields of `/proc/PID/stat`, proc_pid_stat(5).
#[derive(Debug, Clone)]
pub struct Stat {
    /// The name, without the parentheses.
    pub comm: String,
    /// State letter.
    pub state: char,
    /// The numbers after it: `fields[0]` is number 4 of the man page.
    pub fields: Vec<i128>,
}

impl Stat {
    /// Reads the file of a process.
    pub fn read(pid: i32) -> io::Result<Self> {
        let bytes = text::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&bytes).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat is not understood"),
            )
        })
    }

    /// The field with the man page's number `n` (4 or above).
    pub fn number(&self, n: usize) -> u64 {
        self.fields.get(n - 4).copied().unwrap_or(0) as u64
    }

    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let open = bytes.iter().position(|&b| b == b'(')?;
        let close = bytes.iter().rposition(|&b| b == b')')?;
        let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
        let mut rest = std::str::from_utf8(&bytes[close + 1..])
            .ok()?
            .split_ascii_whitespace();
        let state = rest.next()?.chars().next()?;
        let fields = rest
            .map(|w| w.parse().ok())
            .collect::<Option<Vec<i128>>>()?;
        (fields.len() > 6).then_some(Self {
            comm,
            state,
            fields,
        })
    }
}

/// The process ended between two looks: not an error when scanning.
fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// Whether a thread has ended and is only there until somebody takes note.
pub(crate) fn thread_is_dead(pid: i32, tid: i32) -> bool {
    let stat = text::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    Stat::parse(&stat).is_none_or(|s| matches!(s.state, 'Z' | 'X'))
}

/// Whether a thread is the kernel's own and only counted to the process: a
/// worker of io_uring.
fn is_kernels(pid: i32, tid: i32) -> bool {
    /// `PF_IO_WORKER` and `PF_USER_WORKER` (linux/sched.h).
    const WORKER: u64 = 0x10 | 0x4000;
    let stat = text::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    Stat::parse(&stat).is_some_and(|s| s.number(9) & WORKER != 0)
}

/// Thread ids of a process, the leader first.
pub fn list_tids(pid: i32) -> io::Result<Vec<i32>> {
    list_tids_knowing(pid, &BTreeSet::new())
}

/// As [`list_tids`]; of the threads in `known`, nobody has to be asked whether
/// they are the kernel's own.
fn list_tids_knowing(pid: i32, known: &BTreeSet<i32>) -> io::Result<Vec<i32>> {
    let mut tids = list_all_tids(pid)?;
    tids.retain(|&tid| tid == pid || known.contains(&tid) || !is_kernels(pid, tid));
    Ok(tids)
}

/// As [`list_tids`], with the kernel's own.
pub(crate) fn list_all_tids(pid: i32) -> io::Result<Vec<i32>> {
    let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_by_key(|&t| (t != pid, t));
    Ok(tids)
}

impl Tree {
    /// The cgroup directory, where the tree is one.
    pub fn cgroup(&self) -> Option<&Path> {
        match self {
            Tree::Cgroup(p) => Some(p),
            Tree::Root(_) => None,
        }
    }

    /// The processes in the tree right now, parents before children.
    pub fn scan(&self) -> io::Result<Vec<Process>> {
        self.scan_knowing(&BTreeSet::new())
    }

    /// As [`Tree::scan`]; the threads in `known` are certainly not the kernel's
    /// own, for instance because they are traced.
    pub(crate) fn scan_knowing(&self, known: &BTreeSet<i32>) -> io::Result<Vec<Process>> {
        let members = match self {
            Tree::Cgroup(dir) => {
                let mut pids = BTreeSet::new();
                cgroup_pids(dir, &mut pids)?;
                let mut members = BTreeMap::new();
                for pid in pids {
                    match list_tids_knowing(pid, known) {
                        Ok(tids) => drop(members.insert(pid, tids)),
                        Err(e) if is_gone(&e) => {}
                        Err(e) => return Err(e),
                    }
                }
                members
            }
            Tree::Root(pid) => descendants(*pid, known)?,
        };
        let mut found = BTreeMap::new();
        for (pid, tids) in members {
            if let Some(p) = Process::with_threads(pid, tids)? {
                found.insert(pid, p);
            }
        }
        Ok(parents_first(found))
    }
}

fn cgroup_pids(dir: &Path, pids: &mut BTreeSet<i32>) -> io::Result<()> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs"))?;
    pids.extend(
        text.lines()
            .filter_map(|l| l.trim().parse::<i32>().ok())
            .filter(|&p| p > 0),
    );
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            cgroup_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// A process and all below it, each with its threads.
fn descendants(root: i32, known: &BTreeSet<i32>) -> io::Result<BTreeMap<i32, Vec<i32>>> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root];
    while let Some(pid) = todo.pop() {
        let tids = match list_tids_knowing(pid, known) {
            Ok(t) => t,
            Err(e) if is_gone(&e) && pid != root => continue,
            Err(e) => return Err(e),
        };
        for tid in &tids {
            let children = match text::read_string(format!("/proc/{pid}/task/{tid}/children")) {
                Ok(c) => c,
                Err(e) if is_gone(&e) => continue,
                Err(e) => return Err(e),
            };
            let children = children.split_ascii_whitespace();
            todo.extend(children.filter_map(|w| w.parse::<i32>().ok()));
        }
        all.insert(pid, tids);
        todo.retain(|pid| !all.contains_key(pid));
    }
    Ok(all)
}

fn parents_first(mut found: BTreeMap<i32, Process>) -> Vec<Process> {
    let mut out: Vec<Process> = Vec::with_capacity(found.len());
    while !found.is_empty() {
        let ready: Vec<i32> = found
            .values()
            .filter(|p| !found.contains_key(&p.ppid))
            .map(|p| p.pid)
            .collect();
        // A process table has no cycles; a torn read of it might look like one.
        let ready = if ready.is_empty() {
            found.keys().copied().collect()
        } else {
            ready
        };
        for pid in ready {
            out.extend(found.remove(&pid));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_itself() {
        let me = std::process::id() as i32;
        let tree = Tree::Root(me).scan().unwrap();
        assert_eq!(tree[0].pid, me);
        assert_eq!(tree[0].tids[0], me);
        assert!(!tree[0].is_zombie());
    }

    #[test]
    fn stat_with_a_wild_name() {
        let s = Stat::parse(b"7 (a) (b) S 1 7 7 0 -1 4194304 1 2 3").unwrap();
        assert_eq!(
            (s.comm.as_str(), s.state, s.number(4), s.number(9)),
            ("a) (b", 'S', 1, 4194304)
        );
    }
}
