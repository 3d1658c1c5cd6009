//! Stage 2: nothing stands in the way, and there is memory enough.
//!
//! Success: every service can be carried as far as can be told beforehand.
//! Failure: nothing touched; every refusal is told.

use anyhow::{anyhow, bail};
use rcr_pmem_store::layout::region_bytes_needed;

use super::tagged::Tagged;
use super::target::Target;
use crate::environment;
use crate::exit::{Exit, Failure, OrExit};
use crate::service::Service;

/// What the loaded kernel, its initrd and the running system want beside the
/// region.
pub(super) const SPARE_BYTES: u64 = 256 << 20;
/// A region consists of whole memory blocks.
const BLOCK_BYTES: u64 = 128 << 20;
/// Services go on living between the estimate and the freeze.
const GROWTH_DIVISOR: u64 = 8;
const GROWTH_BYTES: u64 = 16 << 20;

/// Services that can be carried, and the kernel to carry them to.
#[derive(Debug)]
pub struct Cleared {
    /// The services.
    pub services: Vec<Service>,
    /// Estimated bytes of each one's images.
    pub estimates: Vec<u64>,
    /// Bytes that the region must hold.
    pub region_bytes: u64,
    /// The kernel to boot.
    pub target: Target,
}

impl Cleared {
    /// Runs the preflight over every service.
    pub fn check(tagged: Tagged, target: Target) -> Result<Self, Failure> {
        let services = tagged
            .units
            .into_iter()
            .map(Service::of)
            .collect::<anyhow::Result<Vec<_>>>()
            .or_environment()?;
        let mut refusals = Vec::new();
        for service in &services {
            refusals.extend(service.refusals().or_environment()?);
        }
        if !refusals.is_empty() {
            return Err(Failure::refused(refusals));
        }
        let estimates = services
            .iter()
            .map(Service::estimate_bytes)
            .collect::<anyhow::Result<Vec<_>>>()
            .or_environment()?;
        let content = estimates.iter().sum::<u64>();
        let grown = content + content / GROWTH_DIVISOR + GROWTH_BYTES;
        let region_bytes = region_bytes_needed([(0, grown)]).next_multiple_of(BLOCK_BYTES);
        check_memory(region_bytes).or_environment()?;
        Ok(Cleared {
            services,
            estimates,
            region_bytes,
            target,
        })
    }

    /// What an admin should know before saying yes.
    pub fn warnings(&self) -> Vec<String> {
        self.services.iter().flat_map(Service::warnings).collect()
    }

    /// Every process of every service.
    pub fn pids(&self) -> Vec<i32> {
        self.services
            .iter()
            .flat_map(|service| service.pids.iter().copied())
            .collect()
    }
}

fn check_memory(region_bytes: u64) -> anyhow::Result<()> {
    let available = environment::memory_available()?;
    if region_bytes + SPARE_BYTES > available {
        bail!(
            "too little free memory: {} MiB are needed ({} MiB for the services, {} MiB for the \
             kernel and the running system), {} MiB are available",
            (region_bytes + SPARE_BYTES) >> 20,
            region_bytes >> 20,
            SPARE_BYTES >> 20,
            available >> 20
        );
    }
    Ok(())
}

/// Failure for a stage that is not reached.
pub fn declined() -> Failure {
    Failure::new(
        Exit::RolledBack,
        anyhow!("not confirmed; nothing was touched"),
    )
}
