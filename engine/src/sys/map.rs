//! Mappings of our own that live for a moment.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

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

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody else knows of it.
        let _ = unsafe { munmap(self.at, self.len.get()) };
    }
}
