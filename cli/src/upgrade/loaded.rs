//! Stage 4: the next kernel is loaded and told where the region lies.
//!
//! Success: a kexec would boot it; systemd would stop everything but the services
//! and then open our gate. Failure, or dropping the value: nothing is loaded
//! and the region is given back; services never noticed.

use std::ops::Range;

use anyhow::Result;
use rcr_kexec::{Machine, Plan, Request};
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Locator, Nonce, PhysRange, SETUP_DATA_TYPE, Writer};

use rcr_systemd::shield::Shield;

use super::gate::Gate;
use super::prepared::Prepared;
use super::target::Target;
use crate::service::Service;

/// A loaded kernel that knows the region.
#[derive(Debug)]
pub struct Loaded {
    pub(super) services: Vec<Service>,
    /// `uname -r` of it.
    pub(super) release: String,
    // Before the shield, at whose end systemd looks at all files anew.
    pub(super) gate: Gate,
    pub(super) shield: Shield,
    // Unloaded before the region it names goes.
    pub(super) image: LoadedImage,
    pub(super) store: Writer<HugeRegion>,
    pub(super) nonce: Nonce,
}

/// A kernel in kexec's hands; dropping it unloads it.
#[derive(Debug)]
pub struct LoadedImage {
    armed: bool,
}

impl LoadedImage {
    /// Leaves it loaded.
    pub fn keep(&mut self) {
        self.armed = false;
    }
}

impl Drop for LoadedImage {
    fn drop(&mut self) {
        if self.armed
            && let Err(e) = rcr_kexec::unload()
        {
            tracing::error!("the kernel stays loaded: {:#}", anyhow::Error::from(e));
        }
    }
}

impl Loaded {
    /// Loads it.
    pub fn load(prepared: Prepared) -> Result<Self> {
        let Prepared {
            services,
            target,
            initrd,
            region,
            nonce,
        } = prepared;
        let locator = region.locator(nonce);
        let image = load(&target, &initrd, Some(&locator))?;
        // The load itself may have made the kernel move pages.
        region.recheck_pfns()?;
        let store = Writer::create(region, nonce)?;
        let release = target.kernel.release().to_owned();
        let gate = Gate::set_up()?;
        let units: Vec<&str> = services.iter().map(|s| s.unit.id.as_str()).collect();
        // Has systemd read the gate's unit too.
        let shield = Shield::install(&units)?;
        Ok(Loaded {
            shield,
            gate,
            services,
            release,
            image,
            store,
            nonce,
        })
    }
}

/// Loads a target, with a region to hand over or without.
pub fn load(target: &Target, initrd: &[u8], locator: Option<&Locator>) -> Result<LoadedImage> {
    let machine = Machine::gather()?;
    let hand_over = locator.map(|l| ranges(&l.ranges)).unwrap_or_default();
    let returned = Locator::of_this_boot()?
        .map(|l| ranges(&l.ranges))
        .unwrap_or_default();
    let blob = locator.map(Locator::to_bytes);
    let command_line = target.command_line();
    let request = Request {
        kernel: &target.kernel,
        initrd,
        command_line: &command_line,
        hand_over: &hand_over,
        returned: &returned,
        blob: blob.as_deref().map(|bytes| (SETUP_DATA_TYPE, bytes)),
    };
    let plan = Plan::new(&machine, &request)?;
    rcr_kexec::load(&plan)?;
    Ok(LoadedImage { armed: true })
}

fn ranges(ranges: &[PhysRange]) -> Vec<Range<u64>> {
    ranges
        .iter()
        .map(|range| range.start..range.end())
        .collect()
}
