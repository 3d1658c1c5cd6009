//! Which huge pages form whole memory blocks, and which blocks to take.

use std::collections::BTreeMap;

use crate::range::PhysRange;

/// Bytes of a huge page.
pub(super) const HUGE: u64 = 2 << 20;
/// Devices that address 32 bits need what lies below.
const LOW_END: u64 = 4 << 30;
/// The next kernel is loaded and starts down here.
const KERNEL_END: u64 = 256 << 20;

/// A huge page of the region's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FilePage {
    /// Byte offset in the file.
    pub offset: u64,
    /// Physical address.
    pub phys: u64,
}

/// The pages by the block they lie in; only blocks that they fill, and that a
/// region may take.
///
/// `ram_end` is the first address after all RAM: memory at the very top without
/// RAM above it has no node in the next kernel and could not be given back.
pub(super) fn whole_blocks(
    pages: &[FilePage],
    block_len: u64,
    ram_end: u64,
) -> BTreeMap<u64, Vec<FilePage>> {
    let mut blocks: BTreeMap<u64, Vec<FilePage>> = BTreeMap::new();
    for page in pages {
        blocks
            .entry(page.phys / block_len * block_len)
            .or_default()
            .push(*page);
    }
    blocks.retain(|&start, pages| {
        pages.len() as u64 == block_len / HUGE && may_take(start, block_len, ram_end)
    });
    for pages in blocks.values_mut() {
        pages.sort_by_key(|page| page.phys);
    }
    blocks
}

/// Whether a region may lie in the block at `start` at all.
pub(super) fn may_take(start: u64, block_len: u64, ram_end: u64) -> bool {
    start >= KERNEL_END.next_multiple_of(block_len) && start + block_len < ram_end
}

/// Takes `wanted` blocks, preferring those above 4 GiB, then long runs, then high
/// addresses; `None` where there are too few. The result ascends.
pub(super) fn choose<T>(
    blocks: &BTreeMap<u64, T>,
    wanted: u64,
    block_len: u64,
) -> Option<Vec<u64>> {
    if (blocks.len() as u64) < wanted {
        return None;
    }
    let mut runs: Vec<Vec<u64>> = Vec::new();
    for &start in blocks.keys() {
        match runs.last_mut() {
            Some(run) if run[run.len() - 1] + block_len == start && start != LOW_END => {
                run.push(start);
            }
            _ => runs.push(vec![start]),
        }
    }
    runs.sort_by_key(|run| (run[0] >= LOW_END, run.len(), run[0]));
    let mut chosen: Vec<u64> = runs
        .into_iter()
        .rev()
        .flat_map(|run| run.into_iter().rev())
        .take(wanted as usize)
        .collect();
    chosen.sort_unstable();
    Some(chosen)
}

/// Ascending pages of huge size as the fewest ranges.
pub(super) fn merge(pages: &[FilePage]) -> Vec<PhysRange> {
    let mut ranges: Vec<PhysRange> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some(range) if range.end() == page.phys => range.len += HUGE,
            _ => ranges.push(PhysRange {
                start: page.phys,
                len: HUGE,
            }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 128 << 20;

    fn fill(blocks: &[u64]) -> Vec<FilePage> {
        let pages = blocks
            .iter()
            .flat_map(|b| (0..BLOCK / HUGE).map(move |p| b * BLOCK + p * HUGE));
        pages
            .enumerate()
            .map(|(n, phys)| FilePage {
                offset: n as u64 * HUGE,
                phys,
            })
            .collect()
    }

    #[test]
    fn only_filled_blocks_between_the_kernel_and_the_top_count() {
        let mut pages = fill(&[0, 1, 2, 7, 8, 9]);
        pages.retain(|page| page.phys != 8 * BLOCK + 5 * HUGE);
        let blocks = whole_blocks(&pages, BLOCK, 10 * BLOCK);
        assert_eq!(blocks.keys().map(|b| b / BLOCK).collect::<Vec<_>>(), [2, 7]);
    }

    #[test]
    fn high_memory_then_long_runs_are_preferred() {
        let blocks: BTreeMap<u64, ()> =
            [5, 6, 7, 8, 31, 32, 33, 40].map(|b| (b * BLOCK, ())).into();
        let choose = |n| choose(&blocks, n, BLOCK).map(|c| c.iter().map(|b| b / BLOCK).collect());
        assert_eq!(choose(1), Some(vec![33]));
        assert_eq!(choose(2), Some(vec![32, 33]));
        assert_eq!(choose(4), Some(vec![8, 32, 33, 40]));
        assert_eq!(choose(8), Some(vec![5, 6, 7, 8, 31, 32, 33, 40]));
        assert_eq!(choose(9), None);
    }

    #[test]
    fn neighbouring_pages_are_one_range() {
        let ranges = merge(&fill(&[3, 4, 6]));
        assert_eq!(
            ranges,
            [
                PhysRange {
                    start: 3 * BLOCK,
                    len: 2 * BLOCK
                },
                PhysRange {
                    start: 6 * BLOCK,
                    len: BLOCK
                }
            ]
        );
    }
}
