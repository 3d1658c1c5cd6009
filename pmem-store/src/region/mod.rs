//! Where the bytes of a store are.
//!
//! | kind | side | bytes |
//! |---|---|---|
//! | [`HugeRegion`] | old kernel | huge pages forming whole memory blocks |
//! | [`DaxRegion`] | new kernel | the same frames as soft-reserved memory |
//! | [`FileRegion`] | any | a plain file |
//! | `Vec<u8>` | any | its own |

mod blocks;
mod dax_device;
mod devdax;
mod file;
mod hotplug;
mod hugepages;
mod mapping;
mod pagemap;
mod pin;
mod pool;
mod region_error;
mod region_file;
pub mod release;
mod search;
mod sysfs;

use std::io;
use std::ops::Range;
use std::sync::atomic::{Ordering, fence};

pub use devdax::DaxRegion;
pub use file::FileRegion;
pub use hugepages::{HugeRegion, Options as HugeOptions};
pub use region_error::RegionError;

/// One slice of bytes that a store lies in.
pub trait Region {
    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, for writing.
    fn bytes_mut(&mut self) -> &mut [u8];

    /// Makes what was written in `range` lasting before anything written later is.
    ///
    /// # Errors
    /// Whatever the medium says.
    fn sync(&mut self, range: Range<usize>) -> io::Result<()>;
}

impl<R: Region + ?Sized> Region for &mut R {
    fn bytes(&self) -> &[u8] {
        (**self).bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        (**self).bytes_mut()
    }

    fn sync(&mut self, range: Range<usize>) -> io::Result<()> {
        (**self).sync(range)
    }
}

impl<R: Region + ?Sized> Region for Box<R> {
    fn bytes(&self) -> &[u8] {
        (**self).bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        (**self).bytes_mut()
    }

    fn sync(&mut self, range: Range<usize>) -> io::Result<()> {
        (**self).sync(range)
    }
}

impl Region for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }

    fn sync(&mut self, _range: Range<usize>) -> io::Result<()> {
        order_memory_writes();
        Ok(())
    }
}

/// All that RAM needs: caches are coherent and nothing of it is lost over a kexec.
fn order_memory_writes() {
    fence(Ordering::SeqCst);
}
