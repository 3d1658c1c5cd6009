//! Memory copied while its owners run, so that the freeze has only what they
//! write meanwhile.
//!
//! ```text
//! Loaded ── first round: all of it ──▶ others stop ──▶ gate ── further rounds ──▶ Frozen: the rest
//! ```
//! It saves time and nothing depends on it: where it is not possible, or would
//! not be worth it, the freeze copies everything, and it is told why.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use rcr_engine::image::{Generation, Generations, Kind, put_records};
use rcr_engine::predump::{self, Parent, PreDumpOptions, Tracking, keeper};
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Writer, Written};
use rcr_systemd::handover::UnitPlan;

use crate::carrier;
use crate::progress::Progress;
use crate::service::Service;

/// Services that write faster than we copy are not caught up with.
const ROUNDS_MAX: usize = 8;

/// What of the services' memory is in the store before they are frozen.
#[derive(Debug)]
pub struct Ahead {
    budget: Duration,
    units: BTreeMap<String, Copied>,
    /// Services that could not be copied.
    left: BTreeSet<String>,
}

/// A service's memory as it was a moment ago.
#[derive(Debug)]
struct Copied {
    tracking: Tracking,
    /// In front of the names of its images, the newest first.
    prefixes: Vec<String>,
}

/// One round over all services.
#[derive(Debug, Default)]
struct Round {
    bytes: u64,
    took: Duration,
}

impl Ahead {
    /// Nothing yet. `budget`: how long the services may stand still for what is
    /// left; with zero, nothing is copied ahead.
    pub fn new(budget: Duration) -> Self {
        Ahead {
            budget,
            units: BTreeMap::new(),
            left: BTreeSet::new(),
        }
    }

    /// Copies everything once.
    pub fn start(
        &mut self,
        services: &[Service],
        store: &mut Writer<HugeRegion>,
        progress: &mut Progress,
    ) {
        if self.budget.is_zero() {
            return;
        }
        self.round(services, store, progress);
    }

    /// Copies what was written since, until it is little, or does not get less.
    pub fn catch_up(
        &mut self,
        services: &[Service],
        store: &mut Writer<HugeRegion>,
        progress: &mut Progress,
    ) {
        let mut last = Duration::MAX;
        for _ in 0..ROUNDS_MAX {
            if self.units.is_empty() {
                return;
            }
            let round = self.round(services, store, progress);
            let stuck = round.took > last.mul_f64(0.75);
            let full = store.used() + 2 * round.bytes > store.capacity();
            // What is written during a round takes no longer than the round.
            if round.took <= self.budget || stuck || full {
                return;
            }
            last = round.took;
        }
    }

    /// Whether nothing is copied.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// Dumps a service, for whose images those in `written` may be referred to;
    /// gives the prefixes of those, the newest first.
    pub fn beneath<T>(
        &mut self,
        unit: &str,
        written: &Written<'_>,
        dump: impl FnOnce(Option<&Parent<'_>>) -> T,
    ) -> (T, Vec<String>) {
        let Some(Copied { tracking, prefixes }) = self.units.remove(unit) else {
            return (dump(None), Vec::new());
        };
        let images = Generations::new(written, prefixes.clone());
        let parent = Parent {
            images: &images,
            tracking,
        };
        let done = dump(Some(&parent));
        let copied = Copied {
            tracking: parent.tracking,
            prefixes: prefixes.clone(),
        };
        self.units.insert(unit.to_owned(), copied);
        (done, prefixes)
    }

    /// Begins with an empty store, which then has no page of anybody. What is
    /// known of interrupted sleeps stays known.
    pub fn start_over(&mut self, store: &mut Writer<HugeRegion>) -> Result<()> {
        for (unit, copied) in &mut self.units {
            let prefix = UnitPlan::ahead_prefix_of(unit, 0);
            copied.prefixes = vec![prefix.clone()];
            let record = copied.tracking.record(false)?;
            let sink = &mut Generation::new(store, prefix);
            put_records(sink, Kind::RcrTasks, keeper::IMAGE, &[record])?;
        }
        Ok(())
    }

    fn round(
        &mut self,
        services: &[Service],
        store: &mut Writer<HugeRegion>,
        progress: &mut Progress,
    ) -> Round {
        let start = Instant::now();
        let mut round = Round::default();
        for service in services {
            let unit = &service.unit.id;
            if self.left.contains(unit) {
                continue;
            }
            let before = self.units.remove(unit);
            match copy(service, before, store) {
                Ok((copied, bytes)) => {
                    self.units.insert(unit.clone(), copied);
                    round.bytes += bytes;
                }
                Err(e) => {
                    progress.note(&format!("{unit}: not copied while it runs: {e:#}"));
                    self.left.insert(unit.clone());
                }
            }
        }
        // What is in the store by now does not change any more.
        store.settle();
        round.took = start.elapsed();
        let (bytes, ms) = (round.bytes >> 10, round.took.as_millis());
        progress.note(&format!("{bytes} KiB copied in {ms} ms"));
        round
    }
}

/// Copies what a service has written since its last copy, or all.
fn copy(
    service: &Service,
    before: Option<Copied>,
    store: &mut Writer<HugeRegion>,
) -> Result<(Copied, u64)> {
    let (tracking, mut prefixes) = match before {
        Some(c) => (Some(c.tracking), c.prefixes),
        None => (None, Vec::new()),
    };
    let new = UnitPlan::ahead_prefix_of(&service.unit.id, prefixes.len());
    let (written, mut rest) = store.split();
    let images = Generations::new(&written, prefixes.clone());
    let parent = tracking.map(|tracking| Parent {
        images: &images,
        tracking,
    });
    let options = PreDumpOptions {
        keep: false,
        pages_once: carrier::PAGES_ONCE,
    };
    let mut sink = Generation::new(&mut rest, new.clone());
    let (tracking, stats) = predump::pre_dump(&service.tree, parent, &mut sink, options)?;
    prefixes.insert(0, new);
    let copied = Copied { tracking, prefixes };
    Ok((copied, stats.page_bytes))
}
