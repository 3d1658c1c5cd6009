//! pidfd_open(2): descriptors of processes.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::error::{BuildError, Stop};
use super::examined::{Examined, Saved};
use super::record::{RcrFile, RcrPidfd};
use super::sys;
use crate::image::schema::{FdTypes, PidfdEntry};
use crate::sys::SysError;

/// Saves which process it is. Whether that one comes along is known later.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let pid = file
        .info
        .pid
        .ok_or_else(|| SysError::new("fdinfo", "Pid", nix::errno::Errno::ENODATA))?;
    let gone = pid < 0;
    saved.extra.pidfd = Some(RcrPidfd {
        pid: (!gone).then_some(pid),
        exit_status: gone.then(|| sys::pidfd_exit_status(file.fd)).flatten(),
        thread: None,
    });
    saved.entry.r#type = FdTypes::Pidfd.into();
    saved.entry.pidfd = Some(PidfdEntry {
        id: saved.entry.id,
        ino: file.stat.st_ino as u32,
        flags: file.flags(),
        nspid: pid,
        fown: file.fown()?,
    });
    Ok(())
}

/// Pidfds of processes that are gone, by the inode they had.
#[derive(Debug, Default)]
pub(crate) struct Dead {
    /// Flags of each descriptor still to be made.
    wanted: BTreeMap<u32, Vec<(u32, i32)>>,
    made: BTreeMap<u32, OwnedFd>,
}

impl Dead {
    /// Finds them among the files.
    pub(crate) fn new<'a>(entries: impl Iterator<Item = &'a PidfdEntry>) -> Self {
        let mut wanted: BTreeMap<u32, Vec<(u32, i32)>> = BTreeMap::new();
        for e in entries.filter(|e| e.nspid < 0) {
            let list = wanted.entry(e.ino).or_default();
            list.push((e.id, thread_flag(e.flags)));
        }
        Self {
            wanted,
            made: BTreeMap::new(),
        }
    }

    fn take(&mut self, entry: &PidfdEntry, status: i32) -> Result<OwnedFd, BuildError> {
        if let Some(all) = self.wanted.remove(&entry.ino) {
            let flags: Vec<i32> = all.iter().map(|(_, f)| *f).collect();
            let fds = sys::pidfds_of_the_dead(status, &flags)?;
            self.made.extend(all.iter().map(|(id, _)| *id).zip(fds));
        }
        let missing = || BuildError::Images("a pidfd of a process that is gone, twice".into());
        self.made.remove(&entry.id).ok_or_else(missing)
    }
}

/// Opens it, `here` telling our number for a task, or one of a process that has ended in the same way.
pub(crate) fn restore(
    entry: &PidfdEntry,
    extra: Option<&RcrFile>,
    dead: &mut Dead,
    here: impl Fn(i32) -> i32,
) -> Result<OwnedFd, BuildError> {
    let target = extra.and_then(|e| e.pidfd);
    if entry.nspid < 0 {
        let status = target.and_then(|t| t.exit_status).unwrap_or(0);
        return dead.take(entry, status);
    }
    let pid = target.and_then(|t| t.pid).unwrap_or(entry.nspid);
    Ok(sys::pidfd_open(here(pid), thread_flag(entry.flags))?)
}

fn thread_flag(flags: u32) -> i32 {
    flags as i32 & sys::PIDFD_THREAD
}

/// A descriptor that gives way to one of a thread.
pub(crate) fn stand_in() -> Result<OwnedFd, BuildError> {
    Ok(sys::pidfd_open(std::process::id() as i32, 0)?)
}
