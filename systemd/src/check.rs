//! The check after boot: what systemd believes, against what was restored.

use std::path::Path;

use crate::adopt;
use crate::handover::{Report, ServiceOutcome, ServiceReport};
use crate::process;
use crate::systemctl;
use crate::tags::ServiceName;
use crate::unit::{Unit, UnitError};

/// Enters what systemd believes of each service into the report. A service
/// that was restored and is not what systemd runs counts as cold. `records` is
/// where failed adoptions left their reasons.
pub fn complete(report: &mut Report, records: &Path) {
    let mut verdicts: Vec<_> = report.services.iter().map(examine).collect();
    for (unit, _, verdict) in &mut verdicts {
        if let Ok(reason) = std::fs::read_to_string(adopt::failure_path(records, unit)) {
            *verdict = Err(reason);
        }
    }
    for (unit, main_pid, verdict) in verdicts {
        if let Some(service) = report.services.iter_mut().find(|s| s.unit == unit) {
            service.main_pid_after = main_pid;
        }
        if let Err(reason) = verdict {
            report.cold_service(&unit, &reason);
        }
    }
}

type Verdict = (String, Option<i32>, Result<(), String>);

fn examine(service: &ServiceReport) -> Verdict {
    let state = ServiceName::parse(&service.unit)
        .map_err(|e| e.to_string())
        .and_then(|name| Unit::query(&name).map_err(|e| query_failed(&e)));
    match state {
        Err(reason) => (service.unit.clone(), None, Err(reason)),
        Ok(unit) => {
            let inside = process::in_cgroup(&unit.cgroup_dir()).unwrap_or_default();
            (
                service.unit.clone(),
                unit.main_pid,
                compare(service, &unit, &inside),
            )
        }
    }
}

fn query_failed(error: &UnitError) -> String {
    match error {
        UnitError::Systemctl(systemctl::SystemctlError::Run(e)) => {
            format!("systemd was not asked: {e}")
        }
        e => e.to_string(),
    }
}

/// What is amiss with a service, if anything; `inside` are the processes of its
/// control group.
fn compare(service: &ServiceReport, unit: &Unit, inside: &[i32]) -> Result<(), String> {
    if service.outcome == ServiceOutcome::Cold {
        // It keeps the reason that early boot gave.
        return Ok(());
    }
    if !matches!(unit.active_state.as_str(), "active" | "reloading") {
        return Err(format!(
            "restored, but systemd has it as {} ({})",
            unit.active_state, unit.sub_state
        ));
    }
    match (service.main_pid_before, unit.main_pid) {
        (Some(before), Some(after)) if before != after => Err(format!(
            "restored as process {before}, but systemd runs process {after}"
        )),
        (Some(before), None) => Err(format!(
            "restored as process {before}, but systemd knows no main process"
        )),
        (Some(before), Some(_)) if !inside.contains(&before) => Err(format!(
            "its main process {before} is not in its control group {}",
            unit.control_group
        )),
        _ => Ok(()),
    }
}

/// Has systemd forget adoption drop-ins whose records are gone.
pub fn forget_adoptions(generator_dir: &Path) -> Result<(), String> {
    match crate::generator::adoption_is_in_force(generator_dir) {
        Ok(false) => Ok(()),
        Ok(true) => systemctl::daemon_reload().map_err(|e| e.to_string()),
        Err(e) => Err(format!("{}: {e}", generator_dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(active: &str, main_pid: i32) -> Unit {
        Unit::parse(
            "a",
            &format!(
                "Id=a.service\nLoadState=loaded\nActiveState={active}\nSubState=x\n\
                 MainPID={main_pid}\nControlGroup=/system.slice/a.service\n"
            ),
        )
        .unwrap()
    }

    #[test]
    fn only_the_restored_main_process_passes() {
        let mut service = ServiceReport {
            unit: "a.service".into(),
            outcome: ServiceOutcome::Kept,
            main_pid_before: Some(7),
            main_pid_after: None,
            reason: String::new(),
        };
        assert_eq!(compare(&service, &unit("active", 7), &[7, 8]), Ok(()));
        assert_eq!(
            compare(&service, &unit("active", 9), &[7, 9]).unwrap_err(),
            "restored as process 7, but systemd runs process 9"
        );
        assert_eq!(
            compare(&service, &unit("failed", 0), &[]).unwrap_err(),
            "restored, but systemd has it as failed (x)"
        );
        assert_eq!(
            compare(&service, &unit("active", 7), &[]).unwrap_err(),
            "its main process 7 is not in its control group /system.slice/a.service"
        );
        assert!(compare(&service, &unit("active", 0), &[7]).is_err());
        service.outcome = ServiceOutcome::Cold;
        assert_eq!(compare(&service, &unit("active", 9), &[9]), Ok(()));
    }
}
