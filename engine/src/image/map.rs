//! Files as memory.

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Smaller files are cheaper to read than to map.
const READ_MAX: usize = 64 << 10;

/// The bytes of a file.
#[derive(Debug)]
pub(super) enum Content {
    /// As they were when it was opened.
    Read(Vec<u8>),
    /// Mapped.
    Mapped(Mapping),
}

impl Content {
    /// Gives the first `len` bytes of `file`, which must have them.
    pub(super) fn of(file: &mut File, len: usize) -> io::Result<Self> {
        if len > READ_MAX {
            let mapping = Mapping::new(file, len, ProtFlags::PROT_READ)?;
            return Ok(Self::Mapped(mapping));
        }
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes)?;
        Ok(Self::Read(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Read(bytes) => bytes,
            Self::Mapped(mapping) => mapping.bytes(),
        }
    }
}

/// A shared mapping of a whole file.
#[derive(Debug)]
pub(super) struct Mapping {
    at: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which must have them.
    pub(super) fn new(file: &File, len: usize, prot: ProtFlags) -> io::Result<Self> {
        let Some(nonzero) = NonZeroUsize::new(len) else {
            return Ok(Self {
                at: NonNull::dangling(),
                len: 0,
            });
        };
        // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
        let at = unsafe { mmap(None, nonzero, prot, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at: at.cast(), len })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `len` readable bytes until drop. That nobody cuts or
        // changes the file meanwhile is up to whoever owns the image directory, which
        // only the dumping program writes, and only before it is read.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    /// The bytes of a mapping made with write permission.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the exclusive borrow keeps other slices away.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: we made this mapping and no slice of it outlives us.
            let unmapped = unsafe { munmap(self.at.cast(), self.len) };
            debug_assert!(unmapped.is_ok());
        }
    }
}

// SAFETY: plain memory, owned by this value alone.
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads.
unsafe impl Sync for Mapping {}
