//! Stage 7: the store is complete and says so.
//!
//! Success: what the next kernel needs is in memory that it will find; the disk
//! holds a report in case it does not. Failure, or dropping the value: all run
//! on as before.

use std::path::Path;

use anyhow::{Context, Result};
use rcr_engine::freeze;
use rcr_pmem_store::Region;
use rcr_pmem_store::layout::{Entry, SLOTS, Superblock};
use rcr_pmem_store::region::HugeRegion;
use rcr_systemd::dropin::SilentStop;
use rcr_systemd::handover::{JUMP_REPORT, Report};

use super::dumped::Dumped;
use super::fault::FailAt;
use super::loaded::LoadedImage;
use crate::progress::Progress;

/// What the report says until early boot says otherwise.
const NO_WORD: &str = "early boot of the new kernel left no report";

/// Frozen services in a sealed store.
///
/// The fields are dropped in this order: services run on first.
#[derive(Debug)]
pub struct Sealed {
    pub(super) trees: Vec<freeze::Frozen>,
    pub(super) silent: SilentStop,
    pub(super) report: JumpReport,
    pub(super) image: LoadedImage,
    pub(super) region: HugeRegion,
}

/// The report that waits on disk; dropping it removes it.
#[derive(Debug)]
pub struct JumpReport {
    armed: bool,
}

impl JumpReport {
    /// Leaves it for the next kernel.
    pub fn keep(&mut self) {
        self.armed = false;
    }

    /// Puts it on disk.
    pub fn write(report: &Report) -> Result<Self> {
        report.write(Path::new(JUMP_REPORT))?;
        Ok(JumpReport { armed: true })
    }
}

impl Drop for JumpReport {
    fn drop(&mut self) {
        if self.armed
            && let Err(e) = std::fs::remove_file(JUMP_REPORT)
        {
            tracing::error!("{JUMP_REPORT} stays behind: {e}");
        }
    }
}

impl Sealed {
    /// Seals the store.
    pub fn seal(mut dumped: Dumped, progress: &Progress, fail_at: Option<&FailAt>) -> Result<Self> {
        dumped.close(progress.stages())?;
        let Dumped {
            trees,
            silent,
            image,
            store,
            manifest,
        } = dumped;
        let mut region = store.seal()?;
        if fail_at == Some(&FailAt::CorruptStore) {
            corrupt(region.bytes_mut())?;
        }
        region.recheck_pfns()?;
        let report = JumpReport::write(&Report::cold(&manifest, NO_WORD)).context("report")?;
        // The services' last writes must be on disk: nobody else will sync them.
        nix::unistd::sync();
        Ok(Sealed {
            trees,
            silent,
            report,
            image,
            region,
        })
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
