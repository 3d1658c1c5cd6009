//! Files without a name: unlinked, or never given one. What they hold travels.
//!
//! Regular files come with their content, holes left out; directories were
//! empty when they were removed; of the others only the inode counts. What
//! still has another name is opened by that.

mod revive;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use prost::Message;

use super::error::{Stop, refuse};
use super::examined::{Examined, Saved};
use super::sys;
use super::watch;
use crate::image::schema::{
    FdTypes, GhostChunkEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use crate::image::{ImageError, ImageSink, ImageWriter, Kind, names, put_image, put_records};
use crate::sys::SysError;

pub(crate) use revive::Revived;

/// `PROC_SUPER_MAGIC`: linux/magic.h.
pub(crate) const PROC_MAGIC: i64 = 0x9fa0;

/// Unlinked files found while saving.
#[derive(Debug, Default)]
pub(crate) struct Ghosts {
    by_inode: BTreeMap<(u64, u64), Ghost>,
    remaps: Vec<RemapFilePathEntry>,
}

#[derive(Debug)]
struct Ghost {
    id: u32,
    head: GhostFileEntry,
    /// For regular files: readable, whatever the task's own descriptor allows,
    /// and where there is data.
    content: Option<(File, Runs)>,
}

/// Pieces of a file that hold data: offset and length.
type Runs = Vec<(u64, u64)>;

/// Saves an open file whose name is gone.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    name: String,
    ghosts: &mut Ghosts,
) -> Result<(), Stop> {
    let stat = file.stat;
    saved.extra.mnt_ns = Some(file.task.mnt_ns);
    saved.entry.r#type = FdTypes::Reg.into();
    let mut reg = RegFileEntry {
        id: saved.entry.id,
        // How it was made plays no part when it is opened again.
        flags: file.flags() & !(TMPFILE as u32),
        pos: file.info.pos,
        fown: file.fown()?,
        name,
        size: Some(stat.st_size as u64),
        mode: Some(stat.st_mode),
        ..RegFileEntry::default()
    };
    if sys::filesystem(file.fd)? == PROC_MAGIC {
        return gone_process(saved, reg, ghosts);
    }
    let directory = file.format() == libc::S_IFDIR;
    if stat.st_nlink > 0 && !directory {
        return elsewhere(file, saved, reg);
    }
    if file.flags() as i32 & TMPFILE == TMPFILE {
        saved.extra.nameless = Some(true);
    }
    let remap_id = ghosts.note(file, &reg.name)?;
    ghosts.remaps.push(RemapFilePathEntry {
        orig_id: reg.id,
        remap_id,
        remap_type: Some(RemapType::Ghost.into()),
    });
    if directory {
        reg.size = None;
    }
    saved.entry.reg = Some(reg);
    Ok(())
}

/// The bit that O_TMPFILE has beside O_DIRECTORY.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// The name it was opened by is gone, but there is another one.
fn elsewhere(file: &Examined<'_>, saved: &mut Saved, reg: RegFileEntry) -> Result<(), Stop> {
    let Some(other) = watch::other_name(file, &reg.name)? else {
        let reason = format!(
            "{} is gone, but the file lives on under another name that was not found",
            reg.name
        );
        return refuse(
            "unlinked file",
            reason,
            "restart the service, or untag the unit",
        );
    };
    saved.extra.former_name = Some(reg.name);
    saved.entry.reg = Some(RegFileEntry { name: other, ..reg });
    Ok(())
}

/// A file of a process that has ended. Those of another such process will do.
fn gone_process(saved: &mut Saved, reg: RegFileEntry, ghosts: &mut Ghosts) -> Result<(), Stop> {
    let pid = reg.name.strip_prefix("/proc/").and_then(|rest| {
        let pid = rest.split('/').next()?;
        pid.parse::<u32>().ok()
    });
    let Some(pid) = pid.filter(|_| !reg.name.contains("/task/")) else {
        let reason = format!("{} is gone", reg.name);
        return refuse("file in /proc", reason, "restart the service");
    };
    ghosts.remaps.push(RemapFilePathEntry {
        orig_id: reg.id,
        remap_id: pid,
        remap_type: Some(RemapType::Procfs.into()),
    });
    saved.entry.reg = Some(reg);
    Ok(())
}

impl Ghosts {
    /// Whether a file is one of these.
    pub(crate) fn has(&self, id: u32) -> bool {
        self.remaps.iter().any(|r| r.orig_id == id)
    }

    /// The number of a file without a name.
    fn note(&mut self, file: &Examined<'_>, name: &str) -> Result<u32, Stop> {
        if let Some(g) = self.by_inode.get(&file.inode()) {
            return Ok(g.id);
        }
        let stat = file.stat;
        let id = self.by_inode.len() as u32 + 1;
        let mut head = GhostFileEntry {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode,
            dev: Some(stat.st_dev as u32),
            ino: Some(stat.st_ino),
            atim: Some(time(stat.st_atime, stat.st_atime_nsec)),
            mtim: Some(time(stat.st_mtime, stat.st_mtime_nsec)),
            size: Some(stat.st_size as u64),
            ..GhostFileEntry::default()
        };
        let mut content = None;
        match file.format() {
            libc::S_IFREG => {
                let runs = readable(file, name)?;
                // Plain files are told from those with holes.
                let whole = [(0, stat.st_size as u64)];
                head.chunks = (runs.1 != whole && stat.st_size > 0).then_some(true);
                content = Some(runs);
            }
            libc::S_IFCHR | libc::S_IFBLK => {
                head.rdev = Some(stat.st_rdev as u32);
            }
            libc::S_IFLNK => {
                let target = nix::fcntl::readlinkat(file.fd, "")
                    .map_err(|e| SysError::new("readlinkat", name, e))?;
                head.symlnk_target = Some(target.to_string_lossy().into_owned());
            }
            _ => {}
        }
        self.by_inode
            .insert(file.inode(), Ghost { id, head, content });
        Ok(id)
    }

    /// Writes the content of all of them.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        for ghost in self.by_inode.into_values() {
            let name = names::ghost_file(ghost.id);
            let mut image = ImageWriter::new(Kind::GhostFile);
            image.record(&ghost.head);
            let Some((file, runs)) = ghost.content else {
                put_image(sink, &name, &image.finish())?;
                continue;
            };
            let chunked = ghost.head.chunks == Some(true);
            let head = image.finish();
            let pieces: Vec<(Vec<u8>, u64, u64)> = runs
                .into_iter()
                .map(|(off, len)| match chunked {
                    true => (framed(&GhostChunkEntry { len, off }), off, len),
                    false => (Vec::new(), off, len),
                })
                .collect();
            let sizes = pieces
                .iter()
                .map(|(frame, _, len)| frame.len() + *len as usize);
            let total = head.len() + sizes.sum::<usize>();
            let io = |source| ImageError::Io {
                name: name.clone(),
                source,
            };
            let (at_head, mut room) = sink
                .reserve(&name, total)
                .map_err(io)?
                .split_at_mut(head.len());
            at_head.copy_from_slice(&head);
            for (frame, off, len) in pieces {
                let (at_frame, rest) = room.split_at_mut(frame.len());
                at_frame.copy_from_slice(&frame);
                let (data, rest) = rest.split_at_mut(len as usize);
                file.read_exact_at(data, off).map_err(io)?;
                room = rest;
            }
        }
        if !self.remaps.is_empty() {
            put_records(sink, Kind::RemapFpath, names::REMAP_FPATH, &self.remaps)?;
        }
        Ok(())
    }
}

/// A record as images hold it: length, message.
fn framed(record: &impl Message) -> Vec<u8> {
    let message = record.encode_to_vec();
    let mut bytes = (message.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&message);
    bytes
}

fn time(sec: i64, nsec: i64) -> Timeval {
    Timeval {
        tv_sec: sec as u64,
        tv_usec: nsec as u64 / 1000,
    }
}

/// Opens a regular file for reading, and finds its data.
fn readable(file: &Examined<'_>, name: &str) -> Result<(File, Runs), Stop> {
    let leased = |l: &super::fdinfo::Lock| l.class == "LEASE" && l.write;
    if file.info.locks.iter().any(leased) {
        let reason = format!("{name} is gone, and reading it would break a lease");
        return refuse("unlinked file", reason, "restart the service");
    }
    let readable = File::from(sys::reopen(file.fd, libc::O_RDONLY)?);
    let runs = data_runs(&readable, file.stat.st_size as u64)
        .map_err(|e| SysError::new("lseek", name, e))?;
    let bytes: u64 = runs.iter().map(|(_, len)| len).sum();
    let max = file.policy.ghost_bytes_max;
    if bytes > max {
        let reason = format!(
            "{name} is gone and its {bytes} bytes are more than the {max} carried for such files"
        );
        let advice = "restart the service so that it opens a file with a name";
        return refuse("unlinked file", reason, advice);
    }
    Ok((readable, runs))
}

fn data_runs(file: &File, size: u64) -> Result<Runs, Errno> {
    let mut runs = Runs::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(n) => n as u64,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e),
        };
        let end = (lseek(file, start as i64, Whence::SeekHole)? as u64).min(size);
        if start >= end {
            break;
        }
        runs.push((start, end - start));
        at = end;
    }
    Ok(runs)
}

/// Gives our own duplicate of a descriptor that `O_PATH` made.
fn again(file: &OwnedFd, flags: i32) -> Result<OwnedFd, SysError> {
    if flags & libc::O_PATH != 0 {
        return sys::reopen(file.as_fd(), libc::O_PATH);
    }
    sys::reopen(file.as_fd(), flags)
}

/// How a descriptor of ours is named in messages.
fn shown(file: &OwnedFd) -> String {
    format!("our descriptor {}", file.as_raw_fd())
}
