//! Files that live in RAM and belong to a service: its content of `/run`,
//! `/tmp` and `/dev/shm`, which the next kernel would not have.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::unit::Unit;

/// Start of the names of private temporary directories (systemd.exec(5),
/// PrivateTmp=). They are tied to a boot: who carries the service's mounts
/// carries them.
const PRIVATE: &str = "/systemd-private-";

/// The paths of a service that lie on tmpfs: its run-time directories, PID file
/// and every such file that its processes have open or mapped, private
/// temporary directories aside. Sorted, without what another entry includes.
pub fn paths_of(unit: &Unit, pids: &[i32]) -> Vec<PathBuf> {
    let mut found: BTreeSet<PathBuf> = unit.runtime_directories.iter().cloned().collect();
    found.extend(unit.pid_file.clone());
    for pid in pids {
        found.extend(open_files(*pid));
    }
    found.retain(|path| {
        !path.to_string_lossy().contains(PRIVATE)
            && fs::symlink_metadata(path).is_ok()
            && on_tmpfs(path)
    });
    let all: Vec<PathBuf> = found.into_iter().collect();
    all.iter()
        .filter(|path| {
            !all.iter()
                .any(|other| other != *path && path.starts_with(other))
        })
        .cloned()
        .collect()
}

/// Regular files and FIFOs that a process holds and that the host sees at the
/// same path. Processes may end meanwhile; what cannot be read is not held.
fn open_files(pid: i32) -> Vec<PathBuf> {
    ["fd", "map_files"]
        .iter()
        .filter_map(|kind| fs::read_dir(format!("/proc/{pid}/{kind}")).ok())
        .flatten()
        .filter_map(|entry| {
            let link = entry.ok()?.path();
            let path = fs::read_link(&link).ok()?;
            let (held, seen) = (fs::metadata(&link).ok()?, fs::symlink_metadata(&path).ok()?);
            let same = held.dev() == seen.dev() && held.ino() == seen.ino();
            let kind = held.file_type();
            (same && (kind.is_file() || kind.is_fifo())).then_some(path)
        })
        .collect()
}

fn on_tmpfs(path: &Path) -> bool {
    // A symbolic link is judged by the directory that holds it.
    let judged = match fs::symlink_metadata(path) {
        Ok(m) if m.is_symlink() => path.parent().unwrap_or(path),
        _ => path,
    };
    statfs(judged).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_on_tmpfs_are_found() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("open");
        let _held = fs::File::create(&path).unwrap();
        assert!(open_files(std::process::id() as i32).contains(&path));
        assert!(on_tmpfs(&path));
        assert!(!on_tmpfs(Path::new("/proc/self/stat")));

        let text = format!(
            "Id=a.service\nLoadState=loaded\nActiveState=active\nSubState=running\n\
             RuntimeDirectory=none\nPIDFile={}\n",
            dir.path().display()
        );
        let unit = Unit::parse("a", &text).unwrap();
        let paths = paths_of(&unit, &[std::process::id() as i32]);
        assert!(paths.contains(&dir.path().to_owned()));
        assert!(!paths.contains(&path), "its directory includes it");
    }
}
