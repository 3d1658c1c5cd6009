//! Files without a name as they come back: one inode for each.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{Mode, SFlag, fchmod, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, ftruncate, unlinkat};

use super::super::error::BuildError;
use super::super::record::RcrFile;
use super::super::{reg, sys};
use super::{TMPFILE, again, shown};
use crate::freeze::kill_and_reap;
use crate::image::schema::{
    GhostChunkEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use crate::image::{ImageError, ImageReader, ImageSource, Kind, get_reader, names};
use crate::sys::SysError;
use crate::sys::process::{pidfd_open, spawn_waiting};

/// Files without a name, opened as often as needed.
#[derive(Debug, Default)]
pub(crate) struct Revived {
    /// What replaces a file, by its id.
    pub(crate) remaps: BTreeMap<u32, (RemapType, u32)>,
    /// Flags of descriptions that were opened without a name, by ghost.
    nameless: BTreeMap<u32, (u32, i32)>,
    files: BTreeMap<u32, OwnedFd>,
}

impl Revived {
    /// `of` gives a file's flags and what is known beyond its entry.
    pub(crate) fn new<'a>(
        remaps: Vec<RemapFilePathEntry>,
        of: impl Fn(u32) -> Option<(u32, &'a RcrFile)>,
    ) -> Self {
        let wanted = |r: &&RemapFilePathEntry| r.remap_type() != RemapType::Linked;
        let remaps: Vec<_> = remaps.iter().filter(wanted).collect();
        let mut nameless = BTreeMap::new();
        for r in &remaps {
            if let Some((flags, extra)) = of(r.orig_id)
                && extra.nameless == Some(true)
            {
                nameless.insert(r.remap_id, (r.orig_id, flags as i32));
            }
        }
        Self {
            remaps: remaps
                .iter()
                .map(|r| (r.orig_id, (r.remap_type(), r.remap_id)))
                .collect(),
            nameless,
            files: BTreeMap::new(),
        }
    }

    /// Opens what is to be behind `reg`.
    pub(crate) fn open(
        &mut self,
        (kind, number): (RemapType, u32),
        reg: &RegFileEntry,
        root: BorrowedFd<'_>,
        source: &dyn ImageSource,
    ) -> Result<OwnedFd, BuildError> {
        let flags = reg::open_flags(reg.flags);
        if kind == RemapType::Procfs {
            return of_a_dead_process(number, reg, root, flags);
        }
        if !self.files.contains_key(&number) {
            let first = self.nameless.get(&number).map(|(_, flags)| *flags);
            let file = make(number, reg, first, root, source)?;
            self.files.insert(number, file);
        }
        let file = &self.files[&number];
        let is_first = self
            .nameless
            .get(&number)
            .is_some_and(|(id, _)| *id == reg.id);
        let fd = match is_first {
            true => sys::dup(file)?,
            false => again(file, flags)?,
        };
        reg::seek(fd.as_fd(), reg)?;
        Ok(fd)
    }
}

/// A file of a process that is gone by the time it is asked.
fn of_a_dead_process(
    pid: u32,
    reg: &RegFileEntry,
    root: BorrowedFd<'_>,
    flags: i32,
) -> Result<OwnedFd, BuildError> {
    let rest = reg.name.strip_prefix(&format!("/proc/{pid}"));
    let rest = rest.ok_or_else(|| BuildError::Images(format!("{} of pid {pid}", reg.name)))?;
    let open = |child: i32| {
        let path = CString::new(format!("/proc/{child}{rest}"));
        let path = path.map_err(|_| SysError::new("open", &reg.name, Errno::EINVAL))?;
        sys::open_in_root(root, &path, flags, 0)
    };
    // Under its old number, unless that is taken.
    let me = pidfd_open(std::process::id() as i32)?;
    let fd = match spawn_waiting(&[pid as i32], 0, None, false, me.as_fd()) {
        Ok(child) => {
            let fd = open(child);
            kill_and_reap(&[child]);
            fd
        }
        Err(_) => sys::with_a_dying_process(0, open),
    };
    Ok(fd?)
}

/// Makes the file again. `first`: flags of the description that is to be the
/// one the file was made with.
fn make(
    ghost: u32,
    reg: &RegFileEntry,
    first: Option<i32>,
    root: BorrowedFd<'_>,
    source: &dyn ImageSource,
) -> Result<OwnedFd, BuildError> {
    let bad = |e: ImageError| BuildError::Images(e.to_string());
    let image = names::ghost_file(ghost);
    let mut reader: ImageReader<'_> = get_reader(source, Kind::GhostFile, &image)
        .map_err(bad)?
        .ok_or_else(|| BuildError::Images(format!("{image} is missing")))?;
    let head: GhostFileEntry = reader
        .record()
        .map_err(bad)?
        .ok_or_else(|| BuildError::Images(format!("{image} is empty")))?;
    let parent = Parent::of(root, &reg.name)?;
    let dir = parent.dir.as_fd();
    let file = match head.mode & libc::S_IFMT {
        libc::S_IFREG => {
            let flags = first.map_or(libc::O_RDWR, |f| reg::open_flags(f as u32));
            let flags = flags & !libc::O_DIRECT | libc::O_TMPFILE;
            let fd = sys::open_in_root(dir, c".", flags, 0o600)?;
            let writable = File::from(sys::reopen(fd.as_fd(), libc::O_WRONLY)?);
            fill(&writable, &head, reader).map_err(|e| e.of(reg))?;
            if let Some(flags) = first {
                sys::set_status_flags(fd.as_fd(), flags & !(TMPFILE | libc::O_ASYNC))?;
            }
            fd
        }
        kind => unnamed(kind, &head, dir, &parent.base)?,
    };
    inode_state(&file, &head)?;
    match head.mode & libc::S_IFMT {
        // Nothing of ours may have it open for writing: it may be executed.
        libc::S_IFREG if first.is_none() => Ok(sys::reopen(file.as_fd(), libc::O_PATH)?),
        _ => Ok(file),
    }
}

/// The directory a name was in. If it is gone, too, it exists for as long as
/// this value does.
struct Parent {
    dir: OwnedFd,
    base: String,
    /// Directories made, the outermost first: where, and their names.
    made: Vec<(OwnedFd, String)>,
}

impl Parent {
    fn of(root: BorrowedFd<'_>, name: &str) -> Result<Self, BuildError> {
        let mut parts: Vec<&str> = name.split('/').filter(|p| !p.is_empty()).collect();
        let base = parts.pop().unwrap_or("file").to_owned();
        let mut parent = Self {
            dir: directory(root, "/")?,
            base,
            made: Vec::new(),
        };
        for there in (0..=parts.len()).rev() {
            match directory(root, &format!("/{}", parts[..there].join("/"))) {
                Ok(dir) => {
                    parent.dir = dir;
                    parts.drain(..there);
                    break;
                }
                Err(e) if there > 0 && matches!(e.errno, Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        for part in parts {
            // Something else may have the name by now: then right here.
            if mkdirat(&parent.dir, part, Mode::from_bits_truncate(0o700)).is_err() {
                break;
            }
            let dir = directory(parent.dir.as_fd(), part)?;
            let outer = std::mem::replace(&mut parent.dir, dir);
            parent.made.push((outer, part.to_owned()));
        }
        Ok(parent)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for (outer, name) in self.made.drain(..).rev() {
            if let Err(e) = unlinkat(&outer, name.as_str(), UnlinkatFlags::RemoveDir) {
                tracing::warn!("{name}: made for a moment, and left behind: {e}");
            }
        }
    }
}

fn directory(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, SysError> {
    let c = CString::new(path).map_err(|_| SysError::new("open", path, Errno::EINVAL))?;
    sys::open_in_root(root, &c, libc::O_PATH | libc::O_DIRECTORY, 0)
}

/// Makes something that is no regular file, and takes its name away. It gets
/// the old one for that moment if nobody else has it.
fn unnamed(
    kind: u32,
    head: &GhostFileEntry,
    dir: BorrowedFd<'_>,
    base: &str,
) -> Result<OwnedFd, BuildError> {
    let mut name = base.to_owned();
    for n in 0.. {
        let failed = |call, e| SysError::new(call, &name, e);
        let mode = Mode::from_bits_truncate(0o600);
        let rdev = head.rdev.unwrap_or(0).into();
        let made = match kind {
            libc::S_IFDIR => mkdirat(dir, name.as_str(), Mode::from_bits_truncate(0o700)),
            libc::S_IFLNK => {
                let target = head.symlnk_target.as_deref().unwrap_or(".");
                nix::unistd::symlinkat(target, dir, name.as_str())
            }
            _ => mknodat(
                dir,
                name.as_str(),
                SFlag::from_bits_truncate(kind),
                mode,
                rdev,
            ),
        };
        match made {
            Ok(()) => break,
            Err(Errno::EEXIST) if n < 100 => name = format!(".{base}.{}.{n}", std::process::id()),
            Err(e) => return Err(failed("mknodat", e).into()),
        }
    }
    let c = CString::new(name.as_str()).map_err(|_| BuildError::Images("NUL in a name".into()))?;
    let fd = sys::open_in_root(dir, &c, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
    let how = match kind {
        libc::S_IFDIR => UnlinkatFlags::RemoveDir,
        _ => UnlinkatFlags::NoRemoveDir,
    };
    unlinkat(dir, name.as_str(), how).map_err(|e| SysError::new("unlinkat", &name, e))?;
    Ok(fd)
}

/// Owner, mode and times.
fn inode_state(file: &OwnedFd, head: &GhostFileEntry) -> Result<(), SysError> {
    let failed = |call, e| SysError::new(call, shown(file), e);
    let (uid, gid) = (Uid::from_raw(head.uid), Gid::from_raw(head.gid));
    fchownat(file, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
        .map_err(|e| failed("fchownat", e))?;
    if head.mode & libc::S_IFMT == libc::S_IFLNK {
        return Ok(());
    }
    let mode = Mode::from_bits_truncate(head.mode);
    let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    match fchmod(file, mode) {
        // O_PATH descriptors: by their link.
        Err(Errno::EBADF) => {
            let flags = nix::sys::stat::FchmodatFlags::FollowSymlink;
            nix::sys::stat::fchmodat(AT_FDCWD, magic.as_str(), mode, flags)
        }
        other => other,
    }
    .map_err(|e| failed("fchmod", e))?;
    let spec = |t: Timeval| {
        let (sec, usec) = (t.tv_sec as i64, t.tv_usec % 1_000_000);
        nix::sys::time::TimeSpec::new(sec, usec as i64 * 1000)
    };
    if let Some(mtim) = head.mtim {
        let atim = head.atim.unwrap_or(mtim);
        let flags = nix::sys::stat::UtimensatFlags::FollowSymlink;
        nix::sys::stat::utimensat(AT_FDCWD, magic.as_str(), &spec(atim), &spec(mtim), flags)
            .map_err(|e| failed("utimensat", e))?;
    }
    Ok(())
}

/// Why content could not be written.
enum Unfilled {
    Image(ImageError),
    Io(std::io::Error),
    Size,
}

impl Unfilled {
    fn of(self, reg: &RegFileEntry) -> BuildError {
        match self {
            Self::Image(e) => BuildError::Images(e.to_string()),
            Self::Io(source) => BuildError::Env {
                what: format!("content of {}", reg.name),
                source,
            },
            Self::Size => BuildError::Images(format!("content of {} beyond its end", reg.name)),
        }
    }
}

impl From<ImageError> for Unfilled {
    fn from(e: ImageError) -> Self {
        Self::Image(e)
    }
}

fn fill(file: &File, head: &GhostFileEntry, mut reader: ImageReader<'_>) -> Result<(), Unfilled> {
    let io = |e: Errno| Unfilled::Io(e.into());
    if head.chunks != Some(true) {
        return file.write_all_at(reader.rest(), 0).map_err(Unfilled::Io);
    }
    let size = head.size.unwrap_or(0);
    ftruncate(file, i64::try_from(size).map_err(|_| Unfilled::Size)?).map_err(io)?;
    while let Some(chunk) = reader.record::<GhostChunkEntry>()? {
        let data = reader.payload(chunk.len)?;
        let end = chunk.off.checked_add(chunk.len);
        if end.is_none_or(|e| e > size) {
            return Err(Unfilled::Size);
        }
        file.write_all_at(data, chunk.off).map_err(Unfilled::Io)?;
    }
    Ok(())
}
