//! Stage 7: every service's images are in the store.
//!
//! Success: images, run-time files and the manifest are written. Failure, or
//! dropping the value: all run on, to be stopped their ordinary way.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use rcr_engine::freeze;
use rcr_engine::image::ImageSink;
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Nonce, Prefixed, Writer};
use rcr_systemd::handover::{
    FORMAT_VERSION, MANIFEST_IMAGE, Manifest, ServiceType, StageTime, UnitPlan,
};
use rcr_systemd::{mounts, runtime};

use super::alone::lost;
use super::frozen::{Frozen, words};
use crate::service::Service;
use crate::{carrier, environment};

/// Frozen services whose images are written.
///
/// The fields are dropped in this order: services run on first.
#[derive(Debug)]
pub struct Dumped {
    pub(super) trees: Vec<freeze::Frozen>,
    pub(super) store: Writer<HugeRegion>,
    pub(super) manifest: Manifest,
}

impl Dumped {
    /// Writes the images of one service after another. One whose images cannot
    /// be written runs on and is left out.
    pub fn dump(frozen: Frozen, started_ms: u64) -> Result<Self> {
        let Frozen {
            trees,
            lost: mut left_out,
            region,
            release,
            nonce,
            frozen_ms,
        } = frozen;
        let mut store = Writer::create(region, nonce)?;
        let mut units = Vec::new();
        let mut written = Vec::new();
        for (service, frozen) in trees {
            let mut sink = Prefixed::new(&mut store, &service.unit.id);
            match dump_service(&service, &frozen, &mut sink).context("dump") {
                Ok(plan) => {
                    units.push(plan);
                    written.push(frozen);
                }
                Err(e) => left_out.push(lost(&service, &e)),
            }
        }
        if written.is_empty() {
            bail!("{}", words(&left_out));
        }
        let manifest = Manifest {
            format: FORMAT_VERSION,
            nonce: hex(&nonce),
            kernel_before: environment::running_release()?,
            kernel_after: release,
            boot_id: environment::boot_id()?,
            started_ms,
            frozen_ms,
            units,
            lost: left_out,
            pseudo_mounts: mounts::pseudo_mounts().context("mounts")?,
            stages: Vec::new(),
        };
        Ok(Dumped {
            trees: written,
            store,
            manifest,
        })
    }

    /// Bytes written.
    pub fn bytes(&self) -> u64 {
        self.store.used()
    }

    /// Writes the manifest, which closes the list of images.
    pub(super) fn close(&mut self, stages: &[StageTime]) -> Result<()> {
        self.manifest.stages = stages.to_vec();
        self.store
            .put(MANIFEST_IMAGE, &self.manifest.to_bytes())
            .context(MANIFEST_IMAGE)
    }
}

fn dump_service(
    service: &Service,
    frozen: &freeze::Frozen,
    sink: &mut dyn ImageSink,
) -> Result<UnitPlan> {
    let unit = &service.unit;
    let pids: Vec<i32> = frozen
        .processes
        .iter()
        .map(|process| process.info.pid)
        .collect();
    let stats = carrier::dump(frozen, sink)?;
    let files = runtime::paths_of(unit, &pids);
    carrier::save_files(&files, sink)?;
    Ok(UnitPlan {
        unit: unit.id.clone(),
        cgroup: unit.control_group.clone(),
        slice: unit.slice.clone(),
        main_pid: unit.main_pid,
        // Other types were refused.
        service_type: unit.service_type.unwrap_or(ServiceType::Simple),
        pid_file: unit
            .pid_file
            .as_ref()
            .map(|path| path.display().to_string()),
        image_prefix: UnitPlan::prefix_of(&unit.id),
        pids,
        runtime_paths: files
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        syslog_identifier: unit.syslog_identifier.clone(),
        journal_streams: carrier::journal_streams(&stats),
    })
}

fn hex(nonce: &Nonce) -> String {
    nonce.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
