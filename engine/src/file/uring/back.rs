//! Restoring: by ourselves where anybody may submit, else through the thread
//! that may.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::forward::{EVENTFD_DISABLED, Fresh};
use super::record::*;
use crate::file::error::{BuildError, FileError};
use crate::file::{FileBuilder, sys};
use crate::image::schema::FdinfoEntry;
use crate::remote::Program;

const REGISTER_BUFFERS: u64 = 0;
const REGISTER_ENABLE_RINGS: u64 = 12;
const REGISTER_RING_FDS: u64 = 20;

impl FileBuilder<'_> {
    /// Makes a ring with the files that are registered with it.
    pub(crate) fn build_ring(&mut self, id: u32, ring: &RcrUring) -> Result<OwnedFd, FileError> {
        let mut files = vec![-1; ring.file_slots as usize];
        for f in &ring.files {
            let fd = self.open(f.id)?.as_raw_fd();
            if let Some(slot) = files.get_mut(f.slot as usize) {
                *slot = fd;
            }
        }
        let eventfd = match ring.eventfd {
            Some(id) => Some(self.open(id)?.as_raw_fd()),
            None => None,
        };
        make(ring, &files, eventfd).map_err(|source| FileError::Build {
            id,
            what: "io_uring".into(),
            source,
        })
    }

    /// Has threads of process `pid` do what only they can do with its rings.
    /// `table` is that of the process; `run` runs a program in a thread. All
    /// ids are those of the images.
    pub fn rings<E: From<FileError> + From<BuildError>>(
        &mut self,
        pid: i32,
        table: &[FdinfoEntry],
        mut run: impl FnMut(i32, &Program) -> Result<(), E>,
    ) -> Result<(), E> {
        for (fd, _, extra) in self.duties(pid, table) {
            let Some(ring) = &extra.uring else { continue };
            let of_all = RcrRingThread {
                pid,
                tid: pid,
                index: 0,
            };
            let thread = ring.submitter.unwrap_or(of_all).tid;
            if is_later(ring) {
                let mut p = Program::new();
                let args = [u64::from(fd), REGISTER_ENABLE_RINGS, 0, 0].map(Into::into);
                p.call(libc::SYS_io_uring_register, "enable the io_uring", &args);
                run(thread, &p)?;
                let ours = self.open(extra.id)?;
                let fresh = fresh(ours, ring)?;
                fresh.forward(ring, &mut |batches: &[u32]| {
                    let mut p = Program::new();
                    for &count in batches {
                        let args = [u64::from(fd), count.into(), 0, 0, 0, 0].map(Into::into);
                        p.call(libc::SYS_io_uring_enter, "advance the io_uring", &args);
                    }
                    run(thread, &p)
                })?;
            }
            if !ring.buffers.is_empty() {
                let mut p = Program::new();
                let list = ring.buffers.iter().flat_map(|b| [b.start, b.len]);
                let list: Vec<u8> = list.flat_map(u64::to_le_bytes).collect();
                let list = p.bytes(&list);
                let count = ring.buffers.len() as u64;
                let args = [
                    u64::from(fd).into(),
                    REGISTER_BUFFERS.into(),
                    list.into(),
                    count.into(),
                ];
                let what = "register buffers with the io_uring";
                p.call(libc::SYS_io_uring_register, what, &args);
                run(thread, &p)?;
            }
        }
        for slot in table {
            let ring = self.extra(slot.id).and_then(|e| e.uring.as_ref());
            let threads = ring.map_or(&[][..], |r| &r.registered);
            for t in threads.iter().filter(|t| t.pid == pid) {
                // Each once, whatever number it has.
                if table.iter().find(|s| s.id == slot.id) != Some(slot) {
                    continue;
                }
                let mut p = Program::new();
                // struct io_uring_rsrc_update
                let mut update = t.index.to_le_bytes().to_vec();
                update.extend([0; 4]);
                update.extend(u64::from(slot.fd).to_le_bytes());
                let update = p.bytes(&update);
                let args = [
                    u64::from(slot.fd).into(),
                    REGISTER_RING_FDS.into(),
                    update.into(),
                    1.into(),
                ];
                let what = "register the io_uring with the thread";
                p.call(libc::SYS_io_uring_register, what, &args);
                run(t.tid, &p)?;
            }
        }
        Ok(())
    }
}

/// Whether it is made ready through the thread that may submit.
fn is_later(ring: &RcrUring) -> bool {
    ring.flags & SINGLE_ISSUER != 0 && ring.flags & R_DISABLED == 0
}

fn fresh<'a>(fd: BorrowedFd<'a>, ring: &RcrUring) -> Result<Fresh<'a>, BuildError> {
    let (sq, cq) = (ring.sq_entries, ring.cq_entries);
    let layout = Layout::new(ring.flags, sq, cq, &ring.offsets);
    let torn = || BuildError::Images("an io_uring makes no sense".into());
    let layout = layout.ok_or_else(torn)?;
    if ring.ring.len() != layout.ring_bytes || ring.sqes.len() != layout.sqes_bytes {
        return Err(torn());
    }
    let (memory, sqes) = layout.map(fd)?;
    Ok(Fresh {
        fd,
        layout,
        memory,
        sqes,
    })
}

fn make(ring: &RcrUring, files: &[i32], eventfd: Option<i32>) -> Result<OwnedFd, BuildError> {
    let later = is_later(ring);
    let disabled = if later { R_DISABLED } else { 0 };
    let mut p = parameters(ring.flags | disabled, ring.cq_entries);
    let fd = sys::ring_setup(ring.sq_entries, &mut p)?;
    if p.offsets() != ring.offsets {
        return Err(BuildError::Changed {
            what: "layout of an io_uring".into(),
            was: format!("{:?}", ring.offsets),
            is: format!("{:?}", p.offsets()),
        });
    }
    let fresh = fresh(fd.as_fd(), ring)?;
    // Nobody is to hear of the requests that follow.
    let flags = fresh.layout.cq_flags;
    fresh.memory.set_word(flags, EVENTFD_DISABLED);
    if !files.is_empty() {
        sys::ring_files(fd.as_fd(), files)?;
    }
    if let Some(eventfd) = eventfd {
        sys::ring_eventfd(fd.as_fd(), eventfd, ring.eventfd_of_workers)?;
    }
    if ring.flags & R_DISABLED != 0 {
        fresh.memory.write(0, &ring.ring);
        fresh.sqes.write(0, &ring.sqes);
    } else if !later {
        fresh.forward(ring, &mut |batches: &[u32]| {
            for &count in batches {
                sys::ring_enter(fd.as_fd(), count)?;
            }
            Ok::<_, BuildError>(())
        })?;
    }
    drop(fresh);
    Ok(fd)
}
