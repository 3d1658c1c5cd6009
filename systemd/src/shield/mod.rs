//! Run-time configuration of the old side: the tagged services outlast the
//! transition into the next kernel, and die silently once they are in the store.
//!
//! systemd stops a unit when `shutdown.target` or `umount.target` is started
//! and the unit conflicts with it, or when a unit that it needs is stopped. A
//! drop-in takes the implicit dependencies away; dependencies that are written
//! out cannot be taken back by one, so a copy of the file without them takes the
//! file's place. The same is done for what must not go from under a service:
//! its slices and local mounts. systemd's last pass unmounts those anyway.
//!
//! Between the dump and the jump the processes are killed. systemd sees main
//! processes die; it neither runs stop commands, nor starts anything anew, nor
//! takes an action on failure. Who stands still feeds no watchdog, so none bites.

mod closure;
mod kept;
mod unitfile;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::systemctl::{self, SystemctlError};
use kept::Kept;

/// Where run-time unit configuration lies.
pub const RUNTIME_UNITS: &str = "/run/systemd/system";

/// Where unit files lie that come before all others (systemd.unit(5)).
const CONTROL_UNITS: &str = "/run/systemd/system.control";

const FILE: &str = "zz-rcr-jump.conf";

const OUTLASTS: &str = "\
# Made by rcr for the jump into the next kernel; it does not outlive it.
[Unit]
DefaultDependencies=no
";

const DIES_SILENTLY: &str = "\
FailureAction=none
SuccessAction=none

[Service]
ExecStop=
ExecStopPost=
Restart=no
WatchdogSec=0
";

/// Why the services cannot be kept from being stopped.
#[derive(Debug, thiserror::Error)]
pub enum ShieldError {
    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// systemd did not answer, or did not take the files.
    #[error("systemd did not take the configuration for the transition")]
    Systemd(#[from] SystemctlError),
    /// Something would stop a service all the same.
    #[error(
        "{unit} would be stopped together with {by}, before it can be frozen; \
         stop {by}, or take the dependency between them away"
    )]
    Stopped {
        /// The tagged service.
        unit: String,
        /// What takes it along.
        by: String,
    },
}

/// The configuration in force. Dropping the value takes it back;
/// [`Self::keep`] leaves it for the jump.
#[derive(Debug)]
pub struct Shield {
    files: Vec<PathBuf>,
    reload: bool,
}

impl Shield {
    /// Makes the files for each service and has systemd read them. After an
    /// error none is left.
    pub fn install(units: &[&str]) -> Result<Self, ShieldError> {
        let kept = kept::find(units)?;
        let mut shield = Self::write(Path::new(RUNTIME_UNITS), Path::new(CONTROL_UNITS), &kept)?;
        shield.reload = true;
        systemctl::daemon_reload()?;
        closure::check(units)?;
        Ok(shield)
    }

    fn write(dropins: &Path, control: &Path, kept: &[Kept]) -> Result<Self, ShieldError> {
        let mut shield = Shield {
            files: Vec::new(),
            reload: false,
        };
        for unit in kept {
            let text = match unit.is_tagged {
                true => format!("{OUTLASTS}{DIES_SILENTLY}"),
                false => OUTLASTS.to_owned(),
            };
            let directory = format!("{}.d", unit.id);
            shield.put(dropins.join(&directory).join(FILE), &text)?;
            if let Some(text) = read_without_ties(unit.fragment.as_deref())? {
                shield.put(control.join(&unit.id), &text)?;
            }
            for path in &unit.dropins {
                let (Some(name), Some(text)) = (path.file_name(), read_without_ties(Some(path))?)
                else {
                    continue;
                };
                shield.put(control.join(&directory).join(name), &text)?;
            }
        }
        Ok(shield)
    }

    fn put(&mut self, path: PathBuf, text: &str) -> Result<(), ShieldError> {
        // Somebody's own: theirs comes before everything of ours.
        if path.exists() {
            return Ok(());
        }
        let written = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, text));
        self.files.push(path.clone());
        written.map_err(|source| ShieldError::Io { path, source })
    }

    /// Leaves the files in place.
    pub fn keep(&mut self) {
        self.files.clear();
    }
}

/// Takes back what a [`Shield`] of this boot has left for `units`, so that
/// systemd stops them its ordinary way.
pub fn lower(units: &[&str]) -> Result<(), ShieldError> {
    let mut shield = Shield {
        files: Vec::new(),
        reload: true,
    };
    for unit in units {
        let path = Path::new(RUNTIME_UNITS)
            .join(format!("{unit}.d"))
            .join(FILE);
        shield.files.push(path);
    }
    drop(shield);
    Ok(())
}

fn read_without_ties(path: Option<&Path>) -> Result<Option<String>, ShieldError> {
    let Some(path) = path else { return Ok(None) };
    match fs::read_to_string(path) {
        Ok(text) => Ok(unitfile::without_ties(&text)),
        Err(source) => Err(ShieldError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

impl Drop for Shield {
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
            // Fails, as it should, where somebody else's files lie too.
            if let Some(directory) = path.parent() {
                let _ = fs::remove_dir(directory);
            }
        }
        if self.reload
            && let Err(e) = systemctl::daemon_reload()
        {
            tracing::error!("the configuration is in force until the next daemon-reload: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(id: &str, fragment: Option<PathBuf>) -> Kept {
        Kept {
            id: id.to_owned(),
            is_tagged: id.ends_with(".service"),
            fragment,
            dropins: Vec::new(),
        }
    }

    #[test]
    fn files_go_with_the_value_unless_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (run, control) = (dir.path().join("run"), dir.path().join("control"));
        let other = run.join("a.service.d/other.conf");
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, "").unwrap();
        let mount = dir.path().join("tmp.mount");
        fs::write(
            &mount,
            "[Unit]\nConflicts=umount.target\n[Mount]\nWhat=tmpfs\n",
        )
        .unwrap();

        let units = [kept("a.service", None), kept("tmp.mount", Some(mount))];
        let mut shield = Shield::write(&run, &control, &units).unwrap();
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let of_service = read(&run.join("a.service.d").join(FILE));
        assert_eq!(of_service, format!("{OUTLASTS}{DIES_SILENTLY}"));
        assert_eq!(read(&run.join("tmp.mount.d").join(FILE)), OUTLASTS);
        assert_eq!(
            read(&control.join("tmp.mount")),
            "[Unit]\n[Mount]\nWhat=tmpfs\n"
        );
        shield.reload = false;
        drop(shield);
        assert!(!run.join("tmp.mount.d").exists() && !control.exists());
        assert!(other.exists());
        assert_eq!(fs::read_dir(other.parent().unwrap()).unwrap().count(), 1);

        Shield::write(&run, &control, &units).unwrap().keep();
        assert!(control.join("tmp.mount").exists());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.service.d"), "in the way").unwrap();
        let units = [kept("a.service", None), kept("b.service", None)];
        Shield::write(dir.path(), dir.path(), &units).unwrap_err();
        assert!(!dir.path().join("a.service.d").exists());
    }
}
