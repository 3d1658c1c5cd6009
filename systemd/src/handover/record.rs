//! The adoption record: what early boot leaves for systemd's start of a unit.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::{HandoverError, RESTORED_DIR, ServiceType, UnitPlan, read_json, write_json};

/// A restored service that systemd has yet to adopt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptionRecord {
    /// Full unit name.
    pub unit: String,
    /// Its cgroup below the cgroup2 root.
    pub cgroup: String,
    /// Its main process.
    pub main_pid: Option<i32>,
    /// Every restored process of it.
    pub pids: Vec<i32>,
    /// `Type=` under the old kernel.
    pub service_type: ServiceType,
    /// `PIDFile=`, absolute.
    #[serde(default)]
    pub pid_file: Option<String>,
    /// `SyslogIdentifier=`.
    #[serde(default)]
    pub syslog_identifier: String,
    /// The file that takes the service's output until the journal is
    /// connected; `None` where no descriptor led to the journal.
    #[serde(default)]
    pub interim_output: Option<String>,
    /// Descriptors that stand on [`Self::interim_output`] and belong on the
    /// unit's journal stream.
    #[serde(default)]
    pub journal_streams: Vec<OutputStream>,
}

/// A descriptor that leads to the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputStream {
    /// The process.
    pub pid: i32,
    /// Its descriptor.
    pub fd: i32,
    /// Which of the unit's streams it is.
    pub kind: OutputKind,
}

/// One of a unit's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputKind {
    /// `StandardOutput=`
    Stdout,
    /// `StandardError=`
    Stderr,
}

impl AdoptionRecord {
    /// The record of a plan whose processes were restored.
    pub fn from_plan(plan: &UnitPlan, interim_output: Option<String>) -> Self {
        AdoptionRecord {
            unit: plan.unit.clone(),
            cgroup: plan.cgroup.clone(),
            main_pid: plan.main_pid,
            pids: plan.pids.clone(),
            service_type: plan.service_type,
            pid_file: plan.pid_file.clone(),
            syslog_identifier: plan.syslog_identifier.clone(),
            interim_output,
            journal_streams: plan.journal_streams.clone(),
        }
    }

    /// Where the record of `unit` lies beneath `dir` ([`RESTORED_DIR`]).
    pub fn path_in(dir: &Path, unit: &str) -> PathBuf {
        dir.join(format!("{unit}.json"))
    }

    /// Writes the record into [`RESTORED_DIR`].
    pub fn write(&self) -> Result<PathBuf, HandoverError> {
        self.write_in(Path::new(RESTORED_DIR))
    }

    /// Writes the record into `dir`.
    pub fn write_in(&self, dir: &Path) -> Result<PathBuf, HandoverError> {
        let path = Self::path_in(dir, &self.unit);
        write_json(&path, self)?;
        Ok(path)
    }

    /// The record of `unit` in `dir`; `None` where there is none.
    pub fn read_in(dir: &Path, unit: &str) -> Result<Option<Self>, HandoverError> {
        read_json(&Self::path_in(dir, unit))
    }

    /// Every record in `dir`, by unit name. A directory that does not exist
    /// holds none.
    pub fn read_all_in(dir: &Path) -> Result<Vec<Self>, HandoverError> {
        let io_error = |source| HandoverError::Io {
            path: dir.into(),
            source,
        };
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io_error(e)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(io_error)?.path();
            if path.extension().is_some_and(|e| e == "json") {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths
            .iter()
            .map(|path| read_json(path))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect())
    }

    /// Removes the record of `unit` from `dir`; none there is well too.
    pub fn remove_in(dir: &Path, unit: &str) -> Result<(), HandoverError> {
        let path = Self::path_in(dir, unit);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(HandoverError::Io { path, source: e })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::sample;
    use super::*;

    #[test]
    fn records_are_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let restored = dir.path().join("restored");
        assert!(AdoptionRecord::read_all_in(&restored).unwrap().is_empty());
        let record = AdoptionRecord::from_plan(&sample().units[0], None);
        record.write_in(&restored).unwrap();
        fs::write(restored.join("note.txt"), "not a record").unwrap();
        assert_eq!(
            AdoptionRecord::read_all_in(&restored).unwrap(),
            vec![record.clone()]
        );
        assert_eq!(
            AdoptionRecord::read_in(&restored, &record.unit).unwrap(),
            Some(record.clone())
        );
        AdoptionRecord::remove_in(&restored, &record.unit).unwrap();
        AdoptionRecord::remove_in(&restored, &record.unit).unwrap();
        assert_eq!(
            AdoptionRecord::read_in(&restored, &record.unit).unwrap(),
            None
        );
    }
}
