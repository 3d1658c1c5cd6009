//! inotify(7): instances and their watches.
//!
//! Watches keep their numbers. Events that wait to be read cannot be carried:
//! the kernel gives them to a reader alone and takes none from us. An instance
//! that had some comes back with IN_Q_OVERFLOW in its queue, which tells the
//! program that events were lost and that it has to look for itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::read;

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::fdinfo::Mark;
use super::sys;
use super::watch::{self, Place};
use crate::image::schema::{FdTypes, FhEntry, InotifyFileEntry, InotifyWdEntry};
use crate::sys::{SysError, SysResult};

/// Words a handle has in the images.
const HANDLE_WORDS: usize = 16;
/// Bytes of an event without a name.
const EVENT_BYTES: usize = 16;

/// A watched file without a name: number in the list, and its inode.
pub(crate) type Nameless = Vec<(usize, (u64, u64))>;

/// Saves the watches, and where what they watch is.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<Nameless, Stop> {
    let id = saved.entry.id;
    let mut nameless = Nameless::new();
    let mut watches = Vec::new();
    let mut marks: Vec<&Mark> = file.info.marks.iter().collect();
    marks.sort_by_key(|m| m.wd);
    for (i, mark) in marks.into_iter().enumerate() {
        let wd = mark.wd.unwrap_or(0);
        match watch::find(mark, file)? {
            Place::Named(place) => saved.extra.watched.push(place),
            Place::Nameless(inode) => {
                nameless.push((i, inode));
                saved.extra.watched.push(Default::default());
            }
            Place::Lost => {
                let reason = format!(
                    "watch {wd} is on inode {} of device {:#x}, to which no path was found",
                    mark.ino.unwrap_or(0),
                    mark.dev.unwrap_or(0)
                );
                return refuse("inotify", reason, "restart the service, or untag the unit");
            }
        }
        let path = saved.extra.watched[i].path.clone();
        watches.push(InotifyWdEntry {
            id,
            i_ino: mark.ino.unwrap_or(0),
            mask: mark.mask,
            ignored_mask: mark.ignored_mask,
            s_dev: mark.dev.unwrap_or(0),
            wd: wd as u32,
            f_handle: handle(mark, path),
        });
    }
    if file.policy.payload && sys::bytes_waiting(file.fd)? > 0 {
        saved.extra.events_lost = Some(true);
    }
    saved.entry.r#type = FdTypes::Inotify.into();
    saved.entry.ify = Some(Box::new(InotifyFileEntry {
        id,
        flags: file.flags(),
        fown: file.fown()?,
        wd: watches,
    }));
    Ok(nameless)
}

/// A mark's handle as the images have it.
pub(crate) fn handle(mark: &Mark, path: Option<String>) -> FhEntry {
    let mut words: Vec<u64> = mark
        .handle
        .chunks(8)
        .map(|c| {
            let mut word = [0; 8];
            word[..c.len()].copy_from_slice(c);
            u64::from_le_bytes(word)
        })
        .collect();
    words.resize(words.len().max(HANDLE_WORDS), 0);
    FhEntry {
        bytes: mark.handle.len() as u32,
        r#type: mark.handle_kind,
        handle: words,
        path,
        mnt_id: None,
    }
}

/// Makes an instance that watches nothing yet.
pub(crate) fn restore() -> Result<OwnedFd, BuildError> {
    Ok(sys::inotify_init()?)
}

/// Adds the watches. To be done when nothing of ours touches files any more.
pub(crate) fn rewatch<'a>(
    instance: BorrowedFd<'_>,
    entry: &InotifyFileEntry,
    events_lost: bool,
    mut target: impl FnMut(usize) -> Result<super::Target<'a>, BuildError>,
) -> Result<(), BuildError> {
    let mut watches: Vec<(usize, &InotifyWdEntry)> = entry.wd.iter().enumerate().collect();
    watches.sort_by_key(|(_, w)| w.wd);
    let flags = sys::status_flags(instance)?;
    sys::set_status_flags(instance, flags | libc::O_NONBLOCK)?;
    for (i, w) in watches {
        let wanted = w.wd as i32;
        let on = target(i)?;
        loop {
            let wd = sys::inotify_add_watch(instance, on.as_fd(), w.mask)?;
            if wd == wanted {
                break;
            }
            if wd > wanted {
                let reason = format!("watch number {wanted} twice, or out of order");
                return Err(BuildError::Images(reason));
            }
            sys::inotify_rm_watch(instance, wd)?;
            // The end of a watch is an event too.
            drain(instance, 0)?;
        }
    }
    if events_lost {
        overflow(instance)?;
    }
    sys::set_status_flags(instance, flags)?;
    Ok(())
}

/// Leaves IN_Q_OVERFLOW, and nothing else, in the queue.
fn overflow(instance: BorrowedFd<'_>) -> Result<(), BuildError> {
    const LIMIT: &str = "/proc/sys/fs/inotify/max_queued_events";
    let limit = std::fs::read_to_string(LIMIT)
        .ok()
        .and_then(|s| s.trim().parse::<usize>().ok())
        .ok_or_else(|| SysError::new("read", LIMIT, Errno::ENODATA))?;
    let dummy = nix::sys::memfd::memfd_create(c"", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|e| SysError::new("memfd_create", "", e))?;
    // As many events as there is room for, each different from the one before.
    for _ in 0..=limit {
        let wd = sys::inotify_add_watch(instance, dummy.as_fd(), libc::IN_ATTRIB)?;
        sys::inotify_rm_watch(instance, wd)?;
    }
    drain(instance, EVENT_BYTES)?;
    Ok(())
}

/// Reads events without names until `leave` bytes are there.
fn drain(instance: BorrowedFd<'_>, leave: usize) -> SysResult<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let waiting = sys::bytes_waiting(instance)?.saturating_sub(leave);
        if waiting == 0 {
            return Ok(());
        }
        let len = waiting.min(buffer.len());
        read(instance, &mut buffer[..len]).map_err(|e| SysError::new("read", "inotify", e))?;
    }
}
