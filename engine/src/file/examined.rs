//! One open file, as a kind's `save` sees it.

use std::os::fd::BorrowedFd;

use nix::sys::stat::FileStat;

use super::error::Stop;
use super::fdinfo::FdInfo;
use super::record::RcrFile;
use super::sys;
use super::{FilePolicy, TaskFiles};
use crate::image::schema::{FdTypes, FileEntry, FownEntry};

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

    pub(crate) fn fown(&self) -> Result<FownEntry, Stop> {
        if self.is_path() {
            return Ok(FownEntry::default());
        }
        let o = sys::owner(self.fd)?;
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
