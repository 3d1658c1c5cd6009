//! `rcr status`: what became of the last upgrade.

use std::fmt::Write as _;
use std::path::Path;

use rcr_systemd::handover::{
    EARLY_REPORT, FINAL_REPORT, JUMP_REPORT, Outcome, Report, ServiceOutcome, Side,
};

use crate::exit::{Failure, OrExit};

/// How far a report has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It is complete.
    Complete,
    /// The boot after the jump is not over.
    Booting,
    /// The jump has not come.
    Jumping,
}

/// Prints the last upgrade's report.
pub fn status(json: bool) -> Result<(), Failure> {
    let Some((report, stand)) = latest()? else {
        if json {
            println!("null");
        } else {
            println!("no upgrade was done with rcr yet");
        }
        return Ok(());
    };
    if json {
        println!(
            "{}",
            serde_json::to_string_pretty(&report).or_environment()?
        );
    } else {
        print!("{}", text(&report, stand));
    }
    Ok(())
}

/// The newest report. A report of the old side says that the jump is under way
/// until the release service has taken it up.
fn latest() -> Result<Option<(Report, Stand)>, Failure> {
    let read = |path: &str| Report::read(Path::new(path)).or_environment();
    let finished = read(FINAL_REPORT)?;
    if let Some(jumped) = read(JUMP_REPORT)? {
        let stand = |report: Report| {
            let running = report.kernel_after == running_release();
            (
                report,
                if running {
                    Stand::Booting
                } else {
                    Stand::Jumping
                },
            )
        };
        let newer = finished
            .as_ref()
            .is_none_or(|f| f.started_ms < jumped.started_ms);
        if newer {
            return Ok(Some(match read(EARLY_REPORT)? {
                Some(early) => (early, Stand::Booting),
                None => stand(jumped),
            }));
        }
    }
    Ok(finished.map(|report| (report, Stand::Complete)))
}

fn running_release() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn text(report: &Report, stand: Stand) -> String {
    let mut out = String::new();
    let heading = match (stand, report.outcome) {
        (Stand::Jumping, _) => "under way",
        (_, Outcome::Carried) => "carried: every tagged service goes on",
        (_, Outcome::ColdStart) => "cold start",
        (_, Outcome::Refused) => "refused: nothing was touched",
        (_, Outcome::Failed) => "failed before the jump; everything was put back",
    };
    let _ = writeln!(
        out,
        "last upgrade: {} -> {}",
        report.kernel_before, report.kernel_after
    );
    let _ = writeln!(out, "outcome:      {heading}");
    if !report.reason.is_empty() && stand != Stand::Jumping {
        let _ = writeln!(out, "reason:       {}", report.reason);
    }
    if let Some(ms) = report.blackout_ms() {
        let _ = writeln!(out, "blackout:     {}", seconds(ms));
    }
    if stand == Stand::Booting {
        let _ = writeln!(
            out,
            "the boot is not over; systemd's view is not checked yet"
        );
    }
    if !report.services.is_empty() {
        let _ = writeln!(
            out,
            "\n{:<36} {:<6} {:>9} {:>9}",
            "service", "", "pid", "now"
        );
    }
    for service in &report.services {
        let outcome = match service.outcome {
            ServiceOutcome::Kept => "kept",
            ServiceOutcome::Cold => "cold",
        };
        let pid = |pid: Option<i32>| pid.map_or("-".to_owned(), |pid| pid.to_string());
        let _ = writeln!(
            out,
            "{:<36} {outcome:<6} {:>9} {:>9}  {}",
            service.unit,
            pid(service.main_pid_before),
            pid(service.main_pid_after),
            service.reason
        );
    }
    if !report.stages.is_empty() {
        let _ = writeln!(out, "\n{:<36} {:>9}", "stage", "ms");
    }
    for stage in &report.stages {
        let side = if stage.side == Side::Old {
            "old"
        } else {
            "new"
        };
        let _ = writeln!(out, "{side} {:<32} {:>9}", stage.name, stage.ms);
    }
    if let Some(memory) = &report.memory {
        let (back, all) = (memory.returned_bytes >> 20, memory.region_bytes >> 20);
        let _ = writeln!(
            out,
            "\nmemory: {back} of {all} MiB are RAM again {}",
            memory.reason
        );
    }
    out.lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

#[cfg(test)]
mod tests {
    use rcr_systemd::handover::{MemoryReport, ServiceReport, StageTime};

    use super::*;

    #[test]
    fn a_report_reads_well() {
        let report = Report {
            outcome: Outcome::ColdStart,
            reason: "nginx.service: it died".into(),
            kernel_before: "6.12".into(),
            kernel_after: "7.3".into(),
            started_ms: 1,
            frozen_ms: Some(1000),
            resumed_ms: Some(13_345),
            services: vec![ServiceReport {
                unit: "nginx.service".into(),
                outcome: ServiceOutcome::Cold,
                main_pid_before: Some(7),
                main_pid_after: Some(9),
                reason: "it died".into(),
            }],
            stages: vec![StageTime {
                name: "dump".into(),
                side: Side::Old,
                started_ms: 2,
                ms: 33,
            }],
            memory: Some(MemoryReport {
                region_bytes: 128 << 20,
                returned_bytes: 128 << 20,
                reason: String::new(),
            }),
        };
        assert_eq!(
            text(&report, Stand::Complete),
            "\
last upgrade: 6.12 -> 7.3
outcome:      cold start
reason:       nginx.service: it died
blackout:     12.345 s

service                                           pid       now
nginx.service                        cold           7         9  it died

stage                                       ms
old dump                                    33

memory: 128 of 128 MiB are RAM again
"
        );
    }
}
