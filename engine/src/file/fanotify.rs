//! fanotify(7): groups and their marks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::inotify::{Nameless, handle};
use super::sys;
use super::watch::{self, Place};
use crate::image::schema::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes,
    MarkType,
};

/// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`.
const PERMISSION: u32 = 0x17_0000;
/// What a mark keeps of the flags it was made with: `FAN_MARK_IGNORED_SURV_MODIFY`,
/// `FAN_MARK_EVICTABLE`, `FAN_MARK_IGNORE`.
const KEPT: u32 = 0x40 | 0x200 | 0x400;
const FAN_MARK_ADD: u32 = 1;
const FAN_MARK_MOUNT: u32 = 0x10;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_MARK_FILESYSTEM: u32 = 0x100;
const FAN_MARK_IGNORE: u32 = 0x400;
/// The part of a group's flags that fanotify_init(2) takes.
const INIT_FLAGS: u32 = 0xffff & !libc::FAN_CLOEXEC;

/// Saves the marks, and where what they sit on is.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<Nameless, Stop> {
    let id = saved.entry.id;
    let (faflags, evflags) = file.info.fanotify.unwrap_or_default();
    let mut nameless = Nameless::new();
    let mut marks = Vec::new();
    for (i, mark) in file.info.marks.iter().enumerate() {
        if (mark.mask | mark.ignored_mask) & PERMISSION != 0 {
            return refuse(
                "fanotify",
                "it is asked for permission to open files: with its owner frozen, everybody would wait",
                "stop the service before the jump, or untag the unit",
            );
        }
        let place = match mark.ino {
            Some(_) => watch::find(mark, file)?,
            None => watch::find_mount(mark, file)?,
        };
        let place = match place {
            Place::Named(place) => place,
            Place::Nameless(inode) => {
                nameless.push((i, inode));
                Default::default()
            }
            Place::Lost => {
                let reason = format!("mark {i} sits on what no path was found to: {mark:x?}");
                return refuse("fanotify", reason, "restart the service, or untag the unit");
            }
        };
        let path = place.path.clone();
        saved.extra.watched.push(place);
        if mark.ino.is_none() && mark.mnt_id.is_none() {
            saved.extra.filesystem_marks.push(i as u32);
        }
        let inode = mark.ino.map(|i_ino| FanotifyInodeMarkEntry {
            i_ino,
            f_handle: handle(mark, path.clone()),
        });
        let kind = if inode.is_some() {
            MarkType::Inode
        } else {
            MarkType::Mount
        };
        marks.push(FanotifyMarkEntry {
            id,
            r#type: kind.into(),
            mflags: mark.mflags,
            mask: mark.mask,
            ignored_mask: mark.ignored_mask,
            s_dev: mark.dev.unwrap_or(0),
            me: inode.is_none().then(|| FanotifyMountMarkEntry {
                mnt_id: mark.mnt_id.unwrap_or(0),
                path,
            }),
            ie: inode,
        });
    }
    if file.policy.payload && sys::bytes_waiting(file.fd)? > 0 {
        return refuse(
            "fanotify",
            "events wait to be read, which are not carried",
            "try again when they are",
        );
    }
    saved.entry.r#type = FdTypes::Fanotify.into();
    saved.entry.ffy = Some(Box::new(FanotifyFileEntry {
        id,
        flags: file.flags(),
        fown: file.fown()?,
        faflags,
        evflags,
        mark: marks,
    }));
    Ok(nameless)
}

/// Makes a group without marks.
pub(crate) fn restore(entry: &FanotifyFileEntry) -> Result<OwnedFd, BuildError> {
    Ok(sys::fanotify_init(
        entry.faflags & INIT_FLAGS,
        entry.evflags,
    )?)
}

/// Adds the marks. To be done when nothing of ours touches files any more.
pub(crate) fn remark<'a>(
    group: BorrowedFd<'_>,
    entry: &FanotifyFileEntry,
    filesystems: &[u32],
    mut target: impl FnMut(usize) -> Result<super::Target<'a>, BuildError>,
) -> Result<(), BuildError> {
    for (i, m) in entry.mark.iter().enumerate() {
        let on = target(i)?;
        let kind = match m.r#type() {
            MarkType::Inode => 0,
            MarkType::Mount if filesystems.contains(&(i as u32)) => FAN_MARK_FILESYSTEM,
            MarkType::Mount => FAN_MARK_MOUNT,
        };
        let kept = m.mflags & KEPT;
        if m.mask != 0 {
            let evictable = kept & 0x200;
            let flags = FAN_MARK_ADD | kind | evictable;
            sys::fanotify_mark(group, flags, m.mask.into(), on.as_fd())?;
        }
        if m.ignored_mask != 0 {
            let how = match kept & FAN_MARK_IGNORE {
                0 => FAN_MARK_IGNORED_MASK,
                _ => 0,
            };
            let flags = FAN_MARK_ADD | kind | kept | how;
            sys::fanotify_mark(group, flags, m.ignored_mask.into(), on.as_fd())?;
        }
    }
    Ok(())
}
