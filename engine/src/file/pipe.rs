//! Pipes and named pipes, with what is buffered in them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid, fchown, pipe2, read, write};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::sys;
use crate::image::schema::{FdTypes, FifoEntry, PipeDataEntry, PipeEntry};
use crate::image::{
    ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, names, put_image,
};
use crate::sys::{SysError, SysResult};

/// `F_SETPIPE_SZ`, `F_GETPIPE_SZ`: linux/fcntl.h.
const F_SETPIPE_SZ: i32 = 1031;
const F_GETPIPE_SZ: i32 = 1032;

/// Pipes found while saving, by inode number.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    seen: BTreeMap<u32, Seen>,
}

#[derive(Debug)]
struct Seen {
    first_file: u32,
    fifo: bool,
    readers: bool,
    writers: bool,
    packets: bool,
    /// Its other end is outside, which is as it should be.
    outside: bool,
    content: Option<(PipeDataEntry, Vec<u8>)>,
    /// How the content is divided, in packet mode.
    lengths: Vec<u32>,
}

/// Saves one end of a pipe.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, pipes: &mut Pipes) -> Result<(), Stop> {
    let pipe_id = pipes.note(file, saved.entry.id, false);
    saved.entry.r#type = FdTypes::Pipe.into();
    saved.entry.pipe = Some(PipeEntry {
        id: saved.entry.id,
        pipe_id,
        flags: file.flags(),
        fown: file.fown()?,
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
    });
    Ok(())
}

/// Saves an open named pipe, whose path is the file `path_id`.
pub(crate) fn save_fifo(
    file: &Examined<'_>,
    saved: &mut Saved,
    path_id: u32,
    pipes: &mut Pipes,
) -> Result<(), Stop> {
    let pipe_id = pipes.note(file, saved.entry.id, true);
    saved.entry.r#type = FdTypes::Fifo.into();
    saved.entry.fifo = Some(FifoEntry {
        id: saved.entry.id,
        pipe_id,
        regf_id: Some(path_id),
        wait_writer: None,
    });
    // The fifo record has no place for flags; those of the path's record are the base's.
    saved.extra.fifo_flags = Some(file.flags());
    saved.extra.fifo_fown = Some(file.fown()?);
    Ok(())
}

impl Pipes {
    fn note(&mut self, file: &Examined<'_>, id: u32, fifo: bool) -> u32 {
        let ino = file.stat.st_ino as u32;
        let seen = self.seen.entry(ino).or_insert(Seen {
            first_file: id,
            fifo,
            readers: false,
            writers: false,
            packets: false,
            outside: false,
            content: None,
            lengths: Vec::new(),
        });
        let mode = file.info.flags & libc::O_ACCMODE as u32;
        seen.readers |= mode != libc::O_WRONLY as u32;
        seen.writers |= mode != libc::O_RDONLY as u32;
        seen.packets |= file.info.flags & libc::O_DIRECT as u32 != 0;
        ino
    }

    /// Checks and reads each pipe once all ends are known. `held` gives our
    /// duplicate of a file, `given` says which are to come from outside; the
    /// result lists refusals by file id.
    pub(crate) fn settle<'a>(
        &mut self,
        held: impl Fn(u32) -> Option<BorrowedFd<'a>>,
        given: impl Fn(u32) -> bool,
        payload: bool,
    ) -> Result<Vec<(u32, Stop)>, SysError> {
        let mut refusals = Vec::new();
        for (&ino, seen) in &mut self.seen {
            let Some(fd) = held(seen.first_file) else {
                continue;
            };
            let alone = !seen.readers || !seen.writers;
            if alone && !seen.fifo && !other_end_closed(fd)? {
                if given(seen.first_file) {
                    seen.outside = true;
                    continue;
                }
                let reason = format!(
                    "the other end of pipe:[{ino}] is held by a process outside the service"
                );
                let stop = refuse::<()>(
                    "pipe",
                    reason,
                    "untag the unit, or tag both services as one",
                );
                refusals.extend(stop.err().map(|s| (seen.first_file, s)));
                continue;
            }
            // What nobody can read any more is gone; a named pipe can be opened.
            if !payload || !seen.readers && !seen.fifo {
                continue;
            }
            let size = sys::fcntl_int(fd, "fcntl(F_GETPIPE_SZ)", F_GETPIPE_SZ, 0)?;
            let (data, pieces) = contents(fd, size)?;
            if seen.packets {
                seen.lengths = pieces;
            }
            let head = PipeDataEntry {
                pipe_id: ino,
                bytes: data.len() as u32,
                size: Some(size as u32),
            };
            seen.content = Some((head, data));
        }
        Ok(refusals)
    }

    /// The pipes that lead outside, by inode number.
    pub(crate) fn outside(&self) -> impl Iterator<Item = u32> {
        let outside = self.seen.iter().filter(|(_, s)| s.outside);
        outside.map(|(&ino, _)| ino)
    }

    /// The packets in each pipe, by the pipe's first file.
    pub(crate) fn packets(&self) -> impl Iterator<Item = (u32, &[u32])> {
        let held = self.seen.values().filter(|s| !s.lengths.is_empty());
        held.map(|s| (s.first_file, s.lengths.as_slice()))
    }

    /// Writes what was buffered.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        for (fifo, kind, name) in [
            (false, Kind::PipesData, names::PIPES_DATA),
            (true, Kind::FifoData, names::FIFO_DATA),
        ] {
            let mut image = ImageWriter::new(kind);
            let mut any = false;
            for seen in self.seen.values().filter(|s| s.fifo == fifo) {
                if let Some((head, data)) = &seen.content {
                    image.record(head).payload(data);
                    any = true;
                }
            }
            if any {
                put_image(sink, name, &image.finish())?;
            }
        }
        Ok(())
    }
}

/// Whether nobody at all holds the end that we do not see.
fn other_end_closed(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).map_err(|e| SysError::new("poll", "pipe", e))?;
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    Ok(events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// What is buffered, left in place, and the lengths of the pieces in which it
/// is read: packets, if there are any.
fn contents(fd: BorrowedFd<'_>, size: i32) -> SysResult<(Vec<u8>, Vec<u32>)> {
    let waiting = sys::bytes_waiting(fd)?;
    if waiting == 0 {
        return Ok((Vec::new(), Vec::new()));
    }
    let reader = sys::reopen(fd, libc::O_RDONLY | libc::O_NONBLOCK)?;
    let (out, into) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| SysError::new("pipe2", "", e))?;
    sys::fcntl_int(into.as_fd(), "fcntl(F_SETPIPE_SZ)", F_SETPIPE_SZ, size)?;
    let n = tee(&reader, &into, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)
        .map_err(|e| SysError::new("tee", format!("{waiting} bytes"), e))?;
    if n != waiting {
        return Err(SysError::new(
            "tee",
            format!("{n} of {waiting} bytes"),
            Errno::EIO,
        ));
    }
    let mut data = vec![0; n];
    let mut at = 0;
    let mut pieces = Vec::new();
    while at < n {
        let piece =
            read(&out, &mut data[at..]).map_err(|e| SysError::new("read", "pipe copy", e))?;
        pieces.push(piece as u32);
        at += piece;
    }
    Ok((data, pieces))
}

/// A pipe that exists again.
#[derive(Debug)]
struct Base {
    /// Reading and writing end as pipe2(2) gives them, or both in one.
    ends: Vec<OwnedFd>,
    /// Which of them already stand for a description of the dump.
    given: [bool; 2],
    /// How many descriptions are still to be opened; then it is done with.
    wanted: usize,
}

/// Pipes as they come back.
#[derive(Debug, Default)]
pub(crate) struct PipesBack {
    content: BTreeMap<u32, (PipeDataEntry, Vec<u8>)>,
    /// Both ends of each, kept until all files are placed.
    bases: BTreeMap<u32, Base>,
    /// Lengths of packets, by pipe.
    packets: BTreeMap<u32, Vec<u32>>,
    /// How many descriptions each pipe has.
    descriptions: BTreeMap<u32, usize>,
    /// What was given for ends of pipes that lead outside.
    given: BTreeMap<u32, OwnedFd>,
}

impl PipesBack {
    /// Reads what was buffered.
    pub(crate) fn load(source: &dyn ImageSource) -> Result<Self, ImageError> {
        let mut content = BTreeMap::new();
        for (kind, name) in [
            (Kind::PipesData, names::PIPES_DATA),
            (Kind::FifoData, names::FIFO_DATA),
        ] {
            let Some(mut reader) = get_reader(source, kind, name)? else {
                continue;
            };
            while let Some(head) = reader.record::<PipeDataEntry>()? {
                let data = reader.payload(head.bytes.into())?.to_vec();
                content.insert(head.pipe_id, (head, data));
            }
        }
        Ok(Self {
            content,
            bases: BTreeMap::new(),
            packets: BTreeMap::new(),
            descriptions: BTreeMap::new(),
            given: BTreeMap::new(),
        })
    }

    /// Takes an end of another pipe in the place of this one.
    pub(crate) fn give(&mut self, pipe_id: u32, fd: OwnedFd) {
        self.given.insert(pipe_id, fd);
    }

    /// Whether an end of another pipe is there for it.
    pub(crate) fn is_given(&self, pipe_id: u32) -> bool {
        self.given.contains_key(&pipe_id)
    }

    /// Notes how a pipe's content is divided.
    pub(crate) fn divide(&mut self, pipe_id: u32, lengths: &[u32]) {
        self.packets.insert(pipe_id, lengths.to_vec());
    }

    /// Notes one more description of a pipe, before any is opened.
    pub(crate) fn expect(&mut self, pipe_id: u32) {
        *self.descriptions.entry(pipe_id).or_default() += 1;
    }

    /// Opens one end of a pipe; the pipe itself is made at its first end.
    pub(crate) fn open(&mut self, pipe: &PipeEntry) -> Result<OwnedFd, BuildError> {
        if let Some(given) = self.given.get(&pipe.pipe_id) {
            let flags = pipe.flags as i32 & !(libc::O_DIRECT | libc::O_ASYNC);
            return Ok(sys::reopen(given.as_fd(), flags)?);
        }
        if !self.bases.contains_key(&pipe.pipe_id) {
            let (r, w) =
                pipe2(OFlag::O_CLOEXEC).map_err(|e| SysError::new("pipe2", pipe.pipe_id, e))?;
            if let (Some(uid), Some(gid)) = (pipe.uid, pipe.gid) {
                fchown(&r, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .map_err(|e| SysError::new("fchown", "pipe", e))?;
            }
            self.fill(pipe.pipe_id, w.as_fd())?;
            self.bases.insert(
                pipe.pipe_id,
                Base {
                    ends: vec![r, w],
                    given: [false; 2],
                    wanted: self.descriptions.get(&pipe.pipe_id).copied().unwrap_or(0),
                },
            );
        }
        let flags = pipe.flags as i32;
        let base = self.bases.get_mut(&pipe.pipe_id).expect("made above");
        // The first description of an end is the end itself; further ones
        // were opened through /proc.
        let end = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => Some(0),
            libc::O_WRONLY => Some(1),
            _ => None,
        };
        let fd = match end.filter(|&e| !std::mem::replace(&mut base.given[e], true)) {
            Some(end) => sys::dup(&base.ends[end])?,
            None => sys::reopen(
                base.ends[0].as_fd(),
                flags & !(libc::O_DIRECT | libc::O_ASYNC),
            )?,
        };
        // O_ASYNC comes with its owner.
        sys::set_status_flags(fd.as_fd(), flags & !libc::O_ASYNC)?;
        base.wanted = base.wanted.saturating_sub(1);
        if base.wanted == 0 {
            // Thousands of pipes would need twice as many descriptors of ours.
            self.bases.remove(&pipe.pipe_id);
        }
        Ok(fd)
    }

    /// Opens a named pipe whose path `base` opens.
    pub(crate) fn open_fifo(
        &mut self,
        fifo: &FifoEntry,
        flags: u32,
        base: impl FnOnce() -> Result<OwnedFd, BuildError>,
    ) -> Result<OwnedFd, BuildError> {
        if !self.bases.contains_key(&fifo.pipe_id) {
            let base = base()?;
            self.fill(fifo.pipe_id, base.as_fd())?;
            self.bases.insert(
                fifo.pipe_id,
                Base {
                    ends: vec![base],
                    given: [true; 2],
                    wanted: usize::MAX,
                },
            );
        }
        let flags = flags as i32 & !(libc::O_ASYNC | libc::O_DIRECT);
        Ok(sys::reopen(
            self.bases[&fifo.pipe_id].ends[0].as_fd(),
            flags,
        )?)
    }

    fn fill(&self, pipe_id: u32, writer: BorrowedFd<'_>) -> Result<(), BuildError> {
        let Some((head, data)) = self.content.get(&pipe_id) else {
            return Ok(());
        };
        if let Some(size) = head.size {
            sys::fcntl_int(writer, "fcntl(F_SETPIPE_SZ)", F_SETPIPE_SZ, size as i32)?;
        }
        let flags = sys::status_flags(writer)?;
        let packets = self.packets.get(&pipe_id);
        let mode = packets.map_or(0, |_| libc::O_DIRECT);
        let mut lengths = packets.into_iter().flatten();
        sys::set_status_flags(writer, flags | libc::O_NONBLOCK | mode)?;
        let mut rest = data.as_slice();
        while !rest.is_empty() {
            let piece = lengths.next().map_or(rest.len(), |&l| l as usize);
            let piece = rest.get(..piece).unwrap_or(rest);
            let n = write(writer, piece)
                .map_err(|e| SysError::new("write", format!("pipe {}", writer.as_raw_fd()), e))?;
            rest = &rest[n..];
        }
        sys::set_status_flags(writer, flags)?;
        Ok(())
    }
}
