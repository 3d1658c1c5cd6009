//! The file that keeps a region's huge pages.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};

use super::blocks::{FilePage, HUGE};
use super::mapping::Mapping;
use super::pagemap::physical_addresses;
use super::region_error::{Context, RegionError};

const FILE_NAME: &str = "store";
/// `st_blocks` counts in these.
const STAT_BLOCK: u64 = 512;

/// A file in a hugetlbfs of our own; both go with this value.
#[derive(Debug)]
pub(super) struct RegionFile {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    len: u64,
    kept: bool,
}

impl RegionFile {
    /// Mounts a hugetlbfs on `dir` and creates the file in it.
    pub fn create(dir: &Path) -> Result<RegionFile, RegionError> {
        let path = dir.join(FILE_NAME);
        if path.exists() {
            return Err(RegionError::InUse { path });
        }
        fs::create_dir_all(dir).doing(|| format!("creating {}", dir.display()))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("hugetlbfs"),
            dir,
            Some("hugetlbfs"),
            flags,
            Some("pagesize=2M,mode=0700"),
        )
        .doing(|| format!("mounting hugetlbfs on {}", dir.display()))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        match file {
            Ok(file) => Ok(RegionFile {
                dir: dir.to_owned(),
                path,
                file,
                len: 0,
                kept: false,
            }),
            Err(error) => {
                umount(dir).doing(|| format!("unmounting {}", dir.display()))?;
                Err(error).doing(|| format!("creating {}", path.display()))
            }
        }
    }

    /// Removes what a kept file left in `dir` and says how many pages it had.
    pub fn discard(dir: &Path) -> Result<u64, RegionError> {
        let path = dir.join(FILE_NAME);
        let pages = match fs::metadata(&path) {
            Ok(meta) => meta.blocks() * STAT_BLOCK / HUGE,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error).doing(|| format!("looking at {}", path.display())),
        };
        fs::remove_file(&path).doing(|| format!("removing {}", path.display()))?;
        umount(dir).doing(|| format!("unmounting {}", dir.display()))?;
        Ok(pages)
    }

    /// Adds up to `pages` pages of the pool to the file's end.
    pub fn extend(&mut self, pages: u64) -> Result<Vec<FilePage>, RegionError> {
        let start = self.len;
        for _ in 0..pages {
            let (at, len) = (self.len as libc::off_t, HUGE as libc::off_t);
            match fallocate(&self.file, FallocateFlags::empty(), at, len) {
                Ok(()) => self.len += HUGE,
                // Somebody else was faster; what came is ours.
                Err(nix::Error::ENOSPC | nix::Error::ENOMEM) if self.len > start => break,
                Err(error) => return Err(error).doing(|| "taking huge pages".to_owned()),
            }
        }
        let added = (start..self.len).step_by(HUGE as usize);
        let mut view = Mapping::reserve((self.len - start) as usize)
            .doing(|| "reserving address space".to_owned())?;
        view.append(self.file.as_fd(), start, (self.len - start) as usize)
            .doing(|| "mapping huge pages".to_owned())?;
        let addresses =
            physical_addresses(view.bytes()).doing(|| "reading /proc/self/pagemap".to_owned())?;
        Ok(added
            .zip(addresses)
            .map(|(offset, phys)| FilePage { offset, phys })
            .collect())
    }

    /// Gives one page back to the pool.
    pub fn punch(&self, offset: u64) -> Result<(), RegionError> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(
            &self.file,
            flags,
            offset as libc::off_t,
            HUGE as libc::off_t,
        )
        .doing(|| "giving back a huge page".to_owned())
    }

    /// The pages as one slice in the order given.
    pub fn map(&self, pages: &[FilePage]) -> Result<Mapping, RegionError> {
        let doing = || "mapping huge pages".to_owned();
        let mut mapping = Mapping::reserve(pages.len() * HUGE as usize).doing(doing)?;
        let mut rest = pages;
        while let Some(first) = rest.first() {
            let run = (0u64..)
                .zip(rest)
                .take_while(|(n, p)| p.offset == first.offset + n * HUGE);
            let run = run.count();
            mapping
                .append(self.file.as_fd(), first.offset, run * HUGE as usize)
                .doing(doing)?;
            rest = &rest[run..];
        }
        Ok(mapping)
    }

    /// Leaves file and mount when this value goes.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for RegionFile {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Freed now, not when the descriptor closes: the pool shrinks right after.
        let freed = self
            .file
            .set_len(0)
            .and_then(|()| fs::remove_file(&self.path));
        // The file is still open, and keeps the mount busy until this value is gone.
        let unmounted = umount2(&self.dir, MntFlags::MNT_DETACH);
        if let Err(error) = freed.and(unmounted.map_err(io::Error::from)) {
            tracing::warn!(%error, dir = %self.dir.display(), "undoing the region's file failed");
        }
    }
}
