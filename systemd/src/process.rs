//! What procfs says of restored processes.

use std::fs;
use std::path::Path;

/// Why a process is not what a record says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProcessError {
    /// It has ended.
    #[error("process {pid} has ended")]
    Ended {
        /// The process.
        pid: i32,
    },
    /// It sits in another control group.
    #[error("process {pid} sits in control group {found}, not in {wanted}")]
    Cgroup {
        /// The process.
        pid: i32,
        /// Where it is.
        found: String,
        /// Where it should be.
        wanted: String,
    },
}

/// Whether `pid` runs (a zombie does not) in `cgroup` or beneath it.
pub fn check_live(pid: i32, cgroup: &str) -> Result<(), ProcessError> {
    check_live_in(Path::new("/proc"), pid, cgroup)
}

fn check_live_in(proc_dir: &Path, pid: i32, cgroup: &str) -> Result<(), ProcessError> {
    let ended = ProcessError::Ended { pid };
    let read = |file: &str| {
        fs::read(proc_dir.join(pid.to_string()).join(file))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|_| ended.clone())
    };
    let stat = read("stat")?;
    // The command may hold anything, parentheses included; the state follows
    // the last one.
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    if matches!(state, None | Some('Z' | 'X')) {
        return Err(ended);
    }
    let text = read("cgroup")?;
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or_default();
    let beneath = found
        .strip_prefix(cgroup)
        .is_some_and(|r| r.is_empty() || r.starts_with('/'));
    if !beneath {
        return Err(ProcessError::Cgroup {
            pid,
            found: found.into(),
            wanted: cgroup.into(),
        });
    }
    Ok(())
}

/// The processes in a control group's directory and those beneath it.
pub fn in_cgroup(directory: &Path) -> std::io::Result<Vec<i32>> {
    let mut pids: Vec<i32> = fs::read_to_string(directory.join("cgroup.procs"))?
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pids.extend(in_cgroup(&entry.path())?);
        }
    }
    pids.sort_unstable();
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(stat: &str, cgroup: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("7")).unwrap();
        fs::write(dir.path().join("7/stat"), stat).unwrap();
        fs::write(dir.path().join("7/cgroup"), cgroup).unwrap();
        dir
    }

    #[test]
    fn live_dead_and_misplaced_processes_are_told_apart() {
        let check = |dir: &tempfile::TempDir, pid| {
            check_live_in(dir.path(), pid, "/system.slice/a.service")
        };
        let live = fake("7 (a) Z) S 1 7", "0::/system.slice/a.service/sub\n");
        assert_eq!(check(&live, 7), Ok(()));
        assert_eq!(check(&live, 8), Err(ProcessError::Ended { pid: 8 }));
        let zombie = fake("7 (a) Z 1 7", "0::/system.slice/a.service\n");
        assert_eq!(check(&zombie, 7), Err(ProcessError::Ended { pid: 7 }));
        let elsewhere = fake("7 (a) S 1 7", "0::/system.slice/a.service2\n");
        assert!(matches!(
            check(&elsewhere, 7),
            Err(ProcessError::Cgroup { .. })
        ));
    }
}
