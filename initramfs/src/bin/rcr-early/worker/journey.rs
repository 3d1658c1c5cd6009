//! The order of the stages and what each failure leads to.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use rcr_engine::image::{Generations, ImageSource};
use rcr_pmem_store::{Nonce, Reader, Region};
use rcr_systemd::handover::{
    AdoptionRecord, MANIFEST_IMAGE, Manifest, Outcome, Report, Side, StageClock, UnitPlan, now_ms,
};

use super::cgroup;
use super::fail::FailAt;
use super::ground::{Ground, clear};
use super::host::Host;
use super::restorer::{Restorer, Standing};
use crate::kmsg;
use crate::landmarks::Landmarks;
use crate::progress::{Made, Progress};

/// One run of the worker.
pub struct Journey<'h> {
    host: &'h Host,
    ground: &'h dyn Ground,
    fail_at: FailAt,
    release: String,
    clock: StageClock,
    /// What is known of this boot before us.
    pub landmarks: Landmarks,
    progress: Progress,
    /// The report if nothing more came, without this side's stages.
    cold: Option<Report>,
}

/// A unit whose processes are back and stand still.
struct Restored<'m> {
    plan: &'m UnitPlan,
    output: PathBuf,
    standing: Box<dyn Standing>,
}

impl<'h> Journey<'h> {
    /// Starts the clock. `release` is this kernel's.
    pub fn new(host: &'h Host, ground: &'h dyn Ground, fail_at: FailAt, release: String) -> Self {
        let clock = StageClock::start(Side::New);
        Journey {
            host,
            ground,
            fail_at,
            release,
            clock,
            landmarks: Landmarks::default(),
            progress: Progress::default(),
            cold: None,
        }
    }

    /// Finds the store: `open` maps and opens it.
    ///
    /// After success a sealed store of this hand-over lies before us; after a
    /// failure nothing was touched.
    pub fn find<T>(&mut self, open: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.enter("find");
        let found = self.fail_at.stage("find").and_then(|()| open());
        self.leave("find", found)
    }

    /// Everything behind `find`. Whatever fails is in the report, and what was
    /// restored of it is gone.
    pub fn restore_all<R: Region>(
        mut self,
        mut store: Reader<R>,
        nonce: &Nonce,
        restorer: &mut dyn Restorer,
    ) -> Report {
        let manifest = match self.verify(&store, nonce) {
            Ok(manifest) => manifest,
            Err(error) => return self.unverified(&store, &format!("{error:#}")),
        };
        self.cold = Some(Report::cold(&manifest, "the restore was cut off"));
        let mut report = Report::cold(&manifest, "not restored");
        report.kernel_after.clone_from(&self.release);
        if let Err(error) = self.prepare(&manifest) {
            return self.all_cold(report, &manifest, &error);
        }
        let standing = self.restore(&manifest, &store, restorer, &mut report);
        if standing.is_empty() {
            return self.report(report);
        }
        if let Err(error) = self.consume(&mut store) {
            drop(standing);
            return self.all_cold(report, &manifest, &error);
        }
        self.resume(standing, &mut report);
        self.report(report)
    }

    /// After success every byte is what the old kernel wrote.
    fn verify<R: Region>(&mut self, store: &Reader<R>, nonce: &Nonce) -> anyhow::Result<Manifest> {
        self.enter("verify");
        let verified = (|| {
            self.fail_at.stage("verify")?;
            store.verify()?;
            let bytes = store
                .get(MANIFEST_IMAGE)?
                .context("the store has no manifest")?;
            let manifest = Manifest::from_bytes(bytes)?;
            let expected: String = nonce.iter().map(|b| format!("{b:02x}")).collect();
            ensure!(
                manifest.nonce == expected,
                "the manifest belongs to another hand-over"
            );
            for plan in &manifest.units {
                cgroup::check_path(&plan.cgroup)?;
                ensure!(
                    is_unit_name(&plan.unit),
                    "{:?} is no unit's name",
                    plan.unit
                );
            }
            Ok(manifest)
        })();
        self.leave("verify", verified)
    }

    /// The report for a store that cannot be trusted. It names the services if
    /// the manifest can be read: nothing is done to them.
    fn unverified<R: Region>(&self, store: &Reader<R>, reason: &str) -> Report {
        let manifest = store
            .get(MANIFEST_IMAGE)
            .ok()
            .flatten()
            .map(Manifest::from_bytes);
        self.report(match manifest {
            Some(Ok(manifest)) => {
                let mut report = Report::cold(&manifest, reason);
                report.kernel_after.clone_from(&self.release);
                report
            }
            _ => Report::lost(&self.release, reason),
        })
    }

    /// After success the host's mounts are those that services stand on.
    fn prepare(&mut self, manifest: &Manifest) -> anyhow::Result<()> {
        self.enter("prepare");
        let prepared = self
            .fail_at
            .stage("prepare")
            .and_then(|()| self.ground.prepare(&manifest.pseudo_mounts));
        self.leave("prepare", prepared)
    }

    /// Restores unit after unit. One that fails is gone again, with its cgroup.
    fn restore<'m, R: Region>(
        &mut self,
        manifest: &'m Manifest,
        store: &Reader<R>,
        restorer: &mut dyn Restorer,
        report: &mut Report,
    ) -> Vec<Restored<'m>> {
        let mut all = Vec::new();
        for plan in &manifest.units {
            let stage = format!("restore {}", plan.unit);
            self.enter(&stage);
            let restored = self.restore_unit(plan, store, restorer);
            match self.leave(&stage, restored) {
                Ok(restored) => all.push(restored),
                Err(error) => self.unit_cold(&plan.unit, &error, report),
            }
            self.fail_at.restored();
        }
        all
    }

    fn restore_unit<'m, R: Region>(
        &mut self,
        plan: &'m UnitPlan,
        store: &Reader<R>,
        restorer: &mut dyn Restorer,
    ) -> anyhow::Result<Restored<'m>> {
        self.fail_at.stage("restore")?;
        self.fail_at.unit(&plan.unit)?;
        let cgroup = self.host.cgroup_dir(&plan.cgroup);
        // What was there before is not ours to clean up.
        self.ground.make_cgroup(&cgroup)?;
        self.progress.made.push(Made {
            unit: plan.unit.clone(),
            cgroup,
            files: plan.runtime_paths.iter().map(PathBuf::from).collect(),
        });
        self.note();
        let output = self.host.output_dir().join(format!("{}.log", plan.unit));
        let images = Generations::new(store, plan.image_prefixes());
        let standing = restorer.restore(plan, &images, &output)?;
        Ok(Restored {
            plan,
            output,
            standing,
        })
    }

    /// After success the store will not be restored again, in this boot or any.
    fn consume<R: Region>(&mut self, store: &mut Reader<R>) -> anyhow::Result<()> {
        self.enter("consume");
        let consumed = self
            .fail_at
            .stage("consume")
            .and_then(|()| Ok(store.mark_consumed()?));
        self.leave("consume", consumed)
    }

    /// Records each unit for systemd's side and lets it run, in this order: a
    /// service that runs without a record would be started a second time.
    fn resume(&mut self, restored: Vec<Restored<'_>>, report: &mut Report) {
        self.enter("resume");
        for Restored {
            plan,
            output,
            standing,
        } in restored
        {
            let resumed = (|| {
                self.fail_at.stage("resume")?;
                let interim = output
                    .exists()
                    .then(|| output.to_string_lossy().into_owned());
                AdoptionRecord::from_plan(plan, interim).write_in(&self.host.restored_dir())?;
                standing.resume()
            })()
            .context("resume");
            match resumed {
                Ok(()) => report.kept(&plan.unit, plan.main_pid),
                Err(error) => {
                    kmsg::warn(&format!("{}: {error:#}", plan.unit));
                    self.unit_cold(&plan.unit, &error, report);
                }
            }
        }
        report.resumed_ms = Some(now_ms());
        self.lap("resume");
        self.progress.resumed = true;
        self.cold = Some(report.clone());
        self.note();
    }

    fn all_cold(
        &mut self,
        mut report: Report,
        manifest: &Manifest,
        error: &anyhow::Error,
    ) -> Report {
        for plan in &manifest.units {
            self.unit_cold(&plan.unit, error, &mut report);
        }
        report.reason = format!("{error:#}");
        self.report(report)
    }

    /// Makes sure that nothing of `unit` is left.
    fn unit_cold(&mut self, unit: &str, error: &anyhow::Error, report: &mut Report) {
        report.cold_service(unit, &format!("{error:#}"));
        if let Err(error) = AdoptionRecord::remove_in(&self.host.restored_dir(), unit) {
            kmsg::warn(&format!("{:#}", anyhow::Error::from(error)));
        }
        let made = std::mem::take(&mut self.progress.made);
        let (gone, rest) = made.into_iter().partition(|made| made.unit == unit);
        self.progress.made = rest;
        clear(self.ground, &gone);
    }

    /// Completes a report with the stages of this side.
    fn report(&self, mut report: Report) -> Report {
        let own = self.clock.stages();
        // The jump is what lies between the last stage there and the first here.
        if let (Some(last), Some(first)) = (report.stages.last(), own.first()) {
            let between = self
                .landmarks
                .between(last.started_ms + last.ms, first.started_ms);
            report.stages.extend(between);
        }
        report.stages.extend(own.iter().cloned());
        if report.outcome == Outcome::Carried {
            report.reason.clear();
        }
        report
    }

    fn enter(&mut self, stage: &str) {
        self.progress.stage = stage.to_owned();
        self.note();
    }

    /// Logs how `stage` went; a failure gets the stage's name in front.
    fn leave<T>(&mut self, stage: &str, result: anyhow::Result<T>) -> anyhow::Result<T> {
        match &result {
            Ok(_) => self.lap(stage),
            Err(error) => {
                self.clock.lap(stage);
                kmsg::warn(&format!("{stage}: {error:#}"));
            }
        }
        let word = stage.split(' ').next().unwrap_or(stage);
        result.with_context(|| word.to_owned())
    }

    fn lap(&mut self, stage: &str) {
        self.clock.lap(stage);
        let ms = self.clock.stages().last().map_or(0, |stage| stage.ms);
        kmsg::info(&format!("{stage}: done in {ms} ms"));
    }

    fn note(&mut self) {
        self.progress.report = self.cold.clone().map(|report| self.report(report));
        if let Err(error) = self.progress.write(&self.host.run_dir) {
            kmsg::warn(&format!("{error:#}"));
        }
    }
}

/// What may become a file name in our directories.
fn is_unit_name(name: &str) -> bool {
    !name.is_empty() && name.len() < 256 && !name.contains('/') && !name.starts_with('.')
}
