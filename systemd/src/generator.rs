//! What the generator writes: the boot-time part of the adoption.
//!
//! For every unit that early boot restored, a drop-in turns its start into an
//! adoption ([`crate::adopt`]). The records go as the units are adopted, so the
//! next reload, and with it the next start, finds the unit as it is on disk.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::handover::AdoptionRecord;

/// The program that a restored unit's start runs.
pub const ADOPT_PROGRAM: &str = "/usr/lib/rcr/rcr-adopt";

/// Where systemd keeps this generator's output.
pub const OUTPUT_DIR: &str = "/run/systemd/generator.late";

/// Name of the adoption's drop-in. `zz`, as later names win.
pub const ADOPT_DROPIN: &str = "zz-rcr-adopt.conf";

/// A file that the generator makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Below the output directory.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// What is to be written for these records, tags and reported services.
pub fn outputs(records: &[AdoptionRecord], tagged: &[String], reported: &[String]) -> Vec<Output> {
    let mut outputs: Vec<Output> = records
        .iter()
        .map(|record| Output {
            path: dropin(&record.unit, ADOPT_DROPIN),
            text: adoption(record),
        })
        .collect();
    if !records.is_empty() {
        // A service that somebody had started by hand is wanted by nothing.
        outputs.push(Output {
            path: dropin("multi-user.target", "50-rcr-restored.conf"),
            text: list("Wants", records.iter().map(|record| record.unit.as_str())),
        });
    }
    if !tagged.is_empty() {
        // What is ordered after a unit is stopped before it.
        outputs.push(Output {
            path: dropin("rcr-pre-kexec.service", "50-rcr-tagged.conf"),
            text: list("After", tagged.iter().map(String::as_str)),
        });
    }
    let mut awaited: Vec<&str> = reported.iter().chain(tagged).map(String::as_str).collect();
    awaited.sort_unstable();
    awaited.dedup();
    if !awaited.is_empty() {
        outputs.push(Output {
            path: dropin("rcr-release.service", "50-rcr-carried.conf"),
            text: list("After", awaited.into_iter()),
        });
    }
    outputs
}

fn dropin(unit: &str, file: &str) -> PathBuf {
    Path::new(&format!("{unit}.d")).join(file)
}

fn list<'a>(key: &str, units: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::from("# Made by rcr-generator.\n[Unit]\n");
    for unit in units {
        writeln!(text, "{key}={unit}").expect("a String takes everything");
    }
    text
}

/// systemd does not start a unit among processes that are there already if it may
/// not kill them, and stops those instead.
const TAKES_PROCESSES: &str = "SendSIGKILL=yes\n";

/// The drop-in that turns a start into an adoption.
fn adoption(record: &AdoptionRecord) -> String {
    let mut text = format!(
        "# Made by rcr-generator: {unit} was carried over from the last kernel.\n\
         [Service]\n\
         ExecCondition=\n\
         ExecStartPre=\n\
         ExecStart=\n\
         ExecStartPost=\n\
         ExecStart=+{ADOPT_PROGRAM} {unit}\n\
         {TAKES_PROCESSES}",
        unit = record.unit.replace('\\', "\\\\"),
    );
    if !record.syslog_identifier.is_empty() {
        // Else the journal would name the helper.
        let identifier = record.syslog_identifier.replace('%', "%%");
        writeln!(text, "SyslogIdentifier={identifier}").expect("a String takes everything");
    }
    match record.main_pid {
        // NotifyAccess: the message comes from the helper about another process.
        Some(_) => text.push_str("Type=notify\nNotifyAccess=all\n"),
        // A helper that ends is a failed service unless forking is expected;
        // guessing could take it for the main process.
        None => text.push_str("Type=forking\nPIDFile=\nGuessMainPID=no\n"),
    }
    text
}

/// Writes the outputs below `directory`.
pub fn write(directory: &Path, outputs: &[Output]) -> io::Result<()> {
    for output in outputs {
        let path = directory.join(&output.path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &output.text)?;
    }
    Ok(())
}

/// Whether an adoption's drop-in is still in force.
pub fn adoption_is_in_force(directory: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        entries => entries?,
    };
    for entry in entries {
        if entry?.path().join(ADOPT_DROPIN).exists() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::ServiceType;

    fn record(unit: &str, main_pid: Option<i32>) -> AdoptionRecord {
        AdoptionRecord {
            unit: unit.into(),
            cgroup: format!("/system.slice/{unit}"),
            main_pid,
            pids: vec![7],
            service_type: ServiceType::Forking,
            pid_file: None,
            syslog_identifier: String::new(),
            interim_output: None,
            journal_streams: Vec::new(),
        }
    }

    #[test]
    fn a_restored_unit_is_adopted() {
        let outputs = outputs(&[record("redis.service", Some(7))], &[], &[]);
        assert_eq!(
            outputs[0].path,
            Path::new("redis.service.d/zz-rcr-adopt.conf")
        );
        assert_eq!(
            outputs[0].text,
            "# Made by rcr-generator: redis.service was carried over from the last kernel.\n\
             [Service]\nExecCondition=\nExecStartPre=\nExecStart=\nExecStartPost=\n\
             ExecStart=+/usr/lib/rcr/rcr-adopt redis.service\nSendSIGKILL=yes\nType=notify\nNotifyAccess=all\n"
        );
        assert_eq!(
            outputs[1].path,
            Path::new("multi-user.target.d/50-rcr-restored.conf")
        );
        assert!(outputs[1].text.ends_with("[Unit]\nWants=redis.service\n"));
        assert_eq!(outputs.len(), 2);
    }

    #[test]
    fn without_a_main_process_the_helper_may_end() {
        let outputs = outputs(&[record("a\\x2db.service", None)], &[], &[]);
        assert!(outputs[0].text.contains("rcr-adopt a\\\\x2db.service\n"));
        assert!(
            outputs[0]
                .text
                .ends_with("Type=forking\nPIDFile=\nGuessMainPID=no\n")
        );
    }

    #[test]
    fn tags_and_reports_order_our_own_units() {
        let tagged = ["a.service".to_owned(), "b.service".to_owned()];
        let outputs = outputs(&[], &tagged, &tagged[..1]);
        assert_eq!(
            outputs[0].path,
            Path::new("rcr-pre-kexec.service.d/50-rcr-tagged.conf")
        );
        assert!(
            outputs[0]
                .text
                .ends_with("[Unit]\nAfter=a.service\nAfter=b.service\n")
        );
        assert_eq!(
            outputs[1].path,
            Path::new("rcr-release.service.d/50-rcr-carried.conf")
        );
        assert!(
            outputs[1]
                .text
                .ends_with("[Unit]\nAfter=a.service\nAfter=b.service\n")
        );
        assert_eq!(outputs.len(), 2);
    }

    #[test]
    fn written_drop_ins_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!adoption_is_in_force(&dir.path().join("none")).unwrap());
        write(dir.path(), &outputs(&[], &["a.service".into()], &[])).unwrap();
        assert!(!adoption_is_in_force(dir.path()).unwrap());
        write(dir.path(), &outputs(&[record("a.service", None)], &[], &[])).unwrap();
        assert!(adoption_is_in_force(dir.path()).unwrap());
    }
}
