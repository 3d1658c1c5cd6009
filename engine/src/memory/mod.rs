//! Memory: mappings, their content, and what the kernel knows of the layout.

pub mod aio;
pub mod extra;
pub mod heritage;
pub mod hugetlb;
pub mod layout;
pub mod maps;
pub mod mm;
pub mod pagemap;
pub mod pages;
mod parallel;
pub mod place;
pub mod policy;
pub mod shmem;
pub mod sysv;
pub mod vdso;
pub mod vma;

use std::io;

use crate::image::ImageError;
use crate::remote::RemoteError;
use crate::sys::SysError;

/// Why memory could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A file of /proc could not be read.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An image could not be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A remote program failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The vDSO of the image or of this kernel is not as expected.
    #[error("vDSO: {0}")]
    Vdso(String),
    /// An AIO ring cannot be made again.
    #[error("AIO ring at {at:x}: {what}")]
    Aio {
        /// Its address.
        at: u64,
        /// Why.
        what: String,
    },
    /// A mapping cannot be made at its place.
    #[error("mapping at {at:x}: {what}")]
    Place {
        /// Its address.
        at: u64,
        /// Why.
        what: String,
    },
    /// There is no address that is free before and after.
    #[error("no free range of {0} bytes in the address space")]
    NoRoom(u64),
}

impl MemoryError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
