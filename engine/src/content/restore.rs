//! Restoring a tree.
//!
//! Nodes are made relative to their parent directory's descriptor and never
//! through symbolic links, so a forged image cannot leave the tree.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
    chmodat, chownat, ftruncate, linkat, lsetxattr, makedev, mkdirat, mknodat, openat, openat2,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::schema::{NodeEntry, NodeKind, TreeEntry};
use super::{ContentError, data_name, list_name};
use crate::image::{ImageError, ImageSource, Kind, get_record};

/// Fills the directory `dir` with a saved tree and gives it the saved root's attributes.
///
/// Files, links and special nodes that are in the way are replaced;
/// directories that exist stay, with their attributes set anew.
pub fn restore_tree(
    source: &dyn ImageSource,
    name: &str,
    dir: BorrowedFd<'_>,
) -> Result<(), ContentError> {
    Restore::open(source, name)?.all(dir)
}

/// Makes the node that [`super::save_node`] took, under its name, in `dir`.
pub fn restore_node(
    source: &dyn ImageSource,
    name: &str,
    dir: BorrowedFd<'_>,
) -> Result<(), ContentError> {
    restore_tree(source, name, dir)
}

struct Restore<'a> {
    tree: TreeEntry,
    data: &'a [u8],
    image: String,
}

impl<'a> Restore<'a> {
    fn open(source: &'a dyn ImageSource, name: &str) -> Result<Self, ContentError> {
        let image = list_name(name);
        let tree: TreeEntry = get_record(source, Kind::RcrContent, &image)?;
        let data_image = data_name(name);
        let data = match source.get(&data_image) {
            Ok(data) => data.unwrap_or_default(),
            Err(source) => {
                return Err(ImageError::Io {
                    name: data_image,
                    source,
                }
                .into());
            }
        };
        Ok(Self { tree, data, image })
    }

    fn bad(&self, what: String) -> ContentError {
        ImageError::Content {
            name: self.image.clone(),
            what,
        }
        .into()
    }

    fn all(&self, dir: BorrowedFd<'_>) -> Result<(), ContentError> {
        for node in &self.tree.nodes {
            self.make(dir, node)?;
        }
        // Making children touches their parents' times, so times come last, children first.
        for node in self.tree.nodes.iter().rev() {
            if !node.on_the_way && !matches!(node.kind(), NodeKind::Socket | NodeKind::Hardlink) {
                set_times(dir, node)?;
            }
        }
        Ok(())
    }

    fn make(&self, top: BorrowedFd<'_>, node: &NodeEntry) -> Result<(), ContentError> {
        let path = Path::new(OsStr::from_bytes(&node.path));
        let plain = |p: &Path| p.components().all(|c| matches!(c, Component::Normal(_)));
        if !plain(path) {
            return Err(self.bad(format!("node path {}", path.display())));
        }
        let (dir, leaf) = parent(top, path)?;
        let dir = dir.as_fd();
        let err = |call| ContentError::node(call, path);
        if leaf.is_empty() {
            return set_attributes(dir, OsStr::new("."), node, path);
        }
        let kind = node.kind();
        if kind != NodeKind::Dir && kind != NodeKind::Socket {
            match unlinkat(dir, leaf, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(err("unlink")(e)),
            }
        }
        let special = |kind: FileType| {
            let dev = makedev(node.major, node.minor);
            mknodat(dir, leaf, kind, Mode::empty(), dev).map_err(err("mknod"))
        };
        match kind {
            NodeKind::Dir => match mkdirat(dir, leaf, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) if node.on_the_way => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(e) => return Err(err("mkdir")(e)),
            },
            NodeKind::File => self.file(dir, leaf, node, path)?,
            NodeKind::Symlink => {
                symlinkat(OsStr::from_bytes(&node.link), dir, leaf).map_err(err("symlink"))?
            }
            NodeKind::Fifo => special(FileType::Fifo)?,
            NodeKind::Char => special(FileType::CharacterDevice)?,
            NodeKind::Block => special(FileType::BlockDevice)?,
            NodeKind::Socket => return Ok(()),
            NodeKind::Hardlink => {
                let target = Path::new(OsStr::from_bytes(&node.link));
                if !plain(target) {
                    return Err(self.bad(format!("link target {}", target.display())));
                }
                let made = self.tree.nodes.iter().find(|n| n.path == node.link);
                if made.is_some_and(|n| n.kind() == NodeKind::Socket) {
                    return Ok(());
                }
                let (from, name) = parent(top, target)?;
                return linkat(&from, name, dir, leaf, AtFlags::empty()).map_err(err("link"));
            }
            NodeKind::Unset => return Err(self.bad(format!("kind of node {}", path.display()))),
        }
        set_attributes(dir, leaf, node, path)
    }

    fn file(
        &self,
        dir: BorrowedFd<'_>,
        leaf: &OsStr,
        node: &NodeEntry,
        path: &Path,
    ) -> Result<(), ContentError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(dir, leaf, flags, Mode::RUSR | Mode::WUSR)
            .map_err(ContentError::node("create", path))?;
        ftruncate(&fd, node.size).map_err(ContentError::node("truncate", path))?;
        let file = File::from(fd);
        for e in &node.extents {
            let end = e
                .file_offset
                .checked_add(e.len)
                .filter(|&end| end <= node.size);
            let bytes = e.data_offset.checked_add(e.len).and_then(|data_end| {
                self.data
                    .get(usize::try_from(e.data_offset).ok()?..usize::try_from(data_end).ok()?)
            });
            let (Some(_), Some(bytes)) = (end, bytes) else {
                return Err(self.bad(format!("extent of {} lies outside", path.display())));
            };
            file.write_all_at(bytes, e.file_offset)
                .map_err(ContentError::node("write", path))?;
        }
        Ok(())
    }
}

/// The directory a node is in, reached without symbolic links, and the node's name in it.
fn parent<'p>(top: BorrowedFd<'_>, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), ContentError> {
    let up = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let dir =
        openat2(top, up, flags, Mode::empty(), how).map_err(ContentError::node("open", up))?;
    Ok((dir, path.file_name().unwrap_or_default()))
}

/// Owner before mode (a change of owner clears setuid), both before attributes
/// (a change of owner clears file capabilities, access lists refine the mode).
fn set_attributes(
    dir: BorrowedFd<'_>,
    leaf: &OsStr,
    node: &NodeEntry,
    path: &Path,
) -> Result<(), ContentError> {
    let err = |call| ContentError::node(call, path);
    let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
    chownat(dir, leaf, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(err("chown"))?;
    if node.kind() != NodeKind::Symlink {
        // The node is ours and not a link, so following is safe; the call knows no other way.
        chmodat(
            dir,
            leaf,
            Mode::from_raw_mode(node.mode & 0o7777),
            AtFlags::empty(),
        )
        .map_err(err("chmod"))?;
    }
    let mut proc_path = format!("/proc/thread-self/fd/{}/", dir.as_raw_fd()).into_bytes();
    proc_path.extend_from_slice(leaf.as_bytes());
    for x in &node.xattrs {
        lsetxattr(
            OsStr::from_bytes(&proc_path),
            &x.name[..],
            &x.value,
            XattrFlags::empty(),
        )
        .map_err(err("setxattr"))?;
    }
    Ok(())
}

fn set_times(top: BorrowedFd<'_>, node: &NodeEntry) -> Result<(), ContentError> {
    let path = Path::new(OsStr::from_bytes(&node.path));
    let (dir, leaf) = parent(top, path)?;
    let leaf = if leaf.is_empty() {
        OsStr::new(".")
    } else {
        leaf
    };
    let time = |sec, nsec| Timespec {
        tv_sec: sec,
        tv_nsec: i64::from(nsec),
    };
    let times = Timestamps {
        last_access: time(node.atime_sec, node.atime_nsec),
        last_modification: time(node.mtime_sec, node.mtime_nsec),
    };
    utimensat(&dir, leaf, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(ContentError::node("utimensat", path))
}
