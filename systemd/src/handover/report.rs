//! The report: what became of an upgrade.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{HandoverError, Manifest, StageTime, read_json, write_json};

/// What became of an upgrade, as `rcr status` shows it.
///
/// The old side writes [`Outcome::Refused`] and [`Outcome::Failed`] itself;
/// early boot of the new kernel starts the others, and the release service
/// completes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The outcome as a whole.
    pub outcome: Outcome,
    /// Why it is not [`Outcome::Carried`]; empty for that.
    #[serde(default)]
    pub reason: String,
    /// `uname -r` before.
    pub kernel_before: String,
    /// `uname -r` after; of a failure before the jump, the wanted one.
    pub kernel_after: String,
    /// When the upgrade was started, ms since 1970.
    pub started_ms: u64,
    /// When the services were frozen, ms since 1970; `None` if they never were.
    #[serde(default)]
    pub frozen_ms: Option<u64>,
    /// When the restored services ran again, ms since 1970.
    #[serde(default)]
    pub resumed_ms: Option<u64>,
    /// Each tagged service.
    pub services: Vec<ServiceReport>,
    /// Stages of both sides in order.
    #[serde(default)]
    pub stages: Vec<StageTime>,
    /// What became of the handed-over memory; `None` until it was released.
    #[serde(default)]
    pub memory: Option<MemoryReport>,
}

/// How an upgrade ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every tagged service crossed.
    Carried,
    /// The new kernel runs and at least one service was started anew.
    ColdStart,
    /// A service cannot be carried; nothing was touched.
    Refused,
    /// Failed before the jump and rolled back.
    Failed,
}

impl Outcome {
    /// As the report spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Carried => "carried",
            Outcome::ColdStart => "cold-start",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
        }
    }
}

/// What became of one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Full unit name.
    pub unit: String,
    /// Whether its processes are the old ones.
    pub outcome: ServiceOutcome,
    /// Main process before.
    pub main_pid_before: Option<i32>,
    /// Main process after, as systemd knows it once the boot is over.
    #[serde(default)]
    pub main_pid_after: Option<i32>,
    /// Why it was not kept; or what the check after boot found amiss.
    #[serde(default)]
    pub reason: String,
}

/// Whether a service was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceOutcome {
    /// Its processes go on.
    Kept,
    /// It was, or will be, started anew.
    Cold,
}

/// The handed-over memory after the upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Size of the region in bytes.
    pub region_bytes: u64,
    /// How much of it is RAM of the new kernel again.
    pub returned_bytes: u64,
    /// Why the rest is not; empty if there is none.
    #[serde(default)]
    pub reason: String,
}

impl Report {
    /// A report of the new side in which every service starts cold for
    /// `reason`; successes are entered with [`Self::kept`].
    pub fn cold(manifest: &Manifest, reason: &str) -> Self {
        Report {
            outcome: Outcome::ColdStart,
            reason: reason.to_owned(),
            kernel_before: manifest.kernel_before.clone(),
            kernel_after: manifest.kernel_after.clone(),
            started_ms: manifest.started_ms,
            frozen_ms: Some(manifest.frozen_ms),
            resumed_ms: None,
            services: manifest
                .units
                .iter()
                .map(|plan| ServiceReport {
                    unit: plan.unit.clone(),
                    outcome: ServiceOutcome::Cold,
                    main_pid_before: plan.main_pid,
                    main_pid_after: None,
                    reason: reason.to_owned(),
                })
                .chain(manifest.lost.iter().map(|lost| ServiceReport {
                    unit: lost.unit.clone(),
                    outcome: ServiceOutcome::Cold,
                    main_pid_before: lost.main_pid,
                    main_pid_after: None,
                    reason: lost.reason.clone(),
                }))
                .collect(),
            stages: manifest.stages.clone(),
            memory: None,
        }
    }

    /// A report of the new side for a store whose manifest cannot be read.
    pub fn lost(kernel_after: &str, reason: &str) -> Self {
        Report {
            outcome: Outcome::ColdStart,
            reason: reason.to_owned(),
            kernel_before: String::new(),
            kernel_after: kernel_after.to_owned(),
            started_ms: 0,
            frozen_ms: None,
            resumed_ms: None,
            services: Vec::new(),
            stages: Vec::new(),
            memory: None,
        }
    }

    /// Enters `unit` as kept.
    pub fn kept(&mut self, unit: &str, main_pid: Option<i32>) {
        for service in self.services.iter_mut().filter(|s| s.unit == unit) {
            service.outcome = ServiceOutcome::Kept;
            service.main_pid_after = main_pid;
            service.reason.clear();
        }
        self.settle();
    }

    /// Enters `unit` as started cold.
    pub fn cold_service(&mut self, unit: &str, reason: &str) {
        for service in self.services.iter_mut().filter(|s| s.unit == unit) {
            service.outcome = ServiceOutcome::Cold;
            service.reason = reason.to_owned();
        }
        self.settle();
    }

    /// Derives the outcome of the whole from the services'.
    fn settle(&mut self) {
        let cold: Vec<_> = self
            .services
            .iter()
            .filter(|s| s.outcome == ServiceOutcome::Cold)
            .collect();
        (self.outcome, self.reason) = match cold.first() {
            None => (Outcome::Carried, String::new()),
            Some(first) => (
                Outcome::ColdStart,
                format!("{}: {}", first.unit, first.reason),
            ),
        };
    }

    /// The same report in which every service is cold for `reason`.
    pub fn because(mut self, reason: &str) -> Self {
        for service in &mut self.services {
            service.outcome = ServiceOutcome::Cold;
            service.reason = reason.to_owned();
        }
        self.outcome = Outcome::ColdStart;
        self.reason = reason.to_owned();
        self
    }

    /// Time between freeze and resume in ms, where both happened.
    pub fn blackout_ms(&self) -> Option<u64> {
        Some(self.resumed_ms?.saturating_sub(self.frozen_ms?))
    }

    /// Reads a report; `None` where there is no such file.
    pub fn read(path: &Path) -> Result<Option<Self>, HandoverError> {
        read_json(path)
    }

    /// Writes the report whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), HandoverError> {
        write_json(path, self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::sample;
    use super::*;

    #[test]
    fn the_whole_is_carried_once_every_service_is() {
        let mut manifest = sample();
        let mut second = manifest.units[0].clone();
        second.unit = "nginx.service".into();
        manifest.units.push(second);
        let mut report = Report::cold(&manifest, "not restored");
        report.kept("redis-server.service", Some(100_123));
        assert_eq!(report.outcome, Outcome::ColdStart);
        assert_eq!(report.reason, "nginx.service: not restored");
        report.kept("nginx.service", Some(5));
        assert_eq!(
            (report.outcome, report.reason.as_str()),
            (Outcome::Carried, "")
        );
        report.cold_service("nginx.service", "died");
        assert_eq!(report.outcome, Outcome::ColdStart);
    }

    #[test]
    fn a_report_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let report = Report::cold(&sample(), "the store is torn");
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap().unwrap(), report);
        assert_eq!(report.blackout_ms(), None);
    }
}
