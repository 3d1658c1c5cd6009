//! Stage 7: every service's images are in the store.
//!
//! Success: images, run-time files and the manifest are written. Failure, or
//! dropping the value: all run on, to be stopped their ordinary way.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use rcr_engine::freeze;
use rcr_engine::image::{Generation, ImageSink};
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Nonce, Writer};
use rcr_systemd::handover::{
    FORMAT_VERSION, MANIFEST_IMAGE, Manifest, ServiceType, StageTime, UnitPlan,
};
use rcr_systemd::{mounts, runtime};

use super::ahead::Ahead;
use super::alone::lost;
use super::frozen::{Frozen, words};
use crate::progress::tell_kernel;
use crate::service::Service;
use crate::{carrier, environment};

/// Frozen services whose images are written.
///
/// The fields are dropped in this order: services run on first.
#[derive(Debug)]
pub struct Dumped {
    pub(super) trees: Vec<freeze::Frozen>,
    /// Ends with the processes: to stop it before takes a walk through all of
    /// their memory.
    pub(super) ahead: Ahead,
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
            store,
            mut ahead,
            release,
            nonce,
            frozen_ms,
        } = frozen;
        let (store, done) = fill(&trees, store, &mut ahead, nonce)?;
        let mut units = Vec::new();
        let mut written = Vec::new();
        for ((service, frozen), done) in trees.into_iter().zip(done) {
            match done.context("dump") {
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
            ahead,
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

/// Writes all images; gives each service's plan, or why there is none. Should
/// one not go well together with what was copied ahead, as when that has left too
/// little room, all are written whole.
fn fill(
    trees: &[(Service, freeze::Frozen)],
    mut store: Writer<HugeRegion>,
    ahead: &mut Ahead,
    nonce: Nonce,
) -> Result<(Writer<HugeRegion>, Vec<Result<UnitPlan>>)> {
    let each = |store: &mut Writer<HugeRegion>, ahead: &mut Ahead| -> Vec<_> {
        let trees = trees.iter();
        trees
            .map(|(service, frozen)| dump_service(service, frozen, store, ahead))
            .collect()
    };
    let done = each(&mut store, ahead);
    let reason = done.iter().find_map(|d| d.as_ref().err());
    let Some(reason) = reason.filter(|_| !ahead.is_empty()) else {
        return Ok((store, done));
    };
    tell_kernel(&format!(
        "nothing that was copied ahead is used: {reason:#}"
    ));
    let mut store = Writer::create(store.into_region(), nonce)?;
    ahead.start_over(&mut store)?;
    let done = each(&mut store, ahead);
    Ok((store, done))
}

fn dump_service(
    service: &Service,
    frozen: &freeze::Frozen,
    store: &mut Writer<HugeRegion>,
    ahead: &mut Ahead,
) -> Result<UnitPlan> {
    let unit = &service.unit;
    let pids: Vec<i32> = frozen
        .processes
        .iter()
        .map(|process| process.info.pid)
        .collect();
    let image_prefix = UnitPlan::prefix_of(&unit.id);
    let (written, mut rest) = store.split();
    let sink = &mut Generation::new(&mut rest, image_prefix.as_str());
    let (stats, older) = ahead.beneath(&unit.id, &written, |parent| {
        carrier::dump(frozen, sink, parent)
    });
    let stats = stats?;
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
        image_prefix,
        ahead: older,
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
