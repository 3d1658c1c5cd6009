//! Stage 6: every service stands still.
//!
//! Success: no thread of any service that crosses runs. Failure, or dropping the
//! value: all run on, to be stopped their ordinary way.

use anyhow::{Context, Result, bail};
use rcr_engine::freeze;
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Nonce, Writer};
use rcr_systemd::handover::{LostUnit, now_ms};

use super::ahead::Ahead;
use super::alone::{Alone, lost};
use crate::carrier;
use crate::service::Service;

/// Frozen services.
///
/// The fields are dropped in this order: services run on first.
#[derive(Debug)]
pub struct Frozen {
    pub(super) trees: Vec<(Service, freeze::Frozen)>,
    pub(super) lost: Vec<LostUnit>,
    pub(super) store: Writer<HugeRegion>,
    pub(super) ahead: Ahead,
    pub(super) release: String,
    pub(super) nonce: Nonce,
    pub(super) frozen_ms: u64,
}

impl Frozen {
    /// Freezes one service after another. One that cannot be is left out.
    pub fn freeze(alone: Alone) -> Result<Self> {
        let Alone {
            services,
            lost: mut left_out,
            release,
            store,
            ahead,
            nonce,
        } = alone;
        let frozen_ms = now_ms();
        let mut trees = Vec::new();
        for service in services {
            match carrier::freeze(&service.tree).context("freeze") {
                Ok(frozen) => trees.push((service, frozen)),
                Err(e) => left_out.push(lost(&service, &e)),
            }
        }
        if trees.is_empty() {
            bail!("{}", words(&left_out));
        }
        Ok(Frozen {
            trees,
            lost: left_out,
            store,
            ahead,
            release,
            nonce,
            frozen_ms,
        })
    }
}

/// What is amiss with all of them.
pub(super) fn words(lost: &[LostUnit]) -> String {
    let each = lost.iter().map(|l| format!("{}: {}", l.unit, l.reason));
    each.collect::<Vec<_>>().join("; ")
}
