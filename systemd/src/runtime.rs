//! Files that live in RAM and belong to a service: its content of `/run`,
//! `/tmp` and `/dev/shm`, which the next kernel would not have.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::unit::Unit;

/// The paths of a service that lie on tmpfs: its run-time directories, PID
/// file, private temporary directories and every such file that its processes
/// have open or mapped. Sorted, without what another entry includes.
pub fn paths_of(unit: &Unit, pids: &[i32]) -> io::Result<Vec<PathBuf>> {
    let mut found: BTreeSet<PathBuf> = unit.runtime_directories.iter().cloned().collect();
    found.extend(unit.pid_file.clone());
    for base in ["/tmp", "/var/tmp"] {
        if !unit.private_tmp {
            break;
        }
        for entry in fs::read_dir(base)? {
            let name = entry?.file_name();
            if is_private_tmp(&name.to_string_lossy(), &unit.id) {
                found.insert(Path::new(base).join(name));
            }
        }
    }
    for pid in pids {
        found.extend(open_files(*pid));
    }
    found.retain(|path| fs::symlink_metadata(path).is_ok() && on_tmpfs(path));
    let all: Vec<PathBuf> = found.into_iter().collect();
    Ok(all
        .iter()
        .filter(|path| {
            !all.iter()
                .any(|other| other != *path && path.starts_with(other))
        })
        .cloned()
        .collect())
}

/// `systemd-private-BOOT_ID-UNIT-XXXXXX` (systemd.exec(5), PrivateTmp=).
fn is_private_tmp(name: &str, unit: &str) -> bool {
    name.strip_prefix("systemd-private-")
        .and_then(|rest| rest.split_once('-'))
        .and_then(|(_boot_id, rest)| rest.strip_prefix(unit))
        .is_some_and(|suffix| suffix.len() == 7 && suffix.starts_with('-'))
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

/// The path that a private temporary directory of the boot `old` has in the
/// boot `new`; other paths stay. At boot, systemd-tmpfiles clears away those
/// of other boots. Boot ids are as `/proc/sys/kernel/random/boot_id` has them.
pub fn rename_private_tmp(path: &str, old: &str, new: &str) -> String {
    let compact = |id: &str| id.trim().replace('-', "");
    let (old, new) = (compact(old), compact(new));
    path.replace(
        &format!("/systemd-private-{old}-"),
        &format!("/systemd-private-{new}-"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_directories_are_known_by_their_name() {
        let name = "systemd-private-0123456789abcdef0123456789abcdef-redis-server.service-AbCdEf";
        assert!(is_private_tmp(name, "redis-server.service"));
        assert!(!is_private_tmp(name, "redis.service"));
        assert!(!is_private_tmp(name, "server.service"));
        assert_eq!(
            rename_private_tmp(
                &format!("/tmp/{name}/tmp"),
                "01234567-89ab-cdef-0123-456789abcdef\n",
                "ffffffff-0000-0000-0000-000000000000"
            ),
            "/tmp/systemd-private-ffffffff000000000000000000000000-redis-server.service-AbCdEf/tmp"
        );
        assert_eq!(rename_private_tmp("/run/redis", "a", "b"), "/run/redis");
    }

    #[test]
    fn open_files_on_tmpfs_are_found() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("open");
        let _held = fs::File::create(&path).unwrap();
        assert!(open_files(std::process::id() as i32).contains(&path));
        assert!(on_tmpfs(&path));
        assert!(!on_tmpfs(Path::new("/proc/self/stat")));
    }
}
