//! Why a region cannot be had or given back.

use std::io;
use std::path::PathBuf;

use crate::range::PhysRange;

/// What went wrong with physical memory.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A system call or a kernel file failed.
    #[error("{action}")]
    Io {
        /// What was being done.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A file of the kernel does not hold what it should.
    #[error("{path} holds {content:?}, which is not understood")]
    Unparsable {
        /// The file.
        path: PathBuf,
        /// Its content.
        content: String,
    },
    /// There is not enough free memory to begin with.
    #[error(
        "the store needs {needed_mib} MiB of memory, and {available_mib} MiB are available \
         (besides {spare_mib} MiB left to the system); free some or stop services"
    )]
    TooLittleMemory {
        /// Needed, in MiB.
        needed_mib: u64,
        /// There is, in MiB.
        available_mib: u64,
        /// Not to be touched, in MiB.
        spare_mib: u64,
    },
    /// Enough memory is free, but not in whole memory blocks.
    #[error(
        "only {found} of {wanted} whole blocks of {block_mib} MiB could be had: memory is too \
         fragmented; free some or stop services"
    )]
    Fragmented {
        /// Blocks needed.
        wanted: u64,
        /// Blocks had.
        found: u64,
        /// Bytes of a block, in MiB.
        block_mib: u64,
    },
    /// A process goes on using a region that is to be given back.
    #[error("process {pid} does not let go of the memory; restart what it belongs to")]
    Mapped {
        /// The process.
        pid: i32,
    },
    /// A former region is still there.
    #[error("{path} holds the region of another upgrade in preparation")]
    InUse {
        /// The region's file.
        path: PathBuf,
    },
    /// The kernel moved a page of the region.
    #[error("the kernel moved a page of the region from {was:#x} to {now:#x}")]
    Moved {
        /// Physical address before.
        was: u64,
        /// Physical address now, zero for none.
        now: u64,
    },
    /// The locator's memory is not in any dax device.
    #[error("no dax device holds {range}; is dax_hmem loaded, and was the range soft reserved?")]
    NoDevice {
        /// The range.
        range: PhysRange,
    },
    /// The kernel took the memory as RAM before it was read.
    #[error("{device} was taken by the {driver} driver: its content is lost")]
    Taken {
        /// The device's name.
        device: String,
        /// The driver's.
        driver: String,
    },
    /// Memory that was given back did not come online.
    #[error("{missing_mib} MiB of {total_mib} MiB given back are not online")]
    NotOnline {
        /// Not online, in MiB.
        missing_mib: u64,
        /// Given back, in MiB.
        total_mib: u64,
    },
}

/// Shortens `map_err` over [`io::Result`] and [`nix::Result`].
pub(crate) trait Context<T> {
    /// Says what was being done.
    fn doing(self, action: impl FnOnce() -> String) -> Result<T, RegionError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T, RegionError> {
        self.map_err(|source| RegionError::Io {
            action: action(),
            source: source.into(),
        })
    }
}
