//! Saving a tree: first the list of nodes with the places of their data, then
//! the data straight into the store's memory.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, SeekFrom, Statx, StatxFlags, lgetxattr, llistxattr, openat,
    readlinkat, seek, statx,
};
use rustix::io::Errno;

use super::schema::{ExtentEntry, NodeEntry, NodeKind, TreeEntry, XattrEntry};
use super::{ContentError, data_name, list_name};
use crate::image::{ImageError, ImageSink, Kind, put_records};

/// What a saved tree amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TreeStats {
    /// Nodes in the list.
    pub nodes: usize,
    /// Bytes of file data.
    pub data_bytes: u64,
}

/// Saves the directory `dir` and everything below it on the same mount.
pub fn save_tree(
    dir: BorrowedFd<'_>,
    name: &str,
    sink: &mut dyn ImageSink,
) -> Result<TreeStats, ContentError> {
    let mut walk = Walk::default();
    walk.root(dir)?;
    walk.store(name, sink)
}

/// Saves one node, named `leaf` in `dir`, with everything below it.
///
/// It comes back with [`super::restore_node`].
pub fn save_node(
    dir: BorrowedFd<'_>,
    leaf: &OsStr,
    name: &str,
    sink: &mut dyn ImageSink,
) -> Result<TreeStats, ContentError> {
    let mut walk = Walk::default();
    walk.node(dir, leaf, Path::new(leaf), None)?;
    walk.store(name, sink)
}

/// How many bytes [`save_tree`] would put into the store, about.
pub fn estimate_tree(dir: BorrowedFd<'_>) -> Result<u64, ContentError> {
    let mut walk = Walk::default();
    walk.root(dir)?;
    Ok(walk.estimate())
}

/// A walk through trees and what it found.
#[derive(Debug, Default)]
pub(super) struct Walk {
    nodes: Vec<NodeEntry>,
    /// Where each file with data was found, by index into `nodes`.
    files: Vec<(usize, OwnedFd)>,
    data_bytes: u64,
    seen: HashMap<(u32, u32, u64), Vec<u8>>,
}

impl Walk {
    /// Takes `dir` as the tree's root.
    pub(super) fn root(&mut self, dir: BorrowedFd<'_>) -> Result<(), ContentError> {
        let top = Path::new("");
        let dir = openat(
            dir,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(ContentError::node("open", top))?;
        let stat = stat_at(dir.as_fd(), OsStr::new(""), top)?;
        let mut node = describe(&stat, top)?;
        node.xattrs = xattrs(&format!("/proc/thread-self/fd/{}/.", dir.as_raw_fd()), top)?;
        self.nodes.push(node);
        self.children(dir, top, stat.stx_mnt_id)
    }

    /// Takes one node; `mount` is the mount it must be on, to be taken with content.
    pub(super) fn node(
        &mut self,
        dir: BorrowedFd<'_>,
        leaf: &OsStr,
        path: &Path,
        mount: Option<u64>,
    ) -> Result<(), ContentError> {
        let stat = match stat_at(dir, leaf, path) {
            Err(ContentError::Node { source, .. })
                if mount.is_some() && source.kind() == io::ErrorKind::NotFound =>
            {
                return Ok(()); // removed since the directory was read
            }
            other => other?,
        };
        if mount.is_some_and(|m| m != stat.stx_mnt_id) {
            return Ok(());
        }
        let mut node = describe(&stat, path)?;
        let kind = node.kind();
        if kind != NodeKind::Dir && stat.stx_nlink > 1 {
            let id = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
            if let Some(first) = self.seen.get(&id) {
                node.set_kind(NodeKind::Hardlink);
                node.link = first.clone();
                self.nodes.push(node);
                return Ok(());
            }
            self.seen.insert(id, node.path.clone());
        }
        let mut proc_path = format!("/proc/thread-self/fd/{}/", dir.as_raw_fd()).into_bytes();
        proc_path.extend_from_slice(leaf.as_bytes());
        node.xattrs = xattrs(OsStr::from_bytes(&proc_path), path)?;
        match kind {
            NodeKind::Symlink => {
                let target = readlinkat(dir, leaf, Vec::new())
                    .map_err(ContentError::node("readlink", path))?;
                node.link = target.into_bytes();
            }
            NodeKind::File if stat.stx_size > 0 => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(dir, leaf, flags | OFlags::NOATIME, Mode::empty())
                    .map_err(ContentError::node("open", path))?;
                node.extents = self.extents(&file, stat.stx_size, path)?;
                self.files.push((self.nodes.len(), file));
            }
            _ => {}
        }
        self.nodes.push(node);
        if kind == NodeKind::Dir {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let child = openat(dir, leaf, flags, Mode::empty())
                .map_err(ContentError::node("open", path))?;
            self.children(child, path, stat.stx_mnt_id)?;
        }
        Ok(())
    }

    /// Adds a directory that only leads to something, without its content.
    pub(super) fn on_the_way(
        &mut self,
        dir: BorrowedFd<'_>,
        leaf: &OsStr,
        path: &Path,
    ) -> Result<(), ContentError> {
        if self
            .nodes
            .iter()
            .any(|n| n.path == path.as_os_str().as_bytes())
        {
            return Ok(());
        }
        let mut node = describe(&stat_at(dir, leaf, path)?, path)?;
        node.on_the_way = true;
        self.nodes.push(node);
        Ok(())
    }

    fn children(&mut self, dir: OwnedFd, path: &Path, mount: u64) -> Result<(), ContentError> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&dir).map_err(ContentError::node("readdir", path))? {
            let entry = entry.map_err(ContentError::node("readdir", path))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        names.sort();
        for name in names {
            let child = if path.as_os_str().is_empty() {
                PathBuf::from(&name)
            } else {
                path.join(&name)
            };
            self.node(dir.as_fd(), &name, &child, Some(mount))?;
        }
        Ok(())
    }

    fn extents(
        &mut self,
        file: &OwnedFd,
        size: u64,
        path: &Path,
    ) -> Result<Vec<ExtentEntry>, ContentError> {
        let mut extents = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match seek(file, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => break,
                other => other.map_err(ContentError::node("lseek", path))?,
            };
            let end = match seek(file, SeekFrom::Hole(start)) {
                Err(Errno::NXIO) => break,
                other => other.map_err(ContentError::node("lseek", path))?.min(size),
            };
            if end <= start {
                break;
            }
            let len = end - start;
            extents.push(ExtentEntry {
                file_offset: start,
                data_offset: self.data_bytes,
                len,
            });
            self.data_bytes += len;
            at = end;
        }
        Ok(extents)
    }

    pub(super) fn estimate(&self) -> u64 {
        let list: usize = self.nodes.iter().map(prost::Message::encoded_len).sum();
        self.data_bytes + list as u64 + 4096
    }

    pub(super) fn store(
        self,
        name: &str,
        sink: &mut dyn ImageSink,
    ) -> Result<TreeStats, ContentError> {
        let stats = TreeStats {
            nodes: self.nodes.len(),
            data_bytes: self.data_bytes,
        };
        if self.data_bytes > 0 {
            let image = data_name(name);
            let failed = |source| ImageError::Io {
                name: image.clone(),
                source,
            };
            let len = usize::try_from(self.data_bytes)
                .map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
            let data = sink.reserve(&image, len).map_err(failed)?;
            for (index, fd) in self.files {
                let node = &self.nodes[index];
                let file = File::from(fd);
                for e in &node.extents {
                    let at = e.data_offset as usize;
                    fill(&file, &mut data[at..at + e.len as usize], e.file_offset).map_err(
                        ContentError::node("read", Path::new(OsStr::from_bytes(&node.path))),
                    )?;
                }
            }
        }
        let tree = TreeEntry {
            nodes: self.nodes,
            data_bytes: self.data_bytes,
        };
        put_records(sink, Kind::RcrContent, &list_name(name), &[tree])?;
        Ok(stats)
    }
}

/// Reads `into` full; what is missing since the file was measured reads as zeros.
fn fill(file: &File, into: &mut [u8], mut offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset) {
            Ok(0) => {
                into[done..].fill(0);
                break;
            }
            Ok(n) => {
                done += n;
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn stat_at(dir: BorrowedFd<'_>, leaf: &OsStr, path: &Path) -> Result<Statx, ContentError> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(dir, leaf, flags, wanted).map_err(ContentError::node("statx", path))
}

fn describe(stat: &Statx, path: &Path) -> Result<NodeEntry, ContentError> {
    let mode = u32::from(stat.stx_mode);
    let kind = match mode & libc::S_IFMT {
        libc::S_IFREG => NodeKind::File,
        libc::S_IFDIR => NodeKind::Dir,
        libc::S_IFLNK => NodeKind::Symlink,
        libc::S_IFIFO => NodeKind::Fifo,
        libc::S_IFCHR => NodeKind::Char,
        libc::S_IFBLK => NodeKind::Block,
        libc::S_IFSOCK => NodeKind::Socket,
        _ => return Err(ContentError::node("statx", path)(Errno::INVAL)),
    };
    Ok(NodeEntry {
        path: path.as_os_str().as_bytes().to_vec(),
        kind: kind.into(),
        mode: mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        major: stat.stx_rdev_major,
        minor: stat.stx_rdev_minor,
        size: stat.stx_size,
        atime_sec: stat.stx_atime.tv_sec,
        atime_nsec: stat.stx_atime.tv_nsec,
        mtime_sec: stat.stx_mtime.tv_sec,
        mtime_nsec: stat.stx_mtime.tv_nsec,
        ..NodeEntry::default()
    })
}

fn xattrs<P: AsRef<OsStr> + ?Sized>(
    proc_path: &P,
    path: &Path,
) -> Result<Vec<XattrEntry>, ContentError> {
    let at = Path::new(proc_path.as_ref());
    let mut names = Vec::with_capacity(64 << 10);
    match llistxattr(at, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(ContentError::node("listxattr", path)(e)),
    }
    let mut list = Vec::new();
    for name in names.split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let mut value = Vec::with_capacity(64 << 10);
        lgetxattr(at, name, rustix::buffer::spare_capacity(&mut value))
            .map_err(ContentError::node("getxattr", path))?;
        list.push(XattrEntry {
            name: name.to_vec(),
            value,
        });
    }
    Ok(list)
}
