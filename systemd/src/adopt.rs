//! Adoption: the start of a restored unit, seen from inside its start job.
//!
//! ```text
//! start job ─ rcr-adopt ─ record ─ processes live, in the cgroup? ─ streams ─ MAINPID, READY ─ record gone
//!                            └──────────── no: record gone, killed, restarted the ordinary way
//! ```
//! After success systemd runs the restored processes as the unit's. After
//! failure none of them is left and an ordinary start is queued. In both cases
//! the record is gone, so that nothing is adopted twice.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::handover::{AdoptionRecord, HandoverError, OutputKind};
use crate::notify::{Notifier, NotifyError};
use crate::process::{self, ProcessError};

/// How long systemd may take to work off our messages while it boots.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a unit was not adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Nothing was restored for the unit, or it was adopted before.
    #[error("nothing was restored for {unit}, or it was adopted already")]
    NoRecord {
        /// The unit.
        unit: String,
    },
    /// The record could not be read or removed.
    #[error("the adoption record cannot be used")]
    Record(#[from] HandoverError),
    /// The restored processes are not there.
    #[error("the restored service is not there any more")]
    Process(#[from] ProcessError),
    /// None of several processes is left.
    #[error("none of the {restored} restored processes is left")]
    NobodyLeft {
        /// How many there were.
        restored: usize,
    },
    /// systemd was not told.
    #[error("systemd was not told of the restored processes")]
    Notify(#[from] NotifyError),
}

/// Puts descriptors in place of those that `pid` has: pairs of its number and
/// what it is to stand for.
pub type ReplaceFds<'a> = &'a dyn Fn(i32, &[(i32, OwnedFd)]) -> Result<(), String>;

/// Adopts `unit` from its record in `records`.
///
/// Runs as the unit's `ExecStart=`. Standard output and error are the unit's
/// streams of this boot.
pub fn adopt(records: &Path, unit: &str, replace: ReplaceFds<'_>) -> Result<(), AdoptError> {
    let record = AdoptionRecord::read_in(records, unit)?.ok_or_else(|| AdoptError::NoRecord {
        unit: unit.to_owned(),
    })?;
    check(&record)?;
    // Without its output a service still serves.
    if let Err(e) = connect_output(&record, replace) {
        eprintln!("rcr-adopt: {unit}: the output stays out of the journal: {e}");
    }
    match record.main_pid {
        Some(main_pid) => {
            let notifier = Notifier::from_env()?;
            notifier.send(&format!("MAINPID={main_pid}"))?;
            notifier.send("READY=1\nSTATUS=Carried over from the last kernel")?;
            // Once the record is gone a reload takes NotifyAccess=all away.
            notifier.barrier(BARRIER_TIMEOUT)?;
        }
        None => {
            // Type=forking: the service is up when this process has ended.
        }
    }
    AdoptionRecord::remove_in(records, unit)?;
    Ok(())
}

/// Whether the unit is worth adopting. A worker that died meanwhile is its main
/// process's business.
fn check(record: &AdoptionRecord) -> Result<(), AdoptError> {
    match record.main_pid {
        Some(main_pid) => process::check_live(main_pid, &record.cgroup)?,
        None => {
            let alive = |pid: &i32| process::check_live(*pid, &record.cgroup).is_ok();
            if !record.pids.iter().any(alive) {
                return Err(AdoptError::NobodyLeft {
                    restored: record.pids.len(),
                });
            }
        }
    }
    Ok(())
}

/// Puts this process's streams in place of the interim file, and what the file
/// took until then into the journal.
fn connect_output(record: &AdoptionRecord, replace: ReplaceFds<'_>) -> Result<(), String> {
    let Some(interim) = &record.interim_output else {
        return Ok(());
    };
    let mut pids: Vec<i32> = record.journal_streams.iter().map(|s| s.pid).collect();
    pids.sort_unstable();
    pids.dedup();
    let mut missed = Vec::new();
    for pid in pids {
        if process::check_live(pid, &record.cgroup).is_err() {
            continue;
        }
        let streams = record.journal_streams.iter().filter(|s| s.pid == pid);
        let fds = streams
            .map(|stream| {
                let own = match stream.kind {
                    OutputKind::Stdout => io::stdout().as_fd().try_clone_to_owned(),
                    OutputKind::Stderr => io::stderr().as_fd().try_clone_to_owned(),
                };
                Ok((stream.fd, own?))
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(|e| e.to_string())?;
        if let Err(e) = replace(pid, &fds) {
            missed.push(format!("process {pid}: {e}"));
        }
    }
    // Nobody whose descriptors were replaced writes there any more.
    let mut file = fs::File::open(interim).map_err(|e| format!("{interim}: {e}"))?;
    io::copy(&mut file, &mut io::stdout()).map_err(|e| format!("{interim}: {e}"))?;
    if missed.is_empty() {
        fs::remove_file(interim).map_err(|e| format!("{interim}: {e}"))
    } else {
        Err(missed.join("; "))
    }
}

/// Where the reason of a failed adoption lies until the report is completed.
pub fn failure_path(records: &Path, unit: &str) -> PathBuf {
    records.join(format!("{unit}.failed"))
}

/// Clears the way for an ordinary start after [`adopt`] failed: the record goes,
/// `reason` is kept for the report, and processes that are still in the unit's
/// group are killed.
pub fn give_up(records: &Path, unit: &str, reason: &str) -> Result<(), HandoverError> {
    let record = AdoptionRecord::read_in(records, unit);
    AdoptionRecord::remove_in(records, unit)?;
    let note = failure_path(records, unit);
    fs::write(&note, reason).map_err(|source| HandoverError::Io { path: note, source })?;
    let Some(record) = record? else { return Ok(()) };
    for pid in record.pids {
        if process::check_live(pid, &record.cgroup).is_ok()
            && let Err(e) = kill(Pid::from_raw(pid), Signal::SIGKILL)
        {
            eprintln!("rcr-adopt: {unit}: process {pid} was not killed: {e}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::ServiceType;

    fn record(main_pid: Option<i32>, pids: Vec<i32>, cgroup: &str) -> AdoptionRecord {
        AdoptionRecord {
            unit: "a.service".into(),
            cgroup: cgroup.into(),
            main_pid,
            pids,
            service_type: ServiceType::Simple,
            pid_file: None,
            syslog_identifier: String::new(),
            interim_output: None,
            journal_streams: Vec::new(),
        }
    }

    #[test]
    fn without_a_record_nothing_is_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let error = adopt(dir.path(), "a.service", &|_, _| Ok(())).unwrap_err();
        assert!(matches!(error, AdoptError::NoRecord { .. }));
    }

    #[test]
    fn ended_processes_are_no_service() {
        // Above every possible PID.
        let gone = 1 << 30;
        assert!(matches!(
            check(&record(Some(gone), vec![gone], "/x")),
            Err(AdoptError::Process(ProcessError::Ended { .. }))
        ));
        assert!(matches!(
            check(&record(None, vec![gone, gone + 1], "/x")),
            Err(AdoptError::NobodyLeft { restored: 2 })
        ));
    }

    #[test]
    fn giving_up_leaves_the_reason_and_no_record() {
        let dir = tempfile::tempdir().unwrap();
        record(Some(1 << 30), vec![1 << 30], "/x")
            .write_in(dir.path())
            .unwrap();
        give_up(dir.path(), "a.service", "it died").unwrap();
        assert_eq!(
            AdoptionRecord::read_in(dir.path(), "a.service").unwrap(),
            None
        );
        let note = failure_path(dir.path(), "a.service");
        assert_eq!(fs::read_to_string(note).unwrap(), "it died");
    }

    #[test]
    fn the_interim_text_reaches_standard_output_after_the_exchange() {
        let dir = tempfile::tempdir().unwrap();
        let interim = dir.path().join("out");
        fs::write(&interim, "").unwrap();
        let mut record = record(None, Vec::new(), "/x");
        record.interim_output = Some(interim.to_str().unwrap().to_owned());
        connect_output(&record, &|_, _| Ok(())).unwrap();
        assert!(!interim.exists());
    }
}
