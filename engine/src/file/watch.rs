//! Where the inodes are that inotify and fanotify watch: the kernel names them
//! by device and file handle, a restore needs a path.

use std::fs::{DirEntry, read_dir};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;

use super::TaskFiles;
use super::examined::Examined;
use super::fdinfo::{FdInfo, Mark};
use super::record::RcrWatched;
use super::reg::{self, Whereabouts};
use super::sys;
use crate::namespace::mnt::mountinfo::{self, MountInfo};
use crate::sys::{SysError, SysResult};

/// How many names are looked at where a file system has no handles.
const NAMES_MAX: usize = 200_000;

/// Where a watched inode is.
#[derive(Debug)]
pub(crate) enum Place {
    /// It has a name.
    Named(RcrWatched),
    /// It has none any more; its `(st_dev, st_ino)`.
    Nameless((u64, u64)),
    /// Nothing leads to it.
    Lost,
}

/// Looks for the inode of a mark among the mounts of a task.
pub(crate) fn find(mark: &Mark, file: &Examined<'_>) -> SysResult<Place> {
    let task = file.task;
    let mounts = mounts(task)?;
    let dev = mark.st_dev();
    let here = |m: &&MountInfo| libc::makedev(m.dev.0, m.dev.1) == dev;
    for mount in mounts.iter().filter(here) {
        let Some(root) = open_mount(task, mount) else {
            continue;
        };
        if let Some(fd) = by_handle(mark, root.as_fd()) {
            match name_of(fd.as_fd(), file)? {
                Place::Lost => {}
                place => return Ok(place),
            }
        }
    }
    for mount in mounts.iter().filter(here) {
        if let Some(fd) = by_number(mark, task, mount) {
            return name_of(fd.as_fd(), file);
        }
    }
    Ok(Place::Lost)
}

/// Another name of a file that has lost the one it was opened by: first where
/// that was, then anywhere on its mount.
pub(crate) fn other_name(file: &Examined<'_>, lost: &str) -> SysResult<Option<String>> {
    let id = file
        .info
        .other("mnt_id")
        .and_then(|v| v.parse::<u32>().ok());
    let mounts = mounts(file.task)?;
    let by_id = mounts.iter().find(|m| Some(m.id) == id);
    // Those without a descriptor show no mount: the one their name is below.
    let below = |m: &&MountInfo| Path::new(lost).starts_with(&m.mountpoint);
    let longest = mounts
        .iter()
        .filter(below)
        .max_by_key(|m| m.mountpoint.as_os_str().len());
    let Some(mount) = by_id.or(longest) else {
        return Ok(None);
    };
    let wanted = |path: &Path| {
        let fd = open_path(path)?;
        let stat = fstat(&fd).ok()?;
        ((stat.st_dev, stat.st_ino) == file.inode()).then_some(fd)
    };
    let dir = Path::new(lost).parent().unwrap_or(Path::new("/"));
    let near = dir
        .strip_prefix(&mount.mountpoint)
        .ok()
        .map(|d| mount.mountpoint.join(d));
    for (top, deep) in near
        .iter()
        .map(|d| (d.as_path(), false))
        .chain([(mount.mountpoint.as_path(), true)])
    {
        if let Some(fd) = walk(file.task, top, file.stat.st_ino, deep, wanted)
            && let Place::Named(place) = name_of(fd.as_fd(), file)?
            && place.mnt_ns == Some(file.task.mnt_ns)
        {
            return Ok(place.path);
        }
    }
    Ok(None)
}

/// The root of the mount a mark sits on, or of one of its file system's mounts.
pub(crate) fn find_mount(mark: &Mark, file: &Examined<'_>) -> SysResult<Place> {
    let dev = mark.st_dev();
    let wanted = |m: &&MountInfo| match mark.mnt_id {
        Some(id) => m.id == id,
        None => libc::makedev(m.dev.0, m.dev.1) == dev,
    };
    for mount in mounts(file.task)?.iter().filter(wanted) {
        if let Some(root) = open_mount(file.task, mount) {
            match name_of(root.as_fd(), file)? {
                Place::Lost => {}
                place => return Ok(place),
            }
        }
    }
    Ok(Place::Lost)
}

fn mounts(task: &TaskFiles<'_>) -> SysResult<Vec<MountInfo>> {
    let path = format!("/proc/{}/mountinfo", task.pid);
    let failed = |e| SysError::new("read", &path, e);
    let text = std::fs::read(&path).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        failed(nix::errno::Errno::from_raw(errno))
    })?;
    mountinfo::parse(&text).map_err(|_| failed(nix::errno::Errno::EINVAL))
}

/// `None`: something else is mounted on top.
fn open_mount(task: &TaskFiles<'_>, mount: &MountInfo) -> Option<OwnedFd> {
    let root = reg::open_dir(&format!("/proc/{}/root", task.pid)).ok()?;
    let path = std::os::unix::ffi::OsStrExt::as_bytes(mount.mountpoint.as_os_str());
    let path = std::ffi::CString::new(path).ok()?;
    let fd = sys::open_in_root(root.as_fd(), &path, libc::O_PATH | libc::O_NOFOLLOW, 0).ok()?;
    let is = fstat(&fd).ok()?.st_dev;
    (is == libc::makedev(mount.dev.0, mount.dev.1)).then_some(fd)
}

/// Opens a handle in a mount. The call takes no O_PATH descriptor for the mount
/// and others would be noticed by who watches it, so a thread goes there.
fn by_handle(mark: &Mark, mount: BorrowedFd<'_>) -> Option<OwnedFd> {
    if mark.handle.is_empty() {
        return None;
    }
    let fd = std::thread::scope(|s| {
        let go = s.spawn(|| {
            sys::go_alone(mount).ok()?;
            sys::open_by_handle_here(mark.handle_kind, &mark.handle).ok()
        });
        go.join().ok().flatten()
    })?;
    is_marked(mark, fd.as_fd()).then_some(fd)
}

/// Looks for a mark by going through names.
fn by_number(mark: &Mark, task: &TaskFiles<'_>, mount: &MountInfo) -> Option<OwnedFd> {
    let marked = |path: &Path| open_path(path).filter(|fd| is_marked(mark, fd.as_fd()));
    walk(task, &mount.mountpoint, mark.ino?, true, marked)
}

/// Goes through the names below a directory of the task, breadth first, for
/// one of inode number `ino` that `take` agrees to.
fn walk(
    task: &TaskFiles<'_>,
    top: &Path,
    ino: u64,
    deep: bool,
    take: impl Fn(&Path) -> Option<OwnedFd>,
) -> Option<OwnedFd> {
    let root = PathBuf::from(format!("/proc/{}/root", task.pid));
    let top = root.join(top.strip_prefix("/").ok()?);
    if let Some(fd) = take(&top) {
        return Some(fd);
    }
    let dev = std::fs::metadata(&top).ok()?.dev();
    let mut dirs = std::collections::VecDeque::from([top]);
    let mut looked = 0;
    let on = |e: &DirEntry| e.metadata().ok().map(|m| m.dev());
    while let Some(dir) = dirs.pop_front() {
        // What cannot be read, or is gone meanwhile, is not what we look for.
        for entry in read_dir(&dir).into_iter().flatten().flatten() {
            looked += 1;
            if looked > NAMES_MAX {
                return None;
            }
            if entry.ino() == ino
                && let Some(fd) = take(&entry.path())
            {
                return Some(fd);
            }
            if deep && is_dir(&entry) && on(&entry) == Some(dev) {
                dirs.push_back(entry.path());
            }
        }
    }
    None
}

fn is_dir(entry: &DirEntry) -> bool {
    entry.file_type().is_ok_and(|t| t.is_dir())
}

fn open_path(path: &Path) -> Option<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    Some(file.into())
}

/// Whether a watch on `fd` is one on the same inode: stat(2) may show other
/// numbers than the kernel's own.
fn is_marked(mark: &Mark, fd: BorrowedFd<'_>) -> bool {
    let probe = || -> SysResult<Option<Mark>> {
        let instance = sys::inotify_init()?;
        sys::inotify_add_watch(instance.as_fd(), fd, libc::IN_DELETE_SELF)?;
        let path = format!("/proc/self/fdinfo/{}", instance.as_raw_fd());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        Ok(FdInfo::parse(&text)
            .ok()
            .and_then(|i| i.marks.into_iter().next()))
    };
    let same = |m: &Mark| (m.ino, m.dev) == (mark.ino, mark.dev);
    probe().ok().flatten().is_some_and(|m| same(&m))
}

/// The name under which the task, or we, find `fd`.
fn name_of(fd: BorrowedFd<'_>, file: &Examined<'_>) -> SysResult<Place> {
    let stat = fstat(fd).map_err(|e| SysError::new("fstat", "a watched file", e))?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link = link.unwrap_or_default().to_string_lossy().into_owned();
    let info = FdInfo {
        flags: libc::O_PATH as u32,
        ..FdInfo::default()
    };
    let target = Examined {
        fd,
        info: &info,
        stat: &stat,
        link: &link,
        early: None,
        ..*file
    };
    Ok(match reg::whereabouts(&target) {
        Ok(Whereabouts::Named { name, mnt_ns }) => Place::Named(RcrWatched {
            path: Some(name),
            mnt_ns: Some(mnt_ns),
            file: None,
        }),
        Ok(Whereabouts::Unlinked { .. }) if stat.st_nlink == 0 => {
            Place::Nameless((stat.st_dev, stat.st_ino))
        }
        Ok(_) | Err(super::error::Stop::Refuse { .. }) => Place::Lost,
        Err(super::error::Stop::Sys(e)) => return Err(e),
    })
}
