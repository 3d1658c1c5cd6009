//! Shared anonymous memory: saved once, whoever maps it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::unistd::{Whence, lseek64};

use crate::image::schema::VmaEntry;
use crate::image::{ImageSink, ImageSource, names};
use crate::sys::process::Span;

use super::MemoryError;
use super::hugetlb;
use super::maps::Vma;
use super::pagemap::PAGE;
use super::pages::{self, Saved};
use super::vma::status;

/// The objects met while mappings are saved.
#[derive(Debug, Default)]
pub struct Objects {
    by_inode: BTreeMap<u64, File>,
}

impl Objects {
    /// Notes the object behind a mapping; returns its id.
    pub fn note(&mut self, pid: i32, v: &Vma) -> Result<u64, MemoryError> {
        if let Entry::Vacant(entry) = self.by_inode.entry(v.inode) {
            let path = format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end);
            entry.insert(File::open(&path).map_err(MemoryError::io(&path))?);
        }
        Ok(v.inode)
    }

    /// Saves the content of all objects.
    pub fn save(
        &self,
        next_pages_id: &mut u32,
        sink: &mut dyn ImageSink,
    ) -> Result<(), MemoryError> {
        for (&id, file) in &self.by_inode {
            let spans = data_spans(file)?;
            pages::save_object(file, &spans, id, *next_pages_id, sink)?;
            *next_pages_id += 1;
        }
        Ok(())
    }

    /// Bytes of content in all objects.
    pub fn bytes(&self) -> Result<usize, MemoryError> {
        let mut sum = 0;
        for file in self.by_inode.values() {
            sum += data_spans(file)?.iter().map(|s| s.len).sum::<usize>();
        }
        Ok(sum)
    }
}

/// Where a tmpfs file has content (lseek(2), SEEK_DATA).
fn data_spans(file: &File) -> Result<Vec<Span>, MemoryError> {
    let huge = hugetlb::page_bytes(file).map_err(MemoryError::io("shared memory"))?;
    if let Some(bytes) = huge {
        let spans = hugetlb::data_spans(file, bytes);
        return spans.map_err(MemoryError::io("reading shared huge pages"));
    }
    let io = |e: Errno| MemoryError::Io {
        what: "looking for data in shared memory".into(),
        source: e.into(),
    };
    let end = file
        .metadata()
        .map_err(MemoryError::io("stat of shared memory"))?
        .len() as i64;
    let mut spans = Vec::new();
    let mut at = 0;
    while at < end {
        let start = match lseek64(file.as_fd(), at, Whence::SeekData) {
            Ok(s) => s,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(io(e)),
        };
        let stop = lseek64(file.as_fd(), start, Whence::SeekHole).map_err(io)?;
        let len = (stop as u64).next_multiple_of(PAGE) - start as u64;
        spans.push(Span {
            start: start as u64,
            len: len as usize,
        });
        at = stop;
    }
    Ok(spans)
}

/// Shared objects made again, held open by the controller.
#[derive(Debug, Default)]
pub struct Rebuilt {
    by_id: BTreeMap<u64, OwnedFd>,
}

impl Rebuilt {
    /// The descriptor of an object; made from its image on first use. `vmas`
    /// are all mappings of it, which tell how long it is at least.
    pub fn open<'v>(
        &mut self,
        id: u64,
        source: &dyn ImageSource,
        vmas: impl Iterator<Item = &'v VmaEntry>,
    ) -> Result<i32, MemoryError> {
        if let Some(fd) = self.by_id.get(&id) {
            return Ok(fd.as_raw_fd());
        }
        let saved = Saved::load(source, &names::pagemap_shmem(id))?;
        let mut huge = 0;
        let mapped = vmas
            .filter(|e| e.status & status::ANON_SHARED != 0 && e.shmid == id)
            .inspect(|e| huge |= e.flags as i32 & huge_bits())
            .map(|e| e.pgoff + (e.end - e.start));
        let content = saved.pieces.iter().map(|p| p.end());
        let len = mapped.chain(content).max().unwrap_or(PAGE);
        let filling = || MemoryError::io("filling shared memory");
        let fd;
        if huge & libc::MAP_HUGETLB != 0 {
            let len = len.next_multiple_of(hugetlb::page_of_bits(huge as u32));
            fd = make_object(len, huge)?;
            let parts = saved.pieces.iter().map(|p| (p.start, p.bytes));
            hugetlb::fill(&fd, len, parts).map_err(filling())?;
        } else {
            fd = make_object(len, 0)?;
            for p in &saved.pieces {
                fd.write_all_at(p.bytes, p.start).map_err(filling())?;
            }
        }
        let fd = OwnedFd::from(fd);
        let raw = fd.as_raw_fd();
        self.by_id.insert(id, fd);
        Ok(raw)
    }
}

/// The flags that ask for huge pages.
fn huge_bits() -> i32 {
    libc::MAP_HUGETLB | 0x3f << libc::MAP_HUGE_SHIFT
}

/// Makes what `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes, as a descriptor.
fn make_object(len: u64, huge: i32) -> Result<File, MemoryError> {
    let sys = |e: Errno| MemoryError::Io {
        what: "mapping shared memory".into(),
        source: e.into(),
    };
    let size = std::num::NonZeroUsize::new(len as usize).expect("an object has at least a page");
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::from_bits_retain(huge);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let map = unsafe { mmap_anonymous(None, size, prot, flags) }.map_err(sys)?;
    let start = map.as_ptr() as u64;
    let path = format!(
        "/proc/self/map_files/{start:x}-{:x}",
        start + len.next_multiple_of(PAGE)
    );
    let file = OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: the mapping was made above and nobody else knows of it.
    unsafe { munmap(map, size.get()) }.map_err(sys)?;
    file.map_err(MemoryError::io(path))
}
