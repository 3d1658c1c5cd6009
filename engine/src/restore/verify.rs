//! Images read and checked, without anything being made from them.

use super::RestoreError;
use super::images::Images;
use crate::image::schema::FileEntry;
use crate::image::{ImageSource, Kind, get_records, names};
use crate::memory::heritage;

/// What images hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Processes, zombies included.
    pub processes: usize,
    /// Open file descriptions.
    pub files: usize,
    /// Bytes of page content, those in parent images included.
    pub page_bytes: u64,
}

/// Reads and checks the images of a tree as a restore does before it makes the
/// first process. Whatever the bytes are, it ends with a result or an error.
pub fn verify(source: &dyn ImageSource) -> Result<Verified, RestoreError> {
    let images = Images::load(source)?;
    let files: Vec<FileEntry> = get_records(source, Kind::Files, names::FILES)?;
    let mut out = Verified {
        processes: images.processes.len(),
        files: files.len(),
        ..Verified::default()
    };
    for p in &images.processes {
        out.page_bytes += heritage::pages(source, p.id)?
            .iter()
            .map(|p| p.bytes.len() as u64)
            .sum::<u64>();
    }
    Ok(out)
}
