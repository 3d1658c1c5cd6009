//! Objects of huge pages (hugetlbfs): their content is found by looking, since
//! they know no holes, and filled through a mapping, since they take no writes.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use nix::sys::statfs::fstatfs;

use crate::sys::map::Shared;
use crate::sys::process::Span;

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The size of the huge pages that a file is made of, if it is.
pub fn page_bytes(file: &File) -> io::Result<Option<u64>> {
    let fs = fstatfs(file)?;
    let huge = fs.filesystem_type().0 == HUGETLBFS_MAGIC;
    Ok(huge.then_some(fs.block_size() as u64))
}

/// The flag bits of a page size, as mmap(2), shmget(2) and memfd_create(2)
/// have them.
pub fn size_bits(page_bytes: u64) -> u32 {
    page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT
}

/// The page size that flag bits stand for; the usual one for none.
pub fn page_of_bits(bits: u32) -> u64 {
    match bits >> libc::MAP_HUGE_SHIFT & 0x3f {
        0 => 2 << 20,
        n => 1 << n,
    }
}

/// Pages that hold anything but zeros.
pub fn data_spans(file: &File, page_bytes: u64) -> io::Result<Vec<Span>> {
    let end = file.metadata()?.len();
    let mut page = vec![0; page_bytes as usize];
    let mut spans: Vec<Span> = Vec::new();
    for start in (0..end).step_by(page_bytes as usize) {
        file.read_exact_at(&mut page, start)?;
        if page.iter().any(|&b| b != 0) {
            super::pagemap::push(&mut spans, start, start + page_bytes);
        }
    }
    Ok(spans)
}

/// Writes pieces, each at its offset, into an object of `len` bytes.
pub fn fill<'a>(
    file: &File,
    len: u64,
    pieces: impl Iterator<Item = (u64, &'a [u8])>,
) -> io::Result<()> {
    let Some(len) = NonZeroUsize::new(len as usize) else {
        return Ok(());
    };
    let mut map = Shared::of(file, len)?;
    for (offset, bytes) in pieces {
        map.write(offset, bytes);
    }
    Ok(())
}
