//! Where things are on the host.

use std::path::{Path, PathBuf};

use rcr_systemd::handover::{EARLY_REPORT, RESTORED_DIR};

/// The host's places.
#[derive(Debug, Clone)]
pub struct Host {
    /// Mount point of cgroup2.
    pub cgroup_root: PathBuf,
    /// Our directory on the tmpfs that crosses into the running system.
    pub run_dir: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        let run_dir = Path::new(EARLY_REPORT)
            .parent()
            .unwrap_or(Path::new("/run"))
            .to_path_buf();
        Host {
            cgroup_root: "/sys/fs/cgroup".into(),
            run_dir,
        }
    }
}

impl Host {
    /// Where the report goes.
    pub fn report_path(&self) -> PathBuf {
        self.run_dir
            .join(Path::new(EARLY_REPORT).file_name().unwrap_or_default())
    }

    /// Where the adoption records go.
    pub fn restored_dir(&self) -> PathBuf {
        self.run_dir
            .join(Path::new(RESTORED_DIR).file_name().unwrap_or_default())
    }

    /// Where the files are that take units' output until the journal is there.
    pub fn output_dir(&self) -> PathBuf {
        self.run_dir.join("output")
    }

    /// The directory of a unit's cgroup.
    pub fn cgroup_dir(&self, path: &str) -> PathBuf {
        self.cgroup_root.join(path.trim_start_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_that_systemds_side_reads() {
        let host = Host::default();
        assert_eq!(host.report_path(), Path::new(EARLY_REPORT));
        assert_eq!(host.restored_dir(), Path::new(RESTORED_DIR));
        assert_eq!(
            host.cgroup_dir("/system.slice/a.service"),
            Path::new("/sys/fs/cgroup/system.slice/a.service")
        );
    }
}
