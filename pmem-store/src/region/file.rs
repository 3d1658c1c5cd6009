//! A region in a plain file.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;

use super::Region;
use super::mapping::Mapping;

/// A mapped file.
#[derive(Debug)]
pub struct FileRegion {
    mapping: Mapping,
}

impl FileRegion {
    /// Creates (or empties) the file at `path` and gives it `len` bytes of zeros.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path, len: u64) -> io::Result<FileRegion> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len(len)?;
        FileRegion::map(&file)
    }

    /// Maps the file at `path` as it is.
    ///
    /// # Errors
    /// What the file system says; an empty file cannot be mapped.
    pub fn open(path: &Path) -> io::Result<FileRegion> {
        FileRegion::map(&OpenOptions::new().read(true).write(true).open(path)?)
    }

    fn map(file: &File) -> io::Result<FileRegion> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut mapping = Mapping::reserve(len)?;
        mapping.append(file.as_fd(), 0, len)?;
        Ok(FileRegion { mapping })
    }
}

impl Region for FileRegion {
    fn bytes(&self) -> &[u8] {
        self.mapping.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.mapping.bytes_mut()
    }

    fn sync(&mut self, range: Range<usize>) -> io::Result<()> {
        self.mapping.sync_file(range.start, range.end)
    }
}
