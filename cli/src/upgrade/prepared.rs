//! Stage 3: memory that outlives the kernel, and the initrd that finds it.
//!
//! Success: a region whose physical addresses are known. Failure, or dropping
//! the value: the memory is given back; services never noticed.

use std::path::Path;

use anyhow::{Context, Result};
use rcr_pmem_store::region::{HugeOptions, HugeRegion, RegionError};
use rcr_pmem_store::{Nonce, fresh_nonce};

use super::cleared::{Cleared, SPARE_BYTES};
use super::fault::FailAt;
use super::target::Target;
use crate::exit::{Exit, Failure};
use crate::service::Service;

/// Where the region's hugetlbfs is mounted. Beneath `/dev`, as systemd unmounts
/// everything else before it calls kexec.
pub const REGION_DIR: &str = "/dev/rcr";

/// A region for the images.
#[derive(Debug)]
pub struct Prepared {
    pub(super) services: Vec<Service>,
    pub(super) target: Target,
    pub(super) initrd: Vec<u8>,
    pub(super) region: HugeRegion,
    pub(super) nonce: Nonce,
}

impl Prepared {
    /// Takes the memory. Where it is not to be had, nothing was touched.
    pub fn prepare(cleared: Cleared, fail_at: Option<&FailAt>) -> Result<Self, Failure> {
        Self::take(cleared, fail_at).map_err(|error| {
            let exit = match error.downcast_ref() {
                Some(
                    RegionError::TooLittleMemory { .. }
                    | RegionError::Fragmented { .. }
                    | RegionError::InUse { .. },
                ) => Exit::Environment,
                _ => Exit::RolledBack,
            };
            Failure::new(exit, error)
        })
    }

    fn take(cleared: Cleared, fail_at: Option<&FailAt>) -> Result<Self> {
        let initrd = cleared
            .target
            .initrd_with_overlay(&cleared.pids(), fail_at)?;
        let nonce = fresh_nonce().context("/dev/urandom")?;
        // What an upgrade that was killed has left.
        HugeRegion::discard(Path::new(REGION_DIR))?;
        let options = HugeOptions {
            dir: REGION_DIR.into(),
            spare_bytes: SPARE_BYTES,
            ..HugeOptions::default()
        };
        let region = HugeRegion::allocate(cleared.region_bytes, &options)?;
        let Cleared {
            services, target, ..
        } = cleared;
        Ok(Prepared {
            services,
            target,
            initrd,
            region,
            nonce,
        })
    }
}
