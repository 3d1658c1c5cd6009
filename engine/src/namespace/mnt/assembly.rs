//! The mounts of a namespace while it is put together.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2};
use rustix::io::Errno;

use super::build::place_of;
use super::schema::{MountEntry, MountsEntry};
use super::sources::make_dirs;
use crate::namespace::NamespaceError;

/// A mount that is made but not attached, and where it goes.
#[derive(Debug)]
pub(super) struct Piece {
    pub mount: OwnedFd,
    /// The place in its parent; none for the root, and for what waits for its parent.
    pub place: Option<OwnedFd>,
}

/// What is made of an image's mounts.
#[derive(Debug)]
pub(super) struct Assembly {
    pub image: MountsEntry,
    /// For each mount, as far as they are made; none for what is left out.
    pub pieces: Vec<Option<Piece>>,
    /// Which of them wait for a process to be born, or are on one that does.
    pub waiting: Vec<bool>,
    /// The host's own mounts that some are peers of, by place in the list.
    pub host_places: HashMap<u32, OwnedFd>,
}

impl Assembly {
    /// Where a mount goes: into its parent, or, while that is absent, into what
    /// that would be mounted on. None if there is no such place.
    pub fn place(
        &self,
        m: &MountEntry,
        parent_at: usize,
    ) -> Result<Option<OwnedFd>, NamespaceError> {
        let above = &self.image.mounts[parent_at];
        let below = place_of(m)
            .strip_prefix(place_of(above))
            .unwrap_or(place_of(m));
        let Some(parent) = &self.pieces[parent_at] else {
            let Some(next) = above.parent else {
                return Ok(None);
            };
            let place = self.place(above, next as usize)?;
            return Ok(place.filter(|_| below.as_os_str().is_empty()));
        };
        match open_below(&parent.mount, below) {
            Ok(place) => Ok(Some(place)),
            Err(Errno::NOENT) if self.made_by_kernel(above) => Ok(None),
            Err(Errno::NOENT) if above.own.is_some() => self.make_place(m, parent, below).map(Some),
            Err(e) => Err(NamespaceError::call("open", place_of(m))(e)),
        }
    }

    /// Makes a place to mount on in a file system whose content nobody could see.
    fn make_place(
        &self,
        m: &MountEntry,
        parent: &Piece,
        below: &Path,
    ) -> Result<OwnedFd, NamespaceError> {
        let err = |call| NamespaceError::call(call, place_of(m));
        let dir = make_dirs(&parent.mount, below.parent().unwrap_or(Path::new("")))?;
        let leaf = below.file_name().unwrap_or_default();
        let is_dir = m
            .way
            .last()
            .is_none_or(|w| w.mode & libc::S_IFMT == libc::S_IFDIR);
        if is_dir {
            mkdirat(&dir, leaf, Mode::from_raw_mode(0o755)).map_err(err("mkdir"))?;
        } else {
            let mode = Mode::empty();
            mknodat(&dir, leaf, FileType::RegularFile, mode, 0).map_err(err("mknod"))?;
        }
        open_below(&dir, Path::new(leaf)).map_err(err("open"))
    }

    /// Whether the kernel decides which files its origin has, so that another may lack some.
    pub fn made_by_kernel(&self, m: &MountEntry) -> bool {
        let fstype = match (m.host, m.own) {
            (Some(h), _) => &self.image.hosts[h as usize].fstype,
            (_, Some(o)) => &self.image.owns[o as usize].fstype,
            _ => return false,
        };
        matches!(
            fstype.as_str(),
            "proc" | "sysfs" | "debugfs" | "tracefs" | "securityfs"
        )
    }
}

/// Opens a place below a mount's root, on that mount and through no symbolic link.
pub(super) fn open_below(top: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match openat2(top, path, flags, Mode::empty(), how) {
        // The root of a mount that shows a single file is no directory to start from.
        Err(Errno::NOTDIR) if path == Path::new(".") => rustix::io::dup(top),
        other => other,
    }
}
