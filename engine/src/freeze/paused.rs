//! Control groups that somebody else has frozen: their tasks are stopped like
//! others, but run no programs of ours before the group is thawed.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::{FreezeError, FrozenProcess};
use crate::refusal::Refusal;
use crate::sys::guard::Guard;

/// Groups that are thawed for as long as the tree stands by ptrace.
#[derive(Debug, Default)]
pub struct Paused(Vec<(PathBuf, Guard)>);

impl Paused {
    /// Thaws the frozen groups of stopped processes. Should we die, they are
    /// frozen again.
    pub fn thaw(processes: &[FrozenProcess]) -> Result<Self, FreezeError> {
        let Some((root, mount)) = hierarchy() else {
            return Ok(Self::default());
        };
        let members: BTreeSet<i32> = processes.iter().map(|p| p.info.pid).collect();
        let mut seen = BTreeSet::new();
        let mut thawed = Self::default();
        for p in processes.iter().filter(|p| !p.info.is_zombie()) {
            let voice = p.info.voice();
            let own = std::fs::read_to_string(format!("/proc/{voice}/cgroup"))
                .map_err(failed(format!("control groups of {voice}")))?;
            let own = own.lines().find_map(|l| l.strip_prefix("0::"));
            let Some(path) = own.and_then(|o| Path::new(o).strip_prefix(&root).ok()) else {
                continue;
            };
            for dir in mount.join(path).ancestors() {
                if dir == mount || !seen.insert(dir.to_owned()) {
                    break;
                }
                let file = dir.join("cgroup.freeze");
                let frozen = std::fs::read_to_string(&file).is_ok_and(|t| t.trim() == "1");
                if !frozen {
                    continue;
                }
                let all = inside(dir).map_err(failed(format!("processes of {}", dir.display())))?;
                if let Some(other) = all.iter().find(|pid| !members.contains(pid)) {
                    return Err(FreezeError::Refused(with_others(p, dir, *other)));
                }
                let what = || format!("thawing {}", dir.display());
                let guard = Guard::write_at_death(&file, "1").map_err(failed(what()))?;
                std::fs::write(&file, "0").map_err(failed(what()))?;
                thawed.0.push((file, guard));
            }
        }
        Ok(thawed)
    }

    /// Freezes them again.
    pub fn pause(&mut self) {
        for (file, guard) in self.0.drain(..) {
            if let Err(e) = std::fs::write(&file, "1") {
                tracing::error!("{}: cannot freeze it again: {e}", file.display());
            }
            drop(guard);
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.pause();
    }
}

fn failed(what: String) -> impl FnOnce(io::Error) -> FreezeError {
    move |source| FreezeError::Io { what, source }
}

fn with_others(p: &FrozenProcess, dir: &Path, other: i32) -> Refusal {
    Refusal {
        pid: p.info.pid,
        comm: p.info.comm.clone(),
        object: format!("control group {}", dir.display()),
        reason: format!("it is frozen, with process {other} of another tree in it"),
        advice: "thaw it".into(),
    }
}

/// Which part of the hierarchy of version 2 is mounted, and where
/// (`/proc/self/mountinfo`, `proc_pid_mountinfo(5)`).
fn hierarchy() -> Option<(PathBuf, PathBuf)> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (front, behind) = line.split_once(" - ")?;
        let mut words = front.split(' ').skip(3);
        let found = (words.next()?.into(), words.next()?.into());
        behind.starts_with("cgroup2 ").then_some(found)
    })
}

/// The processes in a group and in those below it.
fn inside(dir: &Path) -> io::Result<Vec<i32>> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs"))?;
    let mut pids: Vec<i32> = text.lines().filter_map(|l| l.parse().ok()).collect();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pids.extend(inside(&entry.path())?);
        }
    }
    Ok(pids)
}
