//! Mappings of our own that live for a moment.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use std::os::fd::AsFd;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Untouched private memory, unmapped on drop.
#[derive(Debug)]
pub struct Fresh {
    at: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

impl Fresh {
    /// Maps `len` bytes for reading.
    pub fn map(len: NonZeroUsize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { at, len })
    }

    /// Reads the first byte; returns its address.
    pub fn read_first_byte(&self) -> u64 {
        // SAFETY: mapped and readable as long as `self`; volatile, so that the
        // page is really touched.
        unsafe { std::ptr::read_volatile(self.at.as_ptr().cast::<u8>()) };
        self.at.as_ptr() as u64
    }
}

/// A whole file, mapped shared for writing: how huge pages are filled, for
/// which there is no write(2).
#[derive(Debug)]
pub struct Shared {
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Shared {
    /// Maps the first `len` bytes.
    pub fn of(file: impl AsFd, len: NonZeroUsize) -> io::Result<Self> {
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { mmap(None, len, rw, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at, len: len.get() })
    }

    /// Writes at an offset; what lies beyond the end is left out.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let start = self.len.min(offset as usize);
        let n = bytes.len().min(self.len - start);
        // SAFETY: inside of the mapping, which lives as long as `self`; the
        // source is another piece of memory, since nobody has ours.
        unsafe {
            let to = self.at.as_ptr().cast::<u8>().add(start);
            to.copy_from_nonoverlapping(bytes.as_ptr(), n);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`, and nobody else knows of it.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody else knows of it.
        let _ = unsafe { munmap(self.at, self.len.get()) };
    }
}
