//! One open file, as a kind's `save` sees it.

use std::os::fd::BorrowedFd;

use nix::sys::stat::FileStat;

use super::error::Stop;
use super::fdinfo::FdInfo;
use super::record::RcrFile;
use super::reg::TaskRoot;
use super::sys;
use super::{FilePolicy, TaskFiles};
use crate::image::schema::{FdTypes, FileEntry, FownEntry};
use crate::sys::SysResult;

/// All that can be seen of a file without touching it.
pub(crate) struct Examined<'a> {
    /// Our duplicate of the task's descriptor.
    pub fd: BorrowedFd<'a>,
    pub info: &'a FdInfo,
    pub stat: &'a FileStat,
    /// What `/proc/PID/fd/N` points to.
    pub link: &'a str,
    pub task: &'a TaskFiles<'a>,
    pub policy: &'a FilePolicy,
    /// What is known of it already; `None`: nothing.
    pub early: Option<Early>,
}

/// What can be asked about a file while others are looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Early {
    filesystem: Option<i64>,
    owner: Option<sys::Owner>,
    /// The task finds it under the name that it was opened by.
    pub named: bool,
}

impl Early {
    /// Asks what most kinds of files need.
    pub(crate) fn of(
        fd: BorrowedFd<'_>,
        info: &FdInfo,
        stat: &FileStat,
        link: &str,
        root: Option<&TaskRoot>,
    ) -> SysResult<Self> {
        let is_path = info.flags & libc::O_PATH as u32 != 0;
        let opened = link.starts_with('/');
        let root = root.filter(|_| opened);
        let named = root.map(|r| r.has(link, stat)).transpose()?;
        Ok(Self {
            filesystem: opened.then(|| sys::filesystem(fd)).transpose()?,
            owner: (!is_path).then(|| sys::owner(fd)).transpose()?,
            named: named.unwrap_or(false),
        })
    }
}

impl Examined<'_> {
    /// Status flags without what belongs to the descriptor.
    pub(crate) fn flags(&self) -> u32 {
        self.info.flags & !(libc::O_CLOEXEC as u32)
    }

    pub(crate) fn is_path(&self) -> bool {
        self.info.flags & libc::O_PATH as u32 != 0
    }

    pub(crate) fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// Type bits of the mode.
    pub(crate) fn format(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// Filesystem type magic.
    pub(crate) fn filesystem(&self) -> SysResult<i64> {
        match self.early.and_then(|e| e.filesystem) {
            Some(known) => Ok(known),
            None => sys::filesystem(self.fd),
        }
    }

    pub(crate) fn fown(&self) -> Result<FownEntry, Stop> {
        if self.is_path() {
            return Ok(FownEntry::default());
        }
        let o = match self.early.and_then(|e| e.owner) {
            Some(known) => known,
            None => sys::owner(self.fd)?,
        };
        Ok(FownEntry {
            uid: o.uid,
            euid: o.euid,
            signum: o.signal as u32,
            pid_type: o.kind as u32,
            pid: o.pid as u32,
        })
    }
}

/// A file's record and our additions to it.
#[derive(Debug, Clone)]
pub(crate) struct Saved {
    // Large: room for one message of each kind.
    pub entry: Box<FileEntry>,
    pub extra: Box<RcrFile>,
    /// For messages: where it was first found.
    pub found: Found,
}

/// Where a file was first found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub pid: i32,
    pub comm: String,
    /// `fd 7 (pipe:[123])`, `executable`.
    pub object: String,
    pub inode: (u64, u64),
}

impl Saved {
    /// An entry of that kind whose kind-specific part is still to be set.
    pub(crate) fn new(id: u32, found: Found) -> Self {
        let entry = FileEntry {
            r#type: FdTypes::Und.into(),
            id,
            ..FileEntry::default()
        };
        Self {
            entry: Box::new(entry),
            extra: Box::new(RcrFile {
                id,
                ..RcrFile::default()
            }),
            found,
        }
    }
}
