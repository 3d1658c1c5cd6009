//! Tracking that outlives the program that began it: a process that holds the
//! userfaultfds, named in the images that they belong to.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::asleep::{Sleeper, Sleepers};
use super::{PreDumpError, Tracking};
use crate::dump::boot_id;
use crate::file::sys::pidfd_getfd;
use crate::image::{ImageSource, Kind, get_records};
use crate::sys::keeper;
use crate::sys::process::pidfd_open;
use crate::sys::userfault::WriteWatch;
use crate::tree::Stat;

/// Name of [`RcrTracking`]'s image.
pub const IMAGE: &str = "rcr-tracking.img";

/// Once per pre-dump: what its tracking is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrTracking {
    /// Equal in the images and in the tracking that began with them.
    #[prost(uint64, required, tag = "1")]
    pub generation: u64,
    /// Who holds it, if it outlives the program.
    #[prost(message, optional, tag = "2")]
    pub keeper: Option<Keeper>,
    /// Threads whose sleep was interrupted.
    #[prost(message, repeated, tag = "3")]
    pub sleepers: Vec<Sleeper>,
}

/// The process that holds a tracking.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Keeper {
    /// Boot in which it runs.
    #[prost(string, required, tag = "1")]
    pub boot_id: String,
    /// Its pid.
    #[prost(int32, required, tag = "2")]
    pub pid: i32,
    /// When it was started, clock ticks since boot (proc_pid_stat(5)).
    #[prost(uint64, required, tag = "3")]
    pub start_time: u64,
    /// What it holds.
    #[prost(message, repeated, tag = "4")]
    pub held: Vec<Held>,
}

/// A process that is tracked.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Held {
    /// The process.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// Number of its userfaultfd in the keeper; none where it shares the memory
    /// of another process.
    #[prost(int32, optional, tag = "2")]
    pub fd: Option<i32>,
}

/// Starts a keeper.
pub(super) fn start(tracking: &Tracking) -> Result<Keeper, PreDumpError> {
    let mut held: Vec<BorrowedFd<'_>> = Vec::new();
    let mut until: Vec<OwnedFd> = Vec::new();
    let mut named = Vec::new();
    for (&pid, watch) in &tracking.watches {
        match pidfd_open(pid) {
            Ok(pidfd) => until.push(pidfd),
            // It has ended meanwhile: nothing to keep.
            Err(e) if e.errno == Errno::ESRCH => continue,
            Err(e) => return Err(e.into()),
        }
        held.push(watch.as_fd());
        named.push(Held {
            pid,
            fd: Some(watch.as_fd().as_raw_fd()),
        });
    }
    named.extend(tracking.mates.iter().map(|&pid| Held { pid, fd: None }));
    let until: Vec<BorrowedFd<'_>> = until.iter().map(AsFd::as_fd).collect();
    let pid = keeper::hold(&held, &until).map_err(PreDumpError::io("starting a keeper"))?;
    let start_time = start_time(pid).ok_or(PreDumpError::Keeper { pid })?;
    Ok(Keeper {
        boot_id: boot_id().map_err(PreDumpError::io("boot_id"))?,
        pid,
        start_time,
        held: named,
    })
}

/// Takes the tracking that belongs to images over from its keeper, which ends.
/// `None`: nobody has it any more, so nothing is known to be unchanged.
pub fn take(images: &dyn ImageSource) -> Result<Option<Tracking>, PreDumpError> {
    let records: Vec<RcrTracking> = get_records(images, Kind::RcrTasks, IMAGE)?;
    let Some(record) = records.into_iter().next() else {
        return Ok(None);
    };
    let Some(k) = record.keeper else {
        return Ok(None);
    };
    if boot_id().map_err(PreDumpError::io("boot_id"))? != k.boot_id {
        return Ok(None);
    }
    let Ok(pidfd) = pidfd_open(k.pid) else {
        return Ok(None);
    };
    // Behind the pidfd is one process for good; now see whether it is the one.
    if start_time(k.pid) != Some(k.start_time) {
        return Ok(None);
    }
    let mut tracking = Tracking {
        generation: record.generation,
        sleepers: Sleepers::from_records(&record.sleepers),
        ..Tracking::default()
    };
    for h in &k.held {
        match h.fd {
            Some(fd) => {
                let fd = pidfd_getfd(pidfd.as_fd(), fd)?;
                tracking.watches.insert(h.pid, WriteWatch::from_ready(fd));
            }
            None => drop(tracking.mates.insert(h.pid)),
        }
    }
    keeper::end(pidfd.as_fd())?;
    Ok(Some(tracking))
}

/// Processes whose memory is tracked for the sake of these images.
pub fn tracked(images: &dyn ImageSource) -> Result<Vec<i32>, PreDumpError> {
    let records: Vec<RcrTracking> = get_records(images, Kind::RcrTasks, IMAGE)?;
    let keepers = records.into_iter().filter_map(|r| r.keeper);
    Ok(keepers.flat_map(|k| k.held).map(|h| h.pid).collect())
}

fn start_time(pid: i32) -> Option<u64> {
    let bytes = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    Some(Stat::parse(&bytes)?.number(22))
}
