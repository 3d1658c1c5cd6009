//! The kernel's pool of 2 MiB huge pages
//! (Documentation/admin-guide/mm/hugetlbpage.rst).

use std::path::PathBuf;

use super::region_error::RegionError;
use super::sysfs;

const POOL_DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Pages that we added to the pool; they leave it again with this value.
#[derive(Debug)]
pub(super) struct PoolShare {
    added: u64,
    kept: bool,
}

impl PoolShare {
    /// No pages yet.
    pub fn new() -> PoolShare {
        PoolShare {
            added: 0,
            kept: false,
        }
    }

    /// Asks for `pages` more and says how many came.
    pub fn grow(&mut self, pages: u64) -> Result<u64, RegionError> {
        let before = size()?;
        sysfs::write(&size_path(), &(before + pages).to_string())?;
        let gained = size()?.saturating_sub(before);
        self.added += gained;
        Ok(gained)
    }

    /// Takes `pages` unused ones out of the pool.
    pub fn shrink(&mut self, pages: u64) -> Result<(), RegionError> {
        let pages = pages.min(self.added);
        shrink_pool(pages)?;
        self.added -= pages;
        Ok(())
    }

    /// Leaves the pages in the pool.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for PoolShare {
    fn drop(&mut self) {
        let pages = if self.kept { 0 } else { self.added };
        if let Err(error) = shrink_pool(pages) {
            tracing::warn!(%error, pages, "huge pages stay in the kernel's pool");
        }
    }
}

/// Takes `pages` unused ones out of the pool, whoever put them there.
pub(super) fn shrink_pool(pages: u64) -> Result<(), RegionError> {
    if pages == 0 {
        return Ok(());
    }
    sysfs::write(&size_path(), &size()?.saturating_sub(pages).to_string())
}

fn size() -> Result<u64, RegionError> {
    sysfs::read_u64(&size_path())
}

fn size_path() -> PathBuf {
    PathBuf::from(POOL_DIR).join("nr_hugepages")
}
