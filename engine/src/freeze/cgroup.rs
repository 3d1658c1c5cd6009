//! The cgroup v2 freezer (Documentation/admin-guide/cgroup-v2.rst,
//! `cgroup.freeze`).

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::FreezeError;
use crate::sys::guard::Guard;

/// How long tasks may take to reach a point where they can be frozen.
const PATIENCE: Duration = Duration::from_secs(10);

/// A frozen cgroup; dropping it thaws, and so does our death.
#[derive(Debug)]
pub struct CgroupFreezer {
    dir: PathBuf,
    /// `None` where somebody else had frozen it before.
    guard: Option<Guard>,
}

impl CgroupFreezer {
    /// Freezes the cgroup and waits until all its tasks are.
    pub fn freeze(dir: &Path) -> Result<Self, FreezeError> {
        let io = |what: &str, source| FreezeError::Io {
            what: format!("{what} {}", dir.display()),
            source,
        };
        let file = dir.join("cgroup.freeze");
        let was = std::fs::read_to_string(&file).map_err(|e| io("freezing", e))?;
        let guard = match was.trim() {
            "1" => None,
            _ => Some(Guard::write_at_death(&file, "0").map_err(|e| io("guarding", e))?),
        };
        let this = Self {
            dir: dir.to_owned(),
            guard,
        };
        std::fs::write(&file, "1").map_err(|e| io("freezing", e))?;
        let end = Instant::now() + PATIENCE;
        loop {
            let events = std::fs::read_to_string(dir.join("cgroup.events"))
                .map_err(|e| io("reading cgroup.events of", e))?;
            if events.lines().any(|l| l == "frozen 1") {
                return Ok(this);
            }
            if Instant::now() > end {
                let cgroup = dir.display().to_string();
                return Err(FreezeError::Timeout {
                    cgroup,
                    seconds: PATIENCE.as_secs(),
                });
            }
            sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for CgroupFreezer {
    fn drop(&mut self) {
        if self.guard.is_some()
            && let Err(e) = std::fs::write(self.dir.join("cgroup.freeze"), "0")
        {
            tracing::error!("{}: cannot thaw: {e}", self.dir.display());
        }
    }
}
