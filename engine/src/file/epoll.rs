//! epoll(7): instances and what they watch.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::identity::{Descriptions, Held};
use super::sys;
use crate::image::schema::{EventpollFileEntry, EventpollTfdEntry, FdTypes};
use crate::sys::{SysError, SysResult};

/// Saves the list of what is watched; which files those are is known later.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let id = saved.entry.id;
    let watched = file.info.epoll.iter().map(|w| EventpollTfdEntry {
        id,
        tfd: w.fd,
        events: w.events,
        data: w.data,
        dev: Some(w.dev as u32),
        inode: Some(w.ino),
        pos: Some(w.pos),
    });
    saved.entry.r#type = FdTypes::Eventpoll.into();
    saved.entry.epfd = Some(EventpollFileEntry {
        id,
        flags: file.flags(),
        fown: file.fown()?,
        tfd: watched.collect(),
    });
    Ok(())
}

/// Finds the files an instance watches, in the order of its list.
///
/// What is watched is a description together with the number it had when it was
/// added. The number may since have been closed or given to another file.
pub(crate) fn settle(
    saved: &Saved,
    files: &Descriptions,
    live: bool,
) -> SysResult<Result<Vec<u32>, Stop>> {
    let Some(entry) = &saved.entry.epfd else {
        return Ok(Ok(Vec::new()));
    };
    let Some(epoll) = files.get(entry.id) else {
        return Ok(Ok(Vec::new()));
    };
    let mut nth: HashMap<u32, u32> = HashMap::new();
    let mut targets = Vec::new();
    for w in &entry.tfd {
        let n = nth.entry(w.tfd).or_default();
        match find(w, *n, epoll, files)? {
            Some(id) => targets.push(id),
            // A running service may have closed it in between.
            None if live => {}
            None => {
                let reason = format!(
                    "it watches a file (added as fd {}, inode {}) that no process of the service holds",
                    w.tfd,
                    w.inode.unwrap_or(0)
                );
                return Ok(refuse("epoll", reason, "untag the unit"));
            }
        }
        *n += 1;
    }
    Ok(Ok(targets))
}

fn find(
    w: &EventpollTfdEntry,
    nth: u32,
    epoll: &Held,
    files: &Descriptions,
) -> SysResult<Option<u32>> {
    let watches =
        |held: &Held| match sys::epoll_watches(epoll.fd.as_fd(), w.tfd, nth, held.fd.as_fd()) {
            Err(e) if e.errno == Errno::ENOENT => Ok(false),
            other => other,
        };
    // Nearly always it is what the number stands for.
    for slot in &epoll.slots {
        if let Some(held) = files.at(slot.pid, w.tfd)
            && watches(held)?
        {
            return Ok(Some(held.id));
        }
    }
    let (dev, ino) = (u64::from(w.dev.unwrap_or(0)), w.inode.unwrap_or(0));
    // The kernel's own form of a device number: 12 bits major, 20 bits minor.
    let inode = (
        libc::makedev((dev >> 20) as u32, (dev & 0xf_ffff) as u32),
        ino,
    );
    for held in files.of_inode(inode) {
        if watches(held)? {
            return Ok(Some(held.id));
        }
    }
    Ok(None)
}

/// Makes an empty instance; what it watches is added by a task that holds it.
pub(crate) fn restore() -> Result<OwnedFd, BuildError> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
        .map_err(|e| SysError::new("epoll_create1", "", e))?;
    Ok(epoll.0)
}

/// `struct epoll_event` as the kernel reads it (packed on x86-64).
pub(crate) fn event_bytes(w: &EventpollTfdEntry) -> Vec<u8> {
    let mut bytes = w.events.to_ne_bytes().to_vec();
    if !cfg!(target_arch = "x86_64") {
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes.extend_from_slice(&w.data.to_ne_bytes());
    bytes
}
