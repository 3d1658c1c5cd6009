//! Shared mappings, as owned slices.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::{io, slice};

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, mmap_anonymous, msync, munmap};

/// Huge pages and devdax want addresses aligned to this.
const ALIGN: usize = 2 << 20;

/// Address space that parts of files are mapped into, readable as one slice once
/// every byte of it is.
#[derive(Debug)]
pub(super) struct Mapping {
    whole: NonNull<c_void>,
    whole_len: usize,
    start: NonNull<u8>,
    len: usize,
    filled: usize,
}

// SAFETY: the mapping is plain memory owned by this value; nothing is tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared references only read.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of address space, aligned for huge pages.
    pub fn reserve(len: usize) -> io::Result<Mapping> {
        let whole_len = NonZeroUsize::new(len)
            .and_then(|len| len.checked_add(ALIGN))
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let whole = unsafe {
            mmap_anonymous(
                None,
                whole_len,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        let pad = whole.as_ptr() as usize;
        let pad = pad.next_multiple_of(ALIGN) - pad;
        // SAFETY: pad < ALIGN, so the result lies within the reservation of len + ALIGN.
        let start = unsafe { whole.cast::<u8>().add(pad) };
        Ok(Mapping {
            whole,
            whole_len: whole_len.get(),
            start,
            len,
            filled: 0,
        })
    }

    /// Maps `len` bytes of `file` from `offset` behind what is mapped already.
    pub fn append(&mut self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<()> {
        if len == 0 || len > self.len - self.filled {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = NonZeroUsize::new(self.start.as_ptr() as usize + self.filled);
        let length = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: MAP_FIXED lands inside our own reservation, behind every byte that was
        // handed out so far, as checked above.
        unsafe {
            mmap(
                at,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
                file,
                offset as libc::off_t,
            )
        }?;
        self.filled += len;
        Ok(())
    }

    /// What is mapped.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `filled` bytes from `start` are mapped readable, and nothing else of this
        // process holds a reference into them.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.filled) }
    }

    /// What is mapped, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and mapped writable; `&mut self` makes it the only reference.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.filled) }
    }

    /// msync of the pages around a range of bytes.
    pub fn sync_file(&self, start: usize, end: usize) -> io::Result<()> {
        let page_start = start & !4095;
        let end = end.min(self.filled);
        if end <= page_start {
            return Ok(());
        }
        // SAFETY: the range lies within what is mapped; msync changes no memory.
        unsafe {
            msync(
                self.start.add(page_start).cast(),
                end - page_start,
                MsFlags::MS_SYNC,
            )
        }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours; borrows of it ended with this value.
        if let Err(error) = unsafe { munmap(self.whole, self.whole_len) } {
            tracing::warn!(%error, "unmapping a region failed");
        }
    }
}
