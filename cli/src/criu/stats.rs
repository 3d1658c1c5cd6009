//! `stats-dump` and `stats-restore`.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rcr_engine::image::schema::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};
use rcr_engine::image::{Kind, names, write_image};

use super::Error;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// How long a dump took.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpTimes {
    /// Until every thread stood.
    pub freezing: Duration,
    /// While they stood.
    pub frozen: Duration,
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}

/// Writes the figures of a dump.
pub fn dump(work: &Path, times: DumpTimes, page_bytes: u64, show: bool) -> Result<(), Error> {
    let pages = page_bytes / PAGE;
    let entry = DumpStatsEntry {
        freezing_time: micros(times.freezing),
        frozen_time: micros(times.frozen),
        memdump_time: micros(times.frozen),
        pages_scanned: pages,
        pages_written: pages,
        ..DumpStatsEntry::default()
    };
    if show {
        println!("Displaying dump stats:");
        println!("Freezing time: {} us", entry.freezing_time);
        println!("Frozen time: {} us", entry.frozen_time);
        println!("Memory pages written: {pages} (0x{pages:x})");
    }
    let all = StatsEntry {
        dump: Some(entry),
        restore: None,
    };
    write(&work.join(names::STATS_DUMP), &all)
}

/// Writes the figures of a restore.
pub fn restore(work: &Path, took: Duration, show: bool) -> Result<(), Error> {
    let entry = RestoreStatsEntry {
        forking_time: micros(took),
        restore_time: micros(took),
        ..RestoreStatsEntry::default()
    };
    if show {
        println!("Displaying restore stats:");
        println!("Restore time: {} us", entry.restore_time);
    }
    let all = StatsEntry {
        dump: None,
        restore: Some(entry),
    };
    write(&work.join(names::STATS_RESTORE), &all)
}

fn write(path: &Path, entry: &StatsEntry) -> Result<(), Error> {
    let bytes = write_image(Kind::Stats, std::slice::from_ref(entry));
    std::fs::write(path, bytes).with_context(|| path.display().to_string())
}
