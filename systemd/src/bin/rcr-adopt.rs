//! `rcr-adopt UNIT`: the start of a restored unit. See `rcr_systemd::adopt`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use rcr_systemd::adopt::{AdoptError, adopt, give_up};
use rcr_systemd::handover::{AdoptionRecord, RESTORED_DIR};
use rcr_systemd::systemctl;

fn main() -> ExitCode {
    let Some(unit) = std::env::args().nth(1) else {
        eprintln!("rcr-adopt: usage: rcr-adopt UNIT (it is run by systemd)");
        return ExitCode::from(2);
    };
    let records = Path::new(RESTORED_DIR);
    match adopt(records, &unit, &replace_fds) {
        Ok(()) => {
            // The last one has the drop-ins forgotten; a start before that finds
            // no record and heals itself below.
            let last = AdoptionRecord::read_all_in(records).is_ok_and(|all| all.is_empty());
            if last && let Err(e) = systemctl::daemon_reload() {
                eprintln!("rcr-adopt: {unit}: {:#}", anyhow::Error::from(e));
            }
            ExitCode::SUCCESS
        }
        Err(e) => {
            let again = matches!(e, AdoptError::NoRecord { .. });
            let reason = format!("{:#}", anyhow::Error::from(e));
            eprintln!("rcr-adopt: {unit}: {reason}; starting it the ordinary way");
            if let Err(e) = start_cold(records, &unit, (!again).then_some(&reason)) {
                eprintln!("rcr-adopt: {unit}: {e:#}; start it by hand");
            }
            ExitCode::FAILURE
        }
    }
}

/// Turns this start job into an ordinary one.
fn start_cold(records: &Path, unit: &str, reason: Option<&String>) -> anyhow::Result<()> {
    if let Some(reason) = reason {
        give_up(records, unit, reason)?;
    }
    systemctl::daemon_reload()?;
    // Merges with the start job that runs this program.
    systemctl::enqueue_restart(unit)?;
    Ok(())
}

fn replace_fds(pid: i32, fds: &[(i32, OwnedFd)]) -> Result<(), String> {
    let borrowed: Vec<_> = fds
        .iter()
        .map(|(number, fd)| (*number, fd.as_fd()))
        .collect();
    rcr_engine::stdio::replace_fds(pid, &borrowed)
        .map_err(|e| format!("{:#}", anyhow::Error::from(e)))
}
