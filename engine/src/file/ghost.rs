//! Unlinked files: no name leads to them, so their content travels.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::reg;
use super::sys;
use crate::image::schema::{
    FdTypes, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use crate::image::{
    ImageError, ImageReader, ImageSink, ImageSource, ImageWriter, Kind, get_reader, names,
    put_image, put_records,
};
use crate::sys::SysError;

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
    /// Readable, whatever the task's own descriptor allows.
    file: File,
}

/// Saves an open file whose name is gone.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    name: String,
    ghosts: &mut Ghosts,
) -> Result<(), Stop> {
    let stat = file.stat;
    let kind = "unlinked file";
    if file.format() != libc::S_IFREG || file.is_path() {
        let reason = format!("{name} is gone and only regular files without a name are carried");
        return refuse(kind, reason, "restart the service, or untag the unit");
    }
    if stat.st_nlink > 0 {
        let reason = format!("{name} is gone, but the file lives on under another name");
        return refuse(kind, reason, "restart the service, or untag the unit");
    }
    if stat.st_size as u64 > file.policy.ghost_bytes_max {
        let reason = format!(
            "{name} is gone and its {} bytes are more than the {} carried for such files",
            stat.st_size, file.policy.ghost_bytes_max
        );
        return refuse(
            kind,
            reason,
            "restart the service so that it opens a file with a name",
        );
    }
    let id = saved.entry.id;
    let ghost_id = match ghosts.by_inode.get(&file.inode()) {
        Some(g) => g.id,
        None => {
            let ghost_id = ghosts.by_inode.len() as u32 + 1;
            let head = GhostFileEntry {
                uid: stat.st_uid,
                gid: stat.st_gid,
                mode: stat.st_mode,
                dev: Some(stat.st_dev as u32),
                ino: Some(stat.st_ino),
                mtim: Some(Timeval {
                    tv_sec: stat.st_mtime as u64,
                    tv_usec: stat.st_mtime_nsec as u64 / 1000,
                }),
                size: Some(stat.st_size as u64),
                ..GhostFileEntry::default()
            };
            let readable = File::from(sys::reopen(file.fd, libc::O_RDONLY)?);
            ghosts.by_inode.insert(
                file.inode(),
                Ghost {
                    id: ghost_id,
                    head,
                    file: readable,
                },
            );
            ghost_id
        }
    };
    ghosts.remaps.push(RemapFilePathEntry {
        orig_id: id,
        remap_id: ghost_id,
        remap_type: Some(RemapType::Ghost.into()),
    });
    saved.extra.mnt_ns = Some(file.task.mnt_ns);
    saved.entry.r#type = FdTypes::Reg.into();
    saved.entry.reg = Some(RegFileEntry {
        id,
        // How it was made plays no part when it is opened again.
        flags: file.flags() & !(libc::O_TMPFILE as u32),
        pos: file.info.pos,
        fown: file.fown()?,
        name,
        size: Some(stat.st_size as u64),
        mode: Some(stat.st_mode),
        ..RegFileEntry::default()
    });
    Ok(())
}

impl Ghosts {
    /// Writes the content of all of them.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        for ghost in self.by_inode.into_values() {
            let name = names::ghost_file(ghost.id);
            let mut content = vec![0; ghost.head.size.unwrap_or(0) as usize];
            ghost
                .file
                .read_exact_at(&mut content, 0)
                .map_err(|source| ImageError::Io {
                    name: name.clone(),
                    source,
                })?;
            let mut image = ImageWriter::new(Kind::GhostFile);
            image.record(&ghost.head).payload(&content);
            put_image(sink, &name, &image.finish())?;
        }
        if !self.remaps.is_empty() {
            put_records(sink, Kind::RemapFpath, names::REMAP_FPATH, &self.remaps)?;
        }
        Ok(())
    }
}

/// Unlinked files as they come back: one inode for each, opened as often as needed.
#[derive(Debug, Default)]
pub(crate) struct Revived {
    /// By file id.
    pub(crate) remaps: BTreeMap<u32, u32>,
    files: BTreeMap<u32, OwnedFd>,
}

impl Revived {
    pub(crate) fn new(remaps: Vec<RemapFilePathEntry>) -> Self {
        let ghosts = remaps
            .into_iter()
            .filter(|r| r.remap_type() == RemapType::Ghost);
        Self {
            remaps: ghosts.map(|r| (r.orig_id, r.remap_id)).collect(),
            files: BTreeMap::new(),
        }
    }

    /// Opens the unlinked file behind `reg`.
    pub(crate) fn open(
        &mut self,
        ghost: u32,
        reg: &RegFileEntry,
        root: BorrowedFd<'_>,
        source: &dyn ImageSource,
    ) -> Result<OwnedFd, BuildError> {
        let file = match self.files.entry(ghost) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(make(ghost, reg, root, source)?),
        };
        let fd = sys::reopen(file.as_fd(), reg::open_flags(reg.flags))?;
        reg::seek(fd.as_fd(), reg)?;
        Ok(fd)
    }
}

fn make(
    ghost: u32,
    reg: &RegFileEntry,
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
    let content = reader.rest();

    let dir = reg
        .name
        .rsplit_once('/')
        .map_or("/", |(dir, _)| if dir.is_empty() { "/" } else { dir });
    let dir = CString::new(dir).map_err(|_| BuildError::Images("a path contains NUL".into()))?;
    let fd = sys::open_in_root(root, &dir, libc::O_TMPFILE | libc::O_RDWR, 0o600)?;
    let failed = |call, e| SysError::new(call, &reg.name, e);
    let mut file = File::from(fd);
    file.write_all(content).map_err(|e| BuildError::Env {
        what: format!("{} bytes of {}", content.len(), reg.name),
        source: e,
    })?;
    fchown(
        &file,
        Some(Uid::from_raw(head.uid)),
        Some(Gid::from_raw(head.gid)),
    )
    .map_err(|e| failed("fchown", e))?;
    fchmod(&file, Mode::from_bits_truncate(head.mode)).map_err(|e| failed("fchmod", e))?;
    if let Some(t) = head.mtim {
        let mtime = std::time::UNIX_EPOCH
            + std::time::Duration::from_secs(t.tv_sec)
            + std::time::Duration::from_micros(t.tv_usec % 1_000_000);
        file.set_modified(mtime).map_err(|source| BuildError::Env {
            what: format!("time of {}", reg.name),
            source,
        })?;
    }
    Ok(file.into())
}
