//! How far the worker has come, for the one who cleans up after it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rcr_systemd::handover::Report;
use serde::{Deserialize, Serialize};

/// What the worker notes down before each step that would leave something
/// behind if it died in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The stage that runs.
    pub stage: String,
    /// What has been made for units so far.
    pub made: Vec<Made>,
    /// The restored processes run: they are the services now and are not to be
    /// cleaned up.
    pub resumed: bool,
    /// The report as it would be if nothing more came.
    pub report: Option<Report>,
}

/// What has been, or is about to be, made for a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The unit.
    pub unit: String,
    /// Its cgroup's directory.
    pub cgroup: PathBuf,
    /// Its files on tmpfs.
    pub files: Vec<PathBuf>,
}

impl Progress {
    /// The note in `run_dir`; `None` where the worker did not come far enough to
    /// write one.
    pub fn read(run_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = path_in(run_dir);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).context("progress")?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Writes the note whole or not at all.
    pub fn write(&self, run_dir: &Path) -> anyhow::Result<()> {
        let path = path_in(run_dir);
        let new = path.with_extension("new");
        fs::create_dir_all(run_dir)
            .and_then(|()| fs::write(&new, serde_json::to_vec(self)?))
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| path.display().to_string())
    }

    /// Removes the note.
    pub fn remove(run_dir: &Path) {
        let _ = fs::remove_file(path_in(run_dir));
    }
}

fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join("progress.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Progress::read(dir.path()).unwrap(), None);
        let note = Progress {
            stage: "restore".into(),
            made: vec![Made {
                unit: "a.service".into(),
                cgroup: "/sys/fs/cgroup/a".into(),
                files: vec!["/run/a".into()],
            }],
            ..Default::default()
        };
        note.write(dir.path()).unwrap();
        assert_eq!(Progress::read(dir.path()).unwrap(), Some(note));
        Progress::remove(dir.path());
        assert_eq!(Progress::read(dir.path()).unwrap(), None);
    }
}
