//! Taking huge pages until they fill enough memory blocks.

use std::collections::{BTreeMap, HashSet};

use super::blocks::{FilePage, HUGE, choose, may_take, whole_blocks};
use super::hotplug;
use super::pool::PoolShare;
use super::region_error::RegionError;
use super::region_file::RegionFile;

/// Taking pages until they fill enough blocks.
pub(super) struct Search {
    pub block_len: u64,
    pub ram_end: u64,
    pub wanted: u64,
    pub pages_max: u64,
    pub pages: Vec<FilePage>,
}

impl Search {
    /// Takes more and more pages; the blocks to use, or `None` when no more come.
    pub fn grow(
        &mut self,
        file: &mut RegionFile,
        pool: &mut PoolShare,
    ) -> Result<Option<Vec<u64>>, RegionError> {
        let per_block = self.block_len / HUGE;
        loop {
            let blocks = self.blocks();
            if let Some(chosen) = choose(&blocks, self.wanted, self.block_len) {
                return Ok(Some(chosen));
            }
            // One more than is missing: what comes seldom starts where a block does.
            let missing = (self.wanted - blocks.len() as u64 + 1) * per_block;
            let room = self.pages_max.saturating_sub(self.pages.len() as u64);
            let gained = pool.grow(missing.min(room))?;
            if gained == 0 {
                return Ok(None);
            }
            self.pages.extend(file.extend(gained)?);
            tracing::debug!(
                pages = self.pages.len(),
                blocks = self.blocks().len(),
                "huge pages"
            );
        }
    }

    /// The blocks that are filled, with their pages.
    pub fn blocks(&self) -> BTreeMap<u64, Vec<FilePage>> {
        whole_blocks(&self.pages, self.block_len, self.ram_end)
    }

    /// Blocks that could be emptied, the best first.
    pub fn candidates(&self) -> Result<Vec<u64>, RegionError> {
        let taken = self.blocks();
        // Blocks larger than what the next kernel needs are one memory block each;
        // smaller memory blocks do not exist on this architecture.
        let mut starts = hotplug::block_starts()?;
        starts.retain(|start| {
            !taken.contains_key(start) && may_take(*start, self.block_len, self.ram_end)
        });
        starts.reverse();
        Ok(starts)
    }

    /// Gives back the pages that fill no block.
    pub fn release_others(
        &mut self,
        file: &RegionFile,
        pool: &mut PoolShare,
    ) -> Result<(), RegionError> {
        let kept: Vec<FilePage> = self.blocks().into_values().flatten().collect();
        self.release_all_but(&kept, file, pool)
    }

    /// Gives back every page but `kept`.
    pub fn release_all_but(
        &mut self,
        kept: &[FilePage],
        file: &RegionFile,
        pool: &mut PoolShare,
    ) -> Result<(), RegionError> {
        let offsets: HashSet<u64> = kept.iter().map(|p| p.offset).collect();
        let before = self.pages.len();
        for page in self
            .pages
            .iter()
            .filter(|page| !offsets.contains(&page.offset))
        {
            file.punch(page.offset)?;
        }
        self.pages.retain(|page| offsets.contains(&page.offset));
        pool.shrink((before - self.pages.len()) as u64)
    }
}
