//! memfd_create(2): files in memory, carried by content.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, Whence, fchown, ftruncate, lseek};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::reg::{DELETED, open_flags};
use super::sys;
use crate::image::schema::{FdTypes, MemfdFileEntry, MemfdInodeEntry, PagemapEntry, PagemapHead};
use crate::image::{
    ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, get_records, names,
    put_image, put_records,
};
use crate::sys::SysError;

/// How a memfd's link begins.
pub(crate) const PREFIX: &str = "/memfd:";
/// Shared memory and page image ids of memfds start here, apart from others'.
const FIRST_SHMID: u32 = 0x4000_0000;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const F_ADD_SEALS: i32 = 1033;
const F_GET_SEALS: i32 = 1034;
const PE_PRESENT: u32 = 4;
const PAGE: u64 = 4096;

/// memfds found while saving.
#[derive(Debug, Default)]
pub(crate) struct Memfds {
    by_inode: BTreeMap<(u64, u64), (MemfdInodeEntry, File)>,
}

/// Saves a descriptor of a memfd.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    memfds: &mut Memfds,
) -> Result<(), Stop> {
    if sys::filesystem(file.fd)? == HUGETLBFS_MAGIC {
        return refuse(
            "memfd",
            "it is made of huge pages, which is not carried",
            "untag the unit",
        );
    }
    let next = memfds.by_inode.len() as u32 + 1;
    let inode_id = match memfds.by_inode.get(&file.inode()) {
        Some((entry, _)) => entry.inode_id,
        None => {
            let link = file.link.strip_prefix(PREFIX).unwrap_or(file.link);
            let seals = sys::fcntl_int(file.fd, "fcntl(F_GET_SEALS)", F_GET_SEALS, 0)?;
            let entry = MemfdInodeEntry {
                name: link.strip_suffix(DELETED).unwrap_or(link).to_owned(),
                uid: file.stat.st_uid,
                gid: file.stat.st_gid,
                size: file.stat.st_size as u64,
                shmid: FIRST_SHMID + next,
                seals: seals as u32,
                inode_id: next.into(),
                hugetlb_flag: None,
                mode: Some(file.stat.st_mode & 0o7777),
            };
            let readable = File::from(sys::reopen(file.fd, libc::O_RDONLY)?);
            memfds.by_inode.insert(file.inode(), (entry, readable));
            next.into()
        }
    };
    saved.entry.r#type = FdTypes::Memfd.into();
    saved.entry.memfd = Some(MemfdFileEntry {
        id: saved.entry.id,
        flags: file.flags(),
        pos: file.info.pos,
        fown: file.fown()?,
        inode_id: inode_id as u32,
    });
    Ok(())
}

impl Memfds {
    /// Writes the inodes and their content.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        let mut inodes = Vec::new();
        for (entry, file) in self.by_inode.into_values() {
            let pages = names::pages(entry.shmid);
            let io = |source| ImageError::Io {
                name: pages.clone(),
                source,
            };
            let runs = data_runs(&file, entry.size).map_err(|e| io(e.into()))?;
            let total: u64 = runs.iter().map(|(_, len)| len).sum();
            let room = sink.reserve(&pages, total as usize).map_err(io)?;
            let mut at = 0;
            for &(offset, len) in &runs {
                // The last page may reach beyond the end of the file.
                let there = len.min(entry.size - offset) as usize;
                file.read_exact_at(&mut room[at..at + there], offset)
                    .map_err(io)?;
                room[at + there..at + len as usize].fill(0);
                at += len as usize;
            }
            let mut map = ImageWriter::new(Kind::Pagemap);
            map.record(&PagemapHead {
                pages_id: entry.shmid,
            });
            for (offset, len) in runs {
                map.record(&PagemapEntry {
                    vaddr: offset,
                    flags: Some(PE_PRESENT),
                    nr_pages: Some(len / PAGE),
                    ..PagemapEntry::default()
                });
            }
            put_image(
                sink,
                &names::pagemap_shmem(entry.shmid.into()),
                &map.finish(),
            )?;
            inodes.push(entry);
        }
        if inodes.is_empty() {
            return Ok(());
        }
        put_records(sink, Kind::MemfdInode, names::MEMFD, &inodes)
    }
}

/// Page-aligned runs `(offset, length)` that hold data.
fn data_runs(file: &File, size: u64) -> Result<Vec<(u64, u64)>, Errno> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(n) => n as u64 / PAGE * PAGE,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e),
        };
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        let end = end.next_multiple_of(PAGE);
        runs.push((start, end - start));
        at = end;
    }
    Ok(runs)
}

/// memfds as they come back.
#[derive(Debug, Default)]
pub(crate) struct MemfdsBack {
    inodes: BTreeMap<u32, MemfdInodeEntry>,
    files: BTreeMap<u32, OwnedFd>,
}

impl MemfdsBack {
    /// Reads the list of inodes.
    pub(crate) fn load(source: &dyn ImageSource) -> Result<Self, ImageError> {
        let inodes = get_records::<MemfdInodeEntry>(source, Kind::MemfdInode, names::MEMFD)?;
        let inodes = inodes.into_iter().map(|i| (i.inode_id as u32, i)).collect();
        Ok(Self {
            inodes,
            files: BTreeMap::new(),
        })
    }

    /// Opens a memfd; it is made at its first descriptor.
    pub(crate) fn open(
        &mut self,
        memfd: &MemfdFileEntry,
        source: &dyn ImageSource,
    ) -> Result<OwnedFd, BuildError> {
        let id = memfd.inode_id;
        if !self.files.contains_key(&id) {
            let inode = self.inodes.get(&id);
            let inode = inode.ok_or_else(|| BuildError::Images(format!("no memfd inode {id}")))?;
            self.files.insert(id, make(inode, source)?);
        }
        let fd = sys::reopen(self.files[&id].as_fd(), open_flags(memfd.flags))?;
        lseek(&fd, memfd.pos as i64, Whence::SeekSet)
            .map_err(|e| SysError::new("lseek", memfd.pos, e))?;
        Ok(fd)
    }

    /// Seals them, once all shared mappings of them exist.
    pub(crate) fn seal(&self) -> Result<(), SysError> {
        for (id, fd) in &self.files {
            let seals = self.inodes[id].seals as i32;
            if seals != 0 {
                sys::fcntl_int(fd.as_fd(), "fcntl(F_ADD_SEALS)", F_ADD_SEALS, seals)?;
            }
        }
        Ok(())
    }
}

fn make(inode: &MemfdInodeEntry, source: &dyn ImageSource) -> Result<OwnedFd, BuildError> {
    let failed = |call, e| SysError::new(call, format!("memfd {}", inode.name), e);
    let name = CString::new(inode.name.as_bytes())
        .map_err(|_| BuildError::Images("a memfd name contains NUL".into()))?;
    let fd = memfd_create(
        name.as_c_str(),
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .map_err(|e| failed("memfd_create", e))?;
    ftruncate(&fd, inode.size as i64).map_err(|e| failed("ftruncate", e))?;
    let file = File::from(fd);
    fill(&file, inode, source)?;
    fchown(
        &file,
        Some(Uid::from_raw(inode.uid)),
        Some(Gid::from_raw(inode.gid)),
    )
    .map_err(|e| failed("fchown", e))?;
    if let Some(mode) = inode.mode {
        fchmod(&file, Mode::from_bits_truncate(mode)).map_err(|e| failed("fchmod", e))?;
    }
    Ok(file.into())
}

fn fill(file: &File, inode: &MemfdInodeEntry, source: &dyn ImageSource) -> Result<(), BuildError> {
    let bad = |e: ImageError| BuildError::Images(e.to_string());
    let map = names::pagemap_shmem(inode.shmid.into());
    let Some(mut reader) = get_reader(source, Kind::Pagemap, &map).map_err(bad)? else {
        return Ok(());
    };
    let Some(head) = reader.record::<PagemapHead>().map_err(bad)? else {
        return Ok(());
    };
    let pages_name = names::pages(head.pages_id);
    let env = |source| BuildError::Env {
        what: format!("content of memfd {}", inode.name),
        source,
    };
    let mut pages = source.get(&pages_name).map_err(env)?.unwrap_or_default();
    while let Some(run) = reader.record::<PagemapEntry>().map_err(bad)? {
        let short = || BuildError::Images(format!("{pages_name} does not fit {map}"));
        let len = run
            .nr_pages
            .unwrap_or(0)
            .checked_mul(PAGE)
            .ok_or_else(short)?;
        let data = pages.get(..len as usize).ok_or_else(short)?;
        pages = &pages[len as usize..];
        let there = inode
            .size
            .checked_sub(run.vaddr)
            .ok_or_else(short)?
            .min(len);
        file.write_all_at(&data[..there as usize], run.vaddr)
            .map_err(|source| BuildError::Env {
                what: format!("writing to memfd fd {}", file.as_raw_fd()),
                source,
            })?;
    }
    Ok(())
}
