//! The names that lead to a bind's source on the host: recorded where they
//! would be missing after a boot, made again before the bind.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid, chmodat, chownat, makedev,
    mkdirat, mknodat, openat, openat2, statx,
};
use rustix::io::Errno;

use super::schema::WayEntry;
use crate::content::{restore_node, restore_tree};
use crate::image::ImageSource;
use crate::namespace::NamespaceError;

/// Where systemd keeps the nodes it hides things with.
pub(super) const INACCESSIBLE: &str = "systemd/inaccessible";

/// Start of the names of systemd's private directories; the boot id follows.
const PRIVATE: &[u8] = b"systemd-private-";

/// Whether a path leads into a private directory that systemd ties to the boot.
pub(super) fn tied_to_boot(path: &Path) -> bool {
    path.iter().any(|name| name.as_bytes().starts_with(PRIVATE))
}

/// The path under another boot: `systemd-private-OLD-…` becomes `systemd-private-NEW-…`.
pub(super) fn under_boot(path: &Path, old: &str, new: &str) -> PathBuf {
    let rename = |name: &OsStr| {
        let rest = name.as_bytes().strip_prefix(PRIVATE);
        match rest.and_then(|r| r.strip_prefix(old.as_bytes())) {
            Some(rest) => {
                let bytes = [PRIVATE, new.as_bytes(), rest].concat();
                OsStr::from_bytes(&bytes).to_owned()
            }
            None => name.to_owned(),
        }
    };
    path.iter().map(rename).collect()
}

/// What stands on the way from the directory `top` to `path` below it, name by name.
pub(super) fn describe(top: &OwnedFd, path: &Path) -> Result<Vec<WayEntry>, NamespaceError> {
    let mut way = Vec::new();
    for name in prefixes(path) {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(top, &name, flags, StatxFlags::BASIC_STATS)
            .map_err(NamespaceError::call("statx", &name))?;
        way.push(WayEntry {
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            major: stat.stx_rdev_major,
            minor: stat.stx_rdev_minor,
        });
    }
    Ok(way)
}

/// Makes what is missing on the way from `top`, a mount's root, to `path` below
/// it, under this boot; then brings the content of what is there, if it was carried.
pub(super) fn make(
    top: &OwnedFd,
    path: &Path,
    ways: &[WayEntry],
    content: Option<(&str, &dyn ImageSource)>,
) -> Result<(), NamespaceError> {
    let mut made_leaf = false;
    let mut leaf_parent = top.try_clone().map_err(NamespaceError::call("dup", path))?;
    for (name, way) in prefixes(path).zip(ways) {
        let last = name == path;
        let parent = open_parent(top, &name)?;
        let leaf = name.file_name().unwrap_or_default();
        made_leaf = make_one(&parent, leaf, way, last && content.is_some(), &name)?;
        leaf_parent = parent;
    }
    let (Some((tree, source)), Some(way)) = (content, ways.last()) else {
        return Ok(());
    };
    if way.mode & libc::S_IFMT == libc::S_IFDIR {
        let leaf = path.file_name().unwrap_or_default();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = openat(&leaf_parent, leaf, flags, Mode::empty())
            .map_err(NamespaceError::call("open", path))?;
        restore_tree(source, tree, dir.as_fd()).map_err(NamespaceError::content(path))
    } else if made_leaf {
        restore_node(source, tree, leaf_parent.as_fd()).map_err(NamespaceError::content(path))
    } else {
        Ok(())
    }
}

/// Makes one name if it is missing; tells whether it was.
fn make_one(
    parent: &OwnedFd,
    leaf: &OsStr,
    way: &WayEntry,
    carried: bool,
    path: &Path,
) -> Result<bool, NamespaceError> {
    let kind = FileType::from_raw_mode(way.mode);
    if carried && kind != FileType::Directory {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        return match rustix::fs::statat(parent, leaf, flags) {
            Ok(_) => Ok(false),
            Err(Errno::NOENT) => Ok(true),
            Err(e) => Err(NamespaceError::call("stat", path)(e)),
        };
    }
    let made = if kind == FileType::Directory {
        mkdirat(parent, leaf, Mode::RWXU)
    } else {
        mknodat(
            parent,
            leaf,
            kind,
            Mode::empty(),
            makedev(way.major, way.minor),
        )
    };
    match made {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(false),
        Err(e) => return Err(NamespaceError::call("make", path)(e)),
    }
    let (uid, gid) = (Uid::from_raw(way.uid), Gid::from_raw(way.gid));
    chownat(
        parent,
        leaf,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(NamespaceError::call("chown", path))?;
    chmodat(
        parent,
        leaf,
        Mode::from_raw_mode(way.mode & 0o7777),
        AtFlags::empty(),
    )
    .map_err(NamespaceError::call("chmod", path))?;
    Ok(true)
}

fn open_parent(top: &OwnedFd, path: &Path) -> Result<OwnedFd, NamespaceError> {
    let up = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(
        top,
        up,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        how,
    )
    .map_err(NamespaceError::call("open", up))
}

/// `a`, `a/b`, `a/b/c`.
fn prefixes(path: &Path) -> impl Iterator<Item = PathBuf> {
    path.iter().scan(PathBuf::new(), |at, name| {
        at.push(name);
        Some(at.clone())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_directories_follow_the_boot() {
        let (old, new) = ("0".repeat(32), "f".repeat(32));
        let path = PathBuf::from(format!(
            "systemd-private-{old}-redis-server.service-aB3/tmp"
        ));
        let moved = under_boot(&path, &old, &new);
        let expected = format!("systemd-private-{new}-redis-server.service-aB3/tmp");
        assert_eq!(moved, Path::new(&expected));
        assert!(tied_to_boot(&path));
        assert_eq!(
            under_boot(Path::new("redis/x"), &old, &new),
            Path::new("redis/x")
        );
    }

    #[test]
    fn missing_names_are_made_and_present_ones_kept() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |d: &tempfile::TempDir| crate::namespace::view::open_path(d.path()).unwrap();
        std::fs::create_dir_all(from.path().join("a/b")).unwrap();
        let b = from.path().join("a/b/fifo");
        mknodat(open(&from), "a/b/fifo", FileType::Fifo, Mode::empty(), 0).unwrap();
        let way = describe(&open(&from), Path::new("a/b/fifo")).unwrap();
        for _ in 0..2 {
            make(&open(&to), Path::new("a/b/fifo"), &way, None).unwrap();
        }
        let (was, is) = (
            rustix::fs::stat(&b).unwrap(),
            rustix::fs::stat(to.path().join("a/b/fifo")),
        );
        assert_eq!(was.st_mode, is.unwrap().st_mode);
    }
}
