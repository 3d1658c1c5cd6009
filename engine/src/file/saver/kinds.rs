//! One open file: which kind it is, and that kind's `save`.

use super::super::error::{Stop, refuse};
use super::super::examined::{Examined, Found, Saved};
use super::super::fdinfo::FdInfo;
use super::super::reg::{self, Whereabouts};
use super::super::{
    bpf, epoll, eventfd, fanotify, ghost, inotify, memfd, mqueue, nsfd, pidfd, pipe, signalfd,
    timerfd, tty, uring,
};
use super::{FileError, FileSaver};
use crate::socket;
use crate::sys::SysResult;

/// `PID_FS_MAGIC`: linux/magic.h.
const PIDFS_MAGIC: i64 = 0x5049_4446;
/// `MQUEUE_MAGIC` (ipc/mqueue.c).
const MQUEUE_MAGIC: i64 = 0x1980_0202;
/// `NSFS_MAGIC`.
const NSFS_MAGIC: i64 = 0x6e73_6673;

impl FileSaver {
    /// Saves a file under a new id, or notes the refusal.
    pub(super) fn examine(
        &mut self,
        file: &Examined<'_>,
        found: Found,
    ) -> Result<Option<u32>, FileError> {
        let id = self.next_id;
        let mut saved = Saved::new(id, found);
        self.next_id += 1;
        match self.save_kind(file, &mut saved) {
            Ok(()) => {
                self.files.insert(id, saved);
                Ok(Some(id))
            }
            Err(Stop::Refuse {
                kind,
                reason,
                advice,
            }) => {
                self.refuse(&saved.found, &kind, reason, advice);
                Ok(None)
            }
            Err(Stop::Sys(source)) => {
                let found = saved.found;
                Err(FileError::Task {
                    pid: found.pid,
                    object: found.object,
                    source,
                })
            }
        }
    }

    fn save_kind(&mut self, file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
        if let Some(kind) = file.link.strip_prefix("anon_inode:") {
            return match kind {
                "[eventfd]" => eventfd::save(file, saved),
                "[eventpoll]" => epoll::save(file, saved),
                "[timerfd]" => timerfd::save(file, saved),
                "[signalfd]" => signalfd::save(file, saved),
                "inotify" => {
                    let nameless = inotify::save(file, saved)?;
                    self.nameless.push((saved.entry.id, nameless));
                    Ok(())
                }
                "[fanotify]" => {
                    let nameless = fanotify::save(file, saved)?;
                    self.nameless.push((saved.entry.id, nameless));
                    Ok(())
                }
                "[pidfd]" => pidfd::save(file, saved),
                "[io_uring]" => uring::save(file, saved, &mut self.window, &mut self.rings),
                "bpf-map" => bpf::save(file, saved, &mut self.bpf_maps),
                other => refuse_anonymous(other),
            };
        }
        if file.is_path() {
            return self.save_by_path(file, saved);
        }
        if file.format() == libc::S_IFREG && file.filesystem()? == MQUEUE_MAGIC {
            return mqueue::save(file, saved, &mut self.window, &mut self.queues);
        }
        match file.format() {
            libc::S_IFSOCK => {
                self.homes.note(saved.entry.id, file.fd)?;
                socket::save(file, saved, &mut self.unix)
            }
            libc::S_IFIFO if file.link.starts_with("pipe:") => {
                pipe::save(file, saved, &mut self.pipes)
            }
            libc::S_IFIFO => self.save_fifo(file, saved),
            libc::S_IFCHR if tty::is_terminal(file) => {
                let path_id = self.next_id;
                self.next_id += 1;
                let mut path = Saved::new(path_id, saved.found.clone());
                tty::save(file, saved, &mut path)?;
                self.files.insert(path_id, path);
                Ok(())
            }
            libc::S_IFREG if file.link.starts_with(memfd::PREFIX) => {
                memfd::save(file, saved, &mut self.memfds)
            }
            _ => self.save_by_path(file, saved),
        }
    }

    fn save_by_path(&mut self, file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
        // As kernels show them that have a file system of processes.
        if file.info.pid.is_some() && file.filesystem()? == PIDFS_MAGIC {
            return pidfd::save(file, saved);
        }
        if !file.is_path() && file.filesystem()? == NSFS_MAGIC {
            return nsfd::save(file, saved);
        }
        if let Some(kind) = special_filesystem(file)? {
            return refuse(kind, "this kind of file is not carried", "untag the unit");
        }
        match reg::whereabouts(file)? {
            Whereabouts::Named { name, mnt_ns } => {
                saved.extra.mnt_ns = Some(mnt_ns);
                reg::save(file, saved, name)
            }
            Whereabouts::Unlinked { name } => ghost::save(file, saved, name, &mut self.ghosts),
        }
    }

    fn save_fifo(&mut self, file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
        let path_id = self.next_id;
        self.next_id += 1;
        let mut path = Saved::new(path_id, saved.found.clone());
        // Opened for both directions, it neither waits for a peer nor fails without one.
        let both = FdInfo {
            flags: (libc::O_RDWR | libc::O_NONBLOCK) as u32,
            ..FdInfo::default()
        };
        let by_path = Examined {
            info: &both,
            ..*file
        };
        match reg::whereabouts(file)? {
            Whereabouts::Named { name, mnt_ns } => {
                reg::save(&by_path, &mut path, name)?;
                path.extra.mnt_ns = Some(mnt_ns);
            }
            Whereabouts::Unlinked { name } => {
                ghost::save(&by_path, &mut path, name, &mut self.ghosts)?;
            }
        }
        self.files.insert(path_id, path);
        pipe::save_fifo(file, saved, path_id, &mut self.pipes)
    }
}

/// Files of kernel-internal filesystems that look like regular ones.
fn special_filesystem(file: &Examined<'_>) -> SysResult<Option<&'static str>> {
    // linux/magic.h
    Ok(match file.filesystem()? {
        NSFS_MAGIC => Some("namespace descriptor"),
        PIDFS_MAGIC => Some("pidfd"),
        0x5345_434d => Some("secret memory"),
        0xcafe_4a11 => Some("BPF object"),
        _ => None,
    })
}

fn refuse_anonymous(kind: &str) -> Result<(), Stop> {
    let kind = kind.trim_matches(['[', ']']);
    let (reason, advice) = match kind {
        "userfaultfd" => ("its memory registrations are not carried", "untag the unit"),
        _ => ("this kind of file is not carried", "untag the unit"),
    };
    refuse(kind, reason, advice)
}
