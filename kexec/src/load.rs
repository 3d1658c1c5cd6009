//! Handing a plan to the kernel.

use std::fs;
use std::io;

use crate::plan::Plan;
use crate::support::{Unsupported, check};
use crate::sys::{self, Piece};

/// Why a plan could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The system does not allow it at all.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Another load or a crash dump is being prepared right now.
    #[error("another program is loading a kernel; try again")]
    Busy,
    /// The kernel has no memory for the copies of all segments.
    #[error("the running kernel has no memory for the next kernel and its initrd")]
    NoMemory,
    /// The kernel did not accept the segments' addresses.
    #[error("the running kernel does not accept the segments' addresses")]
    BadAddress(#[source] io::Error),
    /// Anything else.
    #[error("kexec_load")]
    Failed(#[source] io::Error),
}

/// Loads a kernel to be started by the next kexec reboot, in place of one loaded before.
///
/// # Errors
/// Every [`LoadError`]; what was loaded before is then still loaded.
pub fn load(plan: &Plan<'_>) -> Result<(), LoadError> {
    check()?;
    let pieces: Vec<Piece<'_>> = plan
        .segments
        .iter()
        .map(|segment| Piece {
            bytes: &segment.bytes,
            address: segment.address,
            memory_len: segment.memory_len,
        })
        .collect();
    for segment in &plan.segments {
        let (name, address, len) = (segment.name, segment.address, segment.memory_len);
        tracing::debug!(name, address, len, "segment");
    }
    sys::kexec_load(plan.entry, &pieces).map_err(explain)
}

/// Forgets the loaded kernel; fine where none is loaded.
///
/// # Errors
/// Those of [`load`].
pub fn unload() -> Result<(), LoadError> {
    sys::kexec_load(0, &[]).map_err(explain)
}

/// Whether a kernel is loaded, by us or somebody else.
///
/// # Errors
/// What reading `/sys/kernel/kexec_loaded` says.
pub fn is_loaded() -> io::Result<bool> {
    Ok(fs::read_to_string("/sys/kernel/kexec_loaded")?.trim() == "1")
}

fn explain(error: io::Error) -> LoadError {
    match error.raw_os_error() {
        Some(libc::EPERM) => Unsupported::NotPermitted.into(),
        Some(libc::ENOSYS) => Unsupported::NotBuilt.into(),
        Some(libc::EBUSY) => LoadError::Busy,
        Some(libc::ENOMEM) => LoadError::NoMemory,
        Some(libc::EADDRNOTAVAIL | libc::EINVAL) => LoadError::BadAddress(error),
        _ => LoadError::Failed(error),
    }
}
