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

/// Directories of `/run` that are not one service's.
const SHARED: [&str; 8] = [
    "dbus",
    "initramfs",
    "lock",
    "log",
    "mount",
    "rcr",
    "systemd",
    "user",
];

/// The paths of a service that lie on tmpfs: its run-time directories, PID file,
/// directories of `/run` that it has sockets in, and every such file that its
/// processes have open or mapped, private temporary directories aside. Sorted,
/// without what another entry includes.
pub fn paths_of(unit: &Unit, pids: &[i32]) -> Vec<PathBuf> {
    let mut found: BTreeSet<PathBuf> = unit.runtime_directories.iter().cloned().collect();
    found.extend(unit.pid_file.clone());
    for pid in pids {
        found.extend(open_files(*pid));
        let table = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
        found.extend(directories_of_sockets(&table, &socket_inodes(*pid)));
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

/// The inode numbers of a process's sockets.
fn socket_inodes(pid: i32) -> BTreeSet<u64> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    fds.filter_map(|entry| {
        let link = fs::read_link(entry.ok()?.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    })
    .collect()
}

/// The directories of `/run` in which sockets with these inode numbers have their
/// names, by a table as of /proc/net/unix (proc_net(5)). A service may have made
/// its directory itself, and what else is in it belongs to the service too.
fn directories_of_sockets(table: &str, inodes: &BTreeSet<u64>) -> BTreeSet<PathBuf> {
    // Num RefCount Protocol Flags Type St Inode Path
    let names = table.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let inode: u64 = words.nth(6)?.parse().ok()?;
        inodes.contains(&inode).then(|| words.next()).flatten()
    });
    let directory = |name: &str| {
        let below = ["/run/", "/var/run/"]
            .iter()
            .find_map(|run| name.strip_prefix(run))?;
        let (first, _) = below.split_once('/')?;
        (!SHARED.contains(&first)).then(|| Path::new("/run").join(first))
    };
    names.filter_map(directory).collect()
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
    fn the_directory_of_a_socket_is_the_services_own() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
                     0: 2 0 00010000 0001 01 11 /run/mysqld/mysqld.sock\n\
                     0: 2 0 00010000 0001 01 12 /var/run/dovecot/login/imap\n\
                     0: 2 0 00010000 0001 01 13 /run/top.sock\n\
                     0: 3 0 00000000 0001 03 14 /run/systemd/journal/stdout\n\
                     0: 3 0 00000000 0001 03 15\n\
                     0: 2 0 00010000 0001 01 16 /run/other/sock\n";
        let found = directories_of_sockets(table, &BTreeSet::from([11, 12, 13, 14, 15]));
        let expected = ["/run/dovecot", "/run/mysqld"].map(PathBuf::from);
        assert_eq!(Vec::from_iter(found), expected);
    }

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
