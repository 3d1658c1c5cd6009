//! memfd_create(2): files in memory, carried by content.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, Whence, fchown, ftruncate, lseek};

use super::error::{BuildError, Stop};
use super::examined::{Examined, Saved};
use super::reg::{DELETED, open_flags};
use super::sys;
use crate::image::schema::{FdTypes, MemfdFileEntry, MemfdInodeEntry, PagemapEntry, PagemapHead};
use crate::image::{
    ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, get_records, names,
    put_image, put_records,
};
use crate::memory::hugetlb;
use crate::sys::SysError;

/// How a memfd's link begins.
pub(crate) const PREFIX: &str = "/memfd:";
/// Shared memory and page image ids of memfds start here, apart from others'.
const FIRST_SHMID: u32 = 0x4000_0000;
const F_ADD_SEALS: i32 = 1033;
const F_GET_SEALS: i32 = 1034;
const F_SEAL_WRITE: u32 = 0x8;
const F_SEAL_EXEC: u32 = 0x20;
const MFD_NOEXEC_SEAL: u32 = 0x8;
const MFD_EXEC: u32 = 0x10;
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
    let next = memfds.by_inode.len() as u32 + 1;
    let inode_id = match memfds.by_inode.get(&file.inode()) {
        Some((entry, _)) => entry.inode_id,
        None => {
            let link = file.link.strip_prefix(PREFIX).unwrap_or(file.link);
            let seals = sys::fcntl_int(file.fd, "fcntl(F_GET_SEALS)", F_GET_SEALS, 0)?;
            let readable = File::from(sys::reopen(file.fd, libc::O_RDONLY)?);
            let huge = hugetlb::page_bytes(&readable)
                .map_err(|e| Stop::Sys(SysError::new("fstatfs", file.link, errno(&e))))?;
            let entry = MemfdInodeEntry {
                name: link.strip_suffix(DELETED).unwrap_or(link).to_owned(),
                uid: file.stat.st_uid,
                gid: file.stat.st_gid,
                size: file.stat.st_size as u64,
                shmid: FIRST_SHMID + next,
                seals: seals as u32,
                inode_id: next.into(),
                hugetlb_flag: huge.map(hugetlb::size_bits),
                mode: Some(file.stat.st_mode & 0o7777),
            };
            memfds.by_inode.insert(file.inode(), (entry, readable));
            next.into()
        }
    };
    saved.entry.r#type = FdTypes::Memfd.into();
    saved.entry.memfd = Some(Box::new(MemfdFileEntry {
        id: saved.entry.id,
        flags: file.flags(),
        pos: file.info.pos,
        fown: file.fown()?,
        inode_id: inode_id as u32,
    }));
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
            let runs = match entry.hugetlb_flag {
                Some(bits) => huge_runs(&file, bits).map_err(io)?,
                None => data_runs(&file, entry.size).map_err(|e| io(e.into()))?,
            };
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

/// The same for huge pages.
fn huge_runs(file: &File, bits: u32) -> std::io::Result<Vec<(u64, u64)>> {
    let spans = hugetlb::data_spans(file, hugetlb::page_of_bits(bits))?;
    Ok(spans.iter().map(|s| (s.start, s.len as u64)).collect())
}

fn errno(e: &std::io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
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
            if seals != 0 && !sealed_early(&self.inodes[id]) {
                sys::fcntl_int(fd.as_fd(), "fcntl(F_ADD_SEALS)", F_ADD_SEALS, seals)?;
            }
        }
        Ok(())
    }
}

/// Whether a memfd is sealed before it is mapped: what nobody can write to is
/// mapped as such, while a mapping that could be written would stand in the way.
fn sealed_early(inode: &MemfdInodeEntry) -> bool {
    inode.seals & F_SEAL_WRITE != 0
}

fn make(inode: &MemfdInodeEntry, source: &dyn ImageSource) -> Result<OwnedFd, BuildError> {
    let failed = |call, e| SysError::new(call, format!("memfd {}", inode.name), e);
    let name = CString::new(inode.name.as_bytes())
        .map_err(|_| BuildError::Images("a memfd name contains NUL".into()))?;
    let huge = inode.hugetlb_flag;
    let huge = huge.map_or(0, |bits| bits | libc::MFD_HUGETLB);
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let flags = flags | MFdFlags::from_bits_retain(huge);
    // Linux 6.3. Without the flag a kernel may be told to make memfds that can
    // never be executed; which ones cannot is known from the mode and seals.
    let plain = inode.mode.is_none_or(|m| m & 0o111 != 0);
    let exec = match plain || inode.seals & F_SEAL_EXEC == 0 {
        true => MFD_EXEC,
        false => MFD_NOEXEC_SEAL,
    };
    let made = memfd_create(name.as_c_str(), flags | MFdFlags::from_bits_retain(exec));
    let fd = match made {
        Err(Errno::EINVAL) => memfd_create(name.as_c_str(), flags),
        made => made,
    };
    let fd = fd.map_err(|e| failed("memfd_create", e))?;
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
    if sealed_early(inode) {
        let seals = inode.seals as i32;
        sys::fcntl_int(file.as_fd(), "fcntl(F_ADD_SEALS)", F_ADD_SEALS, seals)?;
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
    let mut parts: Vec<(u64, &[u8])> = Vec::new();
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
        parts.push((run.vaddr, &data[..there as usize]));
    }
    if inode.hugetlb_flag.is_some() {
        return hugetlb::fill(file, inode.size, parts.into_iter()).map_err(env);
    }
    for (at, data) in parts {
        file.write_all_at(data, at).map_err(env)?;
    }
    Ok(())
}
