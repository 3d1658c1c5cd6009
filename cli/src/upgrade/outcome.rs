//! What is said at the end, to people and to programs.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use rcr_systemd::handover::{
    FINAL_REPORT, JUMP_REPORT, Outcome, Report, ServiceOutcome, ServiceReport, now_ms,
};
use rcr_systemd::tags::{TAG_FILE, TagList};
use serde::Serialize;

use super::cleared::Cleared;
use super::options::Options;
use crate::environment;
use crate::exit::{Exit, Failure};
use crate::progress::Progress;

/// What a run is about.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// `uname -r` now.
    pub kernel_before: String,
    /// `uname -r` of the kernel to boot.
    pub kernel_after: String,
    /// The services.
    pub services: Vec<SummaryService>,
    /// Memory that the store takes until the new kernel has it back, in bytes.
    pub region_bytes: u64,
    /// Things to know.
    pub warnings: Vec<String>,
}

/// One service of a [`Summary`].
#[derive(Debug, Clone, Serialize)]
pub struct SummaryService {
    /// Its unit.
    pub unit: String,
    /// Its main process.
    pub main_pid: Option<i32>,
    /// How many processes it has.
    pub processes: usize,
    /// About how many bytes its images take.
    pub bytes: u64,
}

/// How a run ended well.
#[derive(Debug, Clone)]
pub enum Ended {
    /// Everything was checked and nothing touched.
    Checked(Summary),
    /// The kernel is loaded; `systemctl kexec` carries the services.
    Loaded(Summary),
    /// The transition is under way.
    Jumping(Summary),
    /// Under a transition of systemd's own: the services are in the store.
    Left,
    /// There was nothing to do.
    Nothing,
    /// Another process did the work and told the rest.
    Waited(ExitCode),
}

impl Ended {
    /// How the program ends.
    pub fn code(&self) -> ExitCode {
        match self {
            Ended::Waited(code) => *code,
            _ => ExitCode::SUCCESS,
        }
    }
}

/// Gathers the summary.
pub fn summary(cleared: &Cleared) -> Result<Summary> {
    Ok(Summary {
        kernel_before: environment::running_release()?,
        kernel_after: cleared.target.kernel.release().to_owned(),
        services: cleared
            .services
            .iter()
            .zip(&cleared.estimates)
            .map(|(service, bytes)| SummaryService {
                unit: service.unit.id.clone(),
                main_pid: service.unit.main_pid,
                processes: service.pids.len(),
                bytes: *bytes,
            })
            .collect(),
        region_bytes: cleared.region_bytes,
        warnings: cleared.warnings(),
    })
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel {} -> {}", self.kernel_before, self.kernel_after)?;
        for service in &self.services {
            let pid = service
                .main_pid
                .map_or("-".to_owned(), |pid| pid.to_string());
            let (processes, mib) = (service.processes, service.bytes >> 20);
            writeln!(
                f,
                "  {:<32} main pid {pid}, {processes} processes, about {mib} MiB",
                service.unit
            )?;
        }
        write!(
            f,
            "memory taken until the new kernel has it back: {} MiB",
            self.region_bytes >> 20
        )
    }
}

impl Ended {
    /// The word for programs.
    fn word(&self) -> &'static str {
        match self {
            Ended::Checked(_) => "checked",
            Ended::Loaded(_) => "loaded",
            Ended::Jumping(_) => "jumping",
            Ended::Left => "left",
            Ended::Nothing => "nothing",
            Ended::Waited(_) => "waited",
        }
    }

    /// Prints the result on standard output. A reader that has gone, as with a
    /// session that the jump ends, is no failure.
    pub fn print(&self, json: bool) {
        if matches!(self, Ended::Waited(_)) {
            return;
        }
        let text = if json {
            format!("{:#}\n", self.json())
        } else {
            self.text()
        };
        let _ = std::io::stdout().write_all(text.as_bytes());
    }

    fn summary(&self) -> Option<&Summary> {
        match self {
            Ended::Checked(s) | Ended::Loaded(s) | Ended::Jumping(s) => Some(s),
            Ended::Left | Ended::Nothing | Ended::Waited(_) => None,
        }
    }

    fn json(&self) -> serde_json::Value {
        let mut value = match self.summary() {
            Some(summary) => serde_json::json!(summary),
            None => serde_json::json!({}),
        };
        value["outcome"] = self.word().into();
        value
    }

    fn text(&self) -> String {
        let summary = self.summary().map(|s| format!("{s}\n")).unwrap_or_default();
        let verdict = match self {
            Ended::Checked(_) => "everything can be carried; nothing was touched\n",
            Ended::Loaded(_) => "loaded; `systemctl kexec` carries the services\n",
            Ended::Jumping(_) => "the jump is under way; afterwards: rcr status\n",
            Ended::Left => "the services are in the store\n",
            Ended::Nothing | Ended::Waited(_) => "",
        };
        summary + verdict
    }
}

impl Failure {
    /// Prints the failure: to standard output for programs, else to standard
    /// error.
    pub fn print(&self, program: &str, json: bool) {
        if json {
            let value = serde_json::json!({
                "outcome": outcome_of(self.exit).as_str(),
                "exit_code": self.exit as u8,
                "reason": format!("{:#}", self.error),
                "refusals": self.refusals,
            });
            println!("{value:#}");
        }
        for line in self.to_string().lines() {
            eprintln!("{program}: {line}");
        }
    }
}

fn outcome_of(exit: Exit) -> Outcome {
    match exit {
        Exit::Refused | Exit::Environment | Exit::Usage => Outcome::Refused,
        Exit::Internal | Exit::RolledBack => Outcome::Failed,
    }
}

/// Keeps a failed attempt for `rcr status`.
pub fn record_failure(options: &Options, progress: &Progress, failure: &Failure) {
    let tried = matches!(failure.exit, Exit::Refused | Exit::RolledBack);
    if options.dry_run || !tried {
        return;
    }
    let services: std::collections::BTreeSet<&str> =
        failure.refusals.iter().map(|r| r.unit.as_str()).collect();
    let kernel = options.kernel.as_deref().unwrap_or(Path::new(""));
    let report = Report {
        outcome: outcome_of(failure.exit),
        reason: failure.to_string().replace('\n', "; "),
        kernel_before: environment::running_release().unwrap_or_default(),
        kernel_after: rcr_kexec::BzImage::read(kernel)
            .map(|image| image.release().to_owned())
            .unwrap_or_default(),
        started_ms: progress
            .stages()
            .first()
            .map_or(0, |stage| stage.started_ms),
        frozen_ms: None,
        resumed_ms: None,
        services: services
            .into_iter()
            .map(|unit| ServiceReport {
                unit: unit.to_owned(),
                outcome: ServiceOutcome::Kept,
                main_pid_before: None,
                main_pid_after: None,
                reason: "refused; it goes on under the old kernel".into(),
            })
            .collect(),
        stages: progress.stages().to_vec(),
        memory: None,
    };
    if let Err(e) = report.write(Path::new(FINAL_REPORT)) {
        tracing::error!("the report was not written: {:#}", anyhow::Error::from(e));
    }
}

/// Leaves a report for the next boot in which every tagged service is cold.
pub(super) fn leave_word(reason: &str) {
    let tagged = TagList::load(Path::new(TAG_FILE))
        .map(|list| list.units())
        .unwrap_or_default();
    let report = Report {
        outcome: Outcome::ColdStart,
        reason: reason.to_owned(),
        kernel_before: environment::running_release().unwrap_or_default(),
        kernel_after: String::new(),
        started_ms: now_ms(),
        frozen_ms: None,
        resumed_ms: None,
        services: tagged
            .iter()
            .map(|unit| ServiceReport {
                unit: unit.to_string(),
                outcome: ServiceOutcome::Cold,
                main_pid_before: None,
                main_pid_after: None,
                reason: reason.to_owned(),
            })
            .collect(),
        stages: Vec::new(),
        memory: None,
    };
    if let Err(e) = report.write(Path::new(JUMP_REPORT)) {
        tracing::error!("the report was not written: {:#}", anyhow::Error::from(e));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_read_well_to_people_and_programs() {
        let summary = Summary {
            kernel_before: "6.12".into(),
            kernel_after: "7.3".into(),
            services: vec![SummaryService {
                unit: "a.service".into(),
                main_pid: Some(7),
                processes: 2,
                bytes: 5 << 20,
            }],
            region_bytes: 128 << 20,
            warnings: Vec::new(),
        };
        let ended = Ended::Checked(summary);
        assert_eq!(ended.json()["outcome"], "checked");
        assert_eq!(ended.json()["services"][0]["main_pid"], 7);
        assert_eq!(
            ended.text(),
            "kernel 6.12 -> 7.3\n  a.service                        main pid 7, 2 processes, \
             about 5 MiB\nmemory taken until the new kernel has it back: 128 MiB\n\
             everything can be carried; nothing was touched\n"
        );
        assert_eq!(Ended::Left.json(), serde_json::json!({ "outcome": "left" }));
    }
}
