//! Run-time drop-ins of the old side: the tagged services die silently.
//!
//! Between the dump and the jump their processes are killed: what is in the
//! store must be the last that they did. systemd sees main processes die; with
//! these drop-ins it neither runs their stop commands, nor starts them anew,
//! nor takes an action on failure.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::systemctl::{self, SystemctlError};

/// Where run-time unit configuration lies.
pub const RUNTIME_UNITS: &str = "/run/systemd/system";

const FILE: &str = "zz-rcr-jump.conf";

const TEXT: &str = "\
# Made by rcr for the jump into the next kernel; it does not outlive it.
[Unit]
FailureAction=none
SuccessAction=none

[Service]
ExecStop=
ExecStopPost=
Restart=no
";

/// Why the drop-ins could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DropinError {
    /// A file could not be written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// systemd did not read them.
    #[error("systemd did not take the drop-ins")]
    Reload(#[source] SystemctlError),
}

/// Drop-ins in force. Dropping the value takes them back; [`Self::keep`] leaves
/// them for the jump.
#[derive(Debug)]
pub struct SilentStop {
    files: Vec<PathBuf>,
    reload: bool,
}

impl SilentStop {
    /// Writes a drop-in for each unit and has systemd read them. After an error
    /// none is left.
    pub fn install<'a>(units: impl IntoIterator<Item = &'a str>) -> Result<Self, DropinError> {
        let mut stop = Self::write(Path::new(RUNTIME_UNITS), units)?;
        stop.reload = true;
        systemctl::daemon_reload().map_err(DropinError::Reload)?;
        Ok(stop)
    }

    fn write<'a>(
        base: &Path,
        units: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, DropinError> {
        let mut stop = SilentStop {
            files: Vec::new(),
            reload: false,
        };
        for unit in units {
            let directory = base.join(format!("{unit}.d"));
            let path = directory.join(FILE);
            stop.files.push(path.clone());
            fs::create_dir_all(&directory)
                .and_then(|()| fs::write(&path, TEXT))
                .map_err(|source| DropinError::Io { path, source })?;
        }
        Ok(stop)
    }

    /// Leaves the drop-ins in place.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for SilentStop {
    fn drop(&mut self) {
        if self.files.is_empty() {
            return;
        }
        for path in &self.files {
            if let Err(e) = fs::remove_file(path)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::error!("{} stays behind: {e}", path.display());
            }
            // Fails, as it should, where somebody else's drop-ins lie too.
            if let Some(directory) = path.parent() {
                let _ = fs::remove_dir(directory);
            }
        }
        if self.reload
            && let Err(e) = systemctl::daemon_reload()
        {
            tracing::error!("the drop-ins are in force until the next daemon-reload: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins_go_with_the_value_unless_kept() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("a.service.d/other.conf");
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, "").unwrap();

        let stop = SilentStop::write(dir.path(), ["a.service", "b.service"]).unwrap();
        let made = dir.path().join("b.service.d").join(FILE);
        assert_eq!(fs::read_to_string(&made).unwrap(), TEXT);
        drop(stop);
        assert!(!dir.path().join("b.service.d").exists());
        assert!(other.exists());
        assert_eq!(fs::read_dir(other.parent().unwrap()).unwrap().count(), 1);

        SilentStop::write(dir.path(), ["b.service"]).unwrap().keep();
        assert!(made.exists());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.service.d"), "in the way").unwrap();
        SilentStop::write(dir.path(), ["a.service", "b.service"]).unwrap_err();
        assert!(!dir.path().join("a.service.d").exists());
    }
}
