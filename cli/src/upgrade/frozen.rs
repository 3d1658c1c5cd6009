//! Stage 5: every service stands still.
//!
//! Success: no thread of any tagged service runs. Failure, or dropping the
//! value: all run on, nothing is loaded, the region is given back.

use anyhow::{Context, Result};
use rcr_engine::freeze;
use rcr_pmem_store::Nonce;
use rcr_pmem_store::region::HugeRegion;
use rcr_systemd::dropin::SilentStop;
use rcr_systemd::handover::now_ms;

use super::loaded::{Loaded, LoadedImage};
use crate::carrier;
use crate::service::Service;

/// Frozen services.
///
/// The fields are dropped in this order: services run on first.
#[derive(Debug)]
pub struct Frozen {
    pub(super) trees: Vec<(Service, freeze::Frozen)>,
    pub(super) silent: SilentStop,
    pub(super) image: LoadedImage,
    pub(super) region: HugeRegion,
    pub(super) release: String,
    pub(super) nonce: Nonce,
    pub(super) frozen_ms: u64,
}

impl Frozen {
    /// Freezes one service after another.
    pub fn freeze(loaded: Loaded) -> Result<Self> {
        let Loaded {
            services,
            release,
            image,
            region,
            nonce,
            silent,
        } = loaded;
        let frozen_ms = now_ms();
        let mut trees = Vec::new();
        for service in services {
            let frozen = carrier::freeze(&service.tree).with_context(|| service.unit.id.clone())?;
            trees.push((service, frozen));
        }
        Ok(Frozen {
            trees,
            silent,
            image,
            region,
            release,
            nonce,
            frozen_ms,
        })
    }
}
