//! The old kernel's side: huge pages that fill whole memory blocks.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::blocks::{FilePage, HUGE, merge};
use super::hotplug::{self, MovableBlocks};
use super::mapping::Mapping;
use super::pagemap::physical_addresses;
use super::pin::Pin;
use super::pool::{PoolShare, shrink_pool};
use super::region_error::{Context, RegionError};
use super::region_file::RegionFile;
use super::search::Search;
use super::{Region, order_memory_writes, sysfs};
use crate::layout::Nonce;
use crate::locator::Locator;

/// What the next kernel can give back as RAM at the least.
const BLOCK_MIN: u64 = 128 << 20;

/// How to get a region.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where an own hugetlbfs is mounted.
    pub dir: PathBuf,
    /// Memory in bytes that stays available to the system beside the region, the
    /// loaded kernel and initrd included.
    pub spare_bytes: u64,
    /// Whether memory blocks may be emptied where free memory is too fragmented.
    pub defragment: bool,
    /// How long emptying one memory block may take.
    pub offline_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            dir: PathBuf::from("/run/rcr/region"),
            spare_bytes: 256 << 20,
            defragment: true,
            offline_limit: Duration::from_secs(5),
        }
    }
}

/// Memory whose physical addresses the next kernel can be told.
///
/// Its bytes ascend physically. Dropping it gives everything back as it was,
/// unless [`HugeRegion::keep`] was called: then the frames stay taken, by a file
/// in [`Options::dir`], until the kernel ends or [`HugeRegion::discard`]. When the
/// shutdown unmounts that folder, they stay in the kernel's pool of free huge
/// pages, whose content nothing changes before a program takes one.
#[derive(Debug)]
pub struct HugeRegion {
    // In the order of undoing: the file's pages go back to the pool before the pool
    // shrinks, and blocks are empty before they change their zone.
    mapping: Mapping,
    pin: Option<Pin>,
    file: RegionFile,
    pool: PoolShare,
    movable: MovableBlocks,
    pages: Vec<FilePage>,
}

impl HugeRegion {
    /// Takes at least `bytes` of memory, rounded up to memory blocks.
    ///
    /// # Errors
    /// [`RegionError::TooLittleMemory`], [`RegionError::Fragmented`],
    /// [`RegionError::InUse`] or what the system says; everything is then as before.
    pub fn allocate(bytes: u64, options: &Options) -> Result<HugeRegion, RegionError> {
        let block_len = hotplug::block_bytes()?.max(BLOCK_MIN);
        let wanted = bytes.div_ceil(block_len).max(1);
        let available = sysfs::meminfo("MemAvailable")?;
        if wanted
            .saturating_mul(block_len)
            .saturating_add(options.spare_bytes)
            > available
        {
            return Err(RegionError::TooLittleMemory {
                needed_mib: (wanted.saturating_mul(block_len)) >> 20,
                available_mib: available.saturating_sub(options.spare_bytes) >> 20,
                spare_mib: options.spare_bytes >> 20,
            });
        }
        let ram_end = hotplug::block_starts()?
            .last()
            .map_or(0, |start| start + block_len);

        // Dropped in reverse order on failure, which is the order of undoing as well.
        let mut movable = MovableBlocks::new(options.offline_limit);
        let mut pool = PoolShare::new();
        let mut file = RegionFile::create(&options.dir)?;
        let mut search = Search {
            block_len,
            ram_end,
            wanted,
            pages_max: (available - options.spare_bytes) / HUGE,
            pages: Vec::new(),
        };
        let mut chosen = search.grow(&mut file, &mut pool)?;
        if chosen.is_none() && options.defragment {
            search.release_others(&file, &mut pool)?;
            let missing = wanted - search.blocks().len() as u64;
            // Others allocate from emptied blocks too, so some do not fill.
            let asked = missing + missing.div_ceil(3);
            let converted = movable.convert(&search.candidates()?, asked)?;
            tracing::info!(
                missing,
                converted,
                "memory is fragmented; memory blocks were emptied"
            );
            chosen = search.grow(&mut file, &mut pool)?;
        }
        let Some(chosen) = chosen else {
            let found = search.blocks().len() as u64;
            return Err(RegionError::Fragmented {
                wanted,
                found,
                block_mib: block_len >> 20,
            });
        };
        let mut blocks = search.blocks();
        let pages: Vec<FilePage> = chosen
            .iter()
            .flat_map(|start| blocks.remove(start).unwrap_or_default())
            .collect();
        search.release_all_but(&pages, &file, &mut pool)?;
        let mapping = file.map(&pages)?;
        let mut region = HugeRegion {
            mapping,
            pin: None,
            file,
            pool,
            movable,
            pages,
        };
        region.recheck_pfns()?;
        region.pin_where_possible()?;
        Ok(region)
    }

    /// Reads the physical addresses once more, for instance after a kernel was loaded.
    ///
    /// # Errors
    /// [`RegionError::Moved`]: the region's locator is no longer true.
    pub fn recheck_pfns(&self) -> Result<(), RegionError> {
        let addresses = physical_addresses(self.mapping.bytes())
            .doing(|| "reading /proc/self/pagemap".to_owned())?;
        match self
            .pages
            .iter()
            .zip(&addresses)
            .find(|(page, now)| page.phys != **now)
        {
            Some((page, &now)) => Err(RegionError::Moved {
                was: page.phys,
                now,
            }),
            None => Ok(()),
        }
    }

    /// Whether the frames are pinned. Those in movable memory are not: pinning moves them.
    pub fn is_pinned(&self) -> bool {
        self.pin.is_some()
    }

    /// Where the region lies, for the next kernel.
    pub fn locator(&self, nonce: Nonce) -> Locator {
        Locator {
            nonce,
            ranges: merge(&self.pages),
        }
    }

    /// Leaves the memory taken when this value goes: the kernel is about to be replaced.
    pub fn keep(&mut self) {
        self.file.keep();
        self.pool.keep();
        self.movable.keep();
    }

    /// Gives back what an earlier [`HugeRegion::keep`] left in `dir`; does nothing
    /// where there is nothing.
    ///
    /// # Errors
    /// What the system says.
    pub fn discard(dir: &Path) -> Result<(), RegionError> {
        shrink_pool(RegionFile::discard(dir)?)
    }

    fn pin_where_possible(&mut self) -> Result<(), RegionError> {
        let block_len = hotplug::block_bytes()?;
        let mut block = None;
        for page in &self.pages {
            let start = page.phys / block_len * block_len;
            if block != Some(start) && hotplug::is_movable(start)? {
                tracing::debug!(start, "region in movable memory stays unpinned");
                return Ok(());
            }
            block = Some(start);
        }
        match Pin::new(self.mapping.bytes()) {
            Ok(pin) => self.pin = Some(pin),
            // io_uring may be off (kernel.io_uring_disabled); what holds then is the check
            // of the addresses after the kernel was loaded.
            Err(error) => tracing::warn!(%error, "the region's memory could not be pinned"),
        }
        self.recheck_pfns()
    }
}

impl Region for HugeRegion {
    fn bytes(&self) -> &[u8] {
        self.mapping.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.mapping.bytes_mut()
    }

    fn sync(&mut self, _range: Range<usize>) -> io::Result<()> {
        order_memory_writes();
        Ok(())
    }
}
