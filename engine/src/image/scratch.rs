//! Memory for images that are not kept here.

use std::io;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::ProtFlags;
use nix::unistd::ftruncate;

use super::map::Mapping;

/// Zeroed memory, page aligned, which takes room only where it is written to.
#[derive(Debug)]
pub struct Scratch(Mapping);

impl Scratch {
    /// So many bytes.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = memfd_create("rcr-scratch", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, i64::try_from(len).map_err(io::Error::other)?)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Self(Mapping::new(&file.into(), len, prot)?))
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// To be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}
