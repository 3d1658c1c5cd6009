//! Space given back: pages of parent images that a later generation has anew.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use super::{PreDumpError, ranges};
use crate::image::schema::{PagemapEntry, PagemapHead};
use crate::image::{DirSource, ImageReader, ImageSource, Kind, names};
use crate::memory::pagemap::PAGE;
use crate::memory::pages::PRESENT;

/// Punches holes into the pages images of all parents of the images in `dir`,
/// where a later generation has the page itself. Returns the bytes freed.
pub fn dedup(dir: &Path) -> Result<u64, PreDumpError> {
    let mut freed = 0;
    let mut child = dir.to_owned();
    let mut newer: Vec<(String, Vec<Range<u64>>)> = Vec::new();
    loop {
        let images =
            DirSource::open(&child).map_err(PreDumpError::io(child.display().to_string()))?;
        for name in images.names() {
            if name.starts_with("pagemap-") {
                let own = present(&images, &name)?.into_iter().map(|p| p.range);
                let own: Vec<_> = own.collect();
                match newer.iter_mut().find(|(n, _)| *n == name) {
                    Some((_, all)) => *all = ranges::join(all, &own),
                    None => newer.push((name, own)),
                }
            }
        }
        drop(images);
        let parent = child.join(DirSource::PARENT);
        if !parent.is_dir() {
            return Ok(freed);
        }
        let images =
            DirSource::open(&parent).map_err(PreDumpError::io(parent.display().to_string()))?;
        for (name, again) in &newer {
            for run in present(&images, name)? {
                for r in ranges::both(std::slice::from_ref(&run.range), again) {
                    let path = parent.join(&run.file);
                    let at = run.offset + (r.start - run.range.start);
                    punch(&path, at, r.end - r.start)
                        .map_err(PreDumpError::io(path.display().to_string()))?;
                    freed += r.end - r.start;
                }
            }
        }
        child = parent;
    }
}

/// A run of pages that images have themselves.
struct Present {
    range: Range<u64>,
    file: String,
    offset: u64,
}

fn present(images: &DirSource, name: &str) -> Result<Vec<Present>, PreDumpError> {
    let Some(bytes) = images.get(name).map_err(PreDumpError::io(name))? else {
        return Ok(Vec::new());
    };
    let mut reader = ImageReader::new(name, Kind::Pagemap, bytes)?;
    let Some(head) = reader.record::<PagemapHead>()? else {
        return Ok(Vec::new());
    };
    let mut out = Vec::new();
    let mut offset = 0;
    while let Some(e) = reader.record::<PagemapEntry>()? {
        let pages = e.nr_pages.unwrap_or(u64::from(e.compat_nr_pages));
        let there = e.flags.unwrap_or(PRESENT) & PRESENT != 0 && e.in_parent != Some(true);
        let len = pages.saturating_mul(PAGE);
        if there {
            out.push(Present {
                range: e.vaddr..e.vaddr.saturating_add(len),
                file: names::pages(head.pages_id),
                offset,
            });
            offset = offset.saturating_add(len);
        }
    }
    Ok(out)
}

fn punch(path: &Path, at: u64, len: u64) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let file = File::options().write(true).open(path)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, at as i64, len as i64)?)
}
