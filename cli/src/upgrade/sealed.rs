//! Stage 8: the store is complete and says so.
//!
//! Success: what the next kernel needs is in memory that it will find; the disk
//! holds a report in case it does not. Failure, or dropping the value: all run
//! on, to be stopped their ordinary way, and no kernel will find a sealed store.

use std::path::Path;

use anyhow::{Context, Result};
use rcr_engine::freeze;
use rcr_pmem_store::Region;
use rcr_pmem_store::layout::{Entry, SLOTS, Superblock};
use rcr_pmem_store::region::HugeRegion;
use rcr_systemd::handover::{JUMP_REPORT, NO_WORD, Report};

use super::ahead::Ahead;
use super::dumped::Dumped;
use super::fault::FailAt;
use crate::progress::Progress;

/// Frozen services in a sealed store.
///
/// The fields are dropped in this order: nothing runs on that a store holds.
#[derive(Debug)]
pub struct Sealed {
    store: Voidable,
    trees: Vec<freeze::Frozen>,
    ahead: Ahead,
    lost: Vec<String>,
}

impl Sealed {
    /// Seals the store.
    pub fn seal(mut dumped: Dumped, progress: &Progress, fail_at: Option<&FailAt>) -> Result<Self> {
        dumped.close(progress.stages())?;
        let Dumped {
            trees,
            ahead,
            store,
            manifest,
        } = dumped;
        let mut store = Voidable {
            region: Some(store.seal()?),
        };
        let region = store.region.as_mut().context("the region")?;
        if fail_at == Some(&FailAt::CorruptStore) {
            corrupt(region.bytes_mut())?;
        }
        region.recheck_pfns()?;
        let report = Report::cold(&manifest, NO_WORD);
        report.write(Path::new(JUMP_REPORT)).context("report")?;
        // The services' last writes must be on disk: nobody else will sync them.
        nix::unistd::sync();
        let lost = manifest.lost.into_iter().map(|lost| lost.unit).collect();
        Ok(Sealed {
            store,
            trees,
            ahead,
            lost,
        })
    }

    /// The point of no return: the processes end, their images stay. Returns the
    /// services that are not among them.
    pub fn leave(self) -> Vec<String> {
        let Sealed {
            trees,
            mut store,
            ahead,
            lost,
        } = self;
        for tree in trees {
            tree.kill();
        }
        drop(ahead);
        store.region = None;
        lost
    }
}

/// A sealed store that must not be restored unless it is left on purpose.
#[derive(Debug)]
struct Voidable {
    region: Option<HugeRegion>,
}

impl Drop for Voidable {
    fn drop(&mut self) {
        let Some(mut region) = self.region.take() else {
            return;
        };
        for slot in SLOTS {
            let slot = usize::try_from(slot).unwrap_or(usize::MAX);
            if let Some(magic) = region.bytes_mut().get_mut(slot..slot.saturating_add(8)) {
                magic.fill(0);
            }
        }
    }
}

/// Flips one bit in the largest image of a sealed store.
fn corrupt(bytes: &mut [u8]) -> Result<()> {
    let slot = usize::try_from(SLOTS[1])?;
    let store = Superblock::decode(&bytes[slot..])?;
    let mut index = &bytes[usize::try_from(store.index_offset)?..];
    let mut largest: Option<Entry> = None;
    for _ in 0..store.object_count {
        let entry = Entry::decode(&mut index)?;
        if largest.as_ref().is_none_or(|l| l.len < entry.len) {
            largest = Some(entry);
        }
    }
    let largest = largest.context("the store is empty")?;
    tracing::warn!(image = largest.name, "flipping one bit on request");
    bytes[usize::try_from(largest.offset + largest.len / 2)?] ^= 0x10;
    Ok(())
}
