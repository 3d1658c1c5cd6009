//! What PID 1 has done when the worker did not end by itself.

use rcr_systemd::handover::{AdoptionRecord, Report};

use super::ground::{Ground, clear};
use super::host::Host;
use crate::kmsg;
use crate::pid1::Ended;
use crate::progress::Progress;

/// Kills what was half restored and writes the report that the worker owes.
pub fn main(ended: &Ended) -> i32 {
    let host = Host::default();
    let report = match after(&host, &host, &describe(ended)) {
        Ok(Some(report)) => report,
        Ok(None) => return 0,
        Err(error) => {
            kmsg::warn(&format!("cleaning up: {error:#}"));
            Report::lost(
                &super::release(),
                &format!("{}; {error:#}", describe(ended)),
            )
        }
    };
    super::finish(&host, &report);
    0
}

/// The report after the worker has `ended`; `None` where it has written one.
pub fn after(host: &Host, ground: &dyn Ground, ended: &str) -> anyhow::Result<Option<Report>> {
    let progress = match Progress::read(&host.run_dir)? {
        Some(progress) => progress,
        None if host.report_path().exists() => return Ok(None),
        None => Progress::default(),
    };
    let reason = format!("{ended} at stage '{}'", progress.stage);
    let report = progress.report.clone();
    let mut report = report.unwrap_or_else(|| Report::lost(&super::release(), &reason));
    if progress.resumed {
        return Ok(Some(report));
    }
    for made in &progress.made {
        AdoptionRecord::remove_in(&host.restored_dir(), &made.unit)?;
    }
    clear(ground, &progress.made);
    let units: Vec<String> = report.services.iter().map(|s| s.unit.clone()).collect();
    for unit in units {
        report.cold_service(&unit, &reason);
    }
    report.reason = reason;
    Ok(Some(report))
}

/// How a child ended, as the end of a sentence about it.
pub fn describe(ended: &Ended) -> String {
    match ended {
        Ended::Exited(0) => "the restorer ended".into(),
        Ended::Exited(code) => format!("the restorer failed with code {code}"),
        Ended::Killed(signal) => format!("the restorer was killed by {signal}"),
        Ended::TimedOut(limit) => format!("the restorer took longer than {} s", limit.as_secs()),
        Ended::NotStarted(error) => format!("the restorer could not be started ({error})"),
    }
}
