//! What the two kernels tell each other, and what they tell the reader.
//!
//! ```text
//! old kernel                 store                new kernel
//! rcr-upgrade ── Manifest ── manifest.json ──▶ early boot ── AdoptionRecord ──▶ generator, rcr-adopt
//!                                                   └─────── Report ─────────▶ rcr-release, rcr status
//! ```
//!
//! Everything is JSON. Points in time are milliseconds of `CLOCK_REALTIME`
//! since 1970, the one clock that both kernels share; lengths are
//! milliseconds. A field that is absent reads as its default, so that a field
//! may be added without a new [`FORMAT_VERSION`].

mod manifest;
mod record;
mod report;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use manifest::{LostUnit, Manifest, PseudoMount, ServiceType, UnitPlan};
pub use record::{AdoptionRecord, OutputKind, OutputStream};
pub use report::{MemoryReport, Outcome, Report, ServiceOutcome, ServiceReport};

/// Version of the manifest. A reader takes exactly its own: a change that an
/// older reader would misunderstand raises it.
pub const FORMAT_VERSION: u32 = 1;

/// Image name of the [`Manifest`] in the store.
pub const MANIFEST_IMAGE: &str = "manifest.json";

/// Name, beneath a unit's prefix, of the content tree that holds its files on
/// tmpfs (`rcr_engine::content::save_paths`).
pub const RUNTIME_TREE: &str = "runtime";

/// A [`Report`] that the old side leaves on disk at the jump. It holds if early
/// boot of the new kernel leaves none.
pub const JUMP_REPORT: &str = "/var/lib/rcr/jumped.json";

/// The reason in a [`JUMP_REPORT`] until early boot says otherwise.
pub const NO_WORD: &str = "early boot of the new kernel left no report";

/// Directory of the [`AdoptionRecord`]s, one `UNIT.json` each.
pub const RESTORED_DIR: &str = "/run/rcr/restored";

/// The [`Report`] as early boot leaves it.
pub const EARLY_REPORT: &str = "/run/rcr/report.json";

/// The [`Report`] of the last upgrade, complete.
pub const FINAL_REPORT: &str = "/var/lib/rcr/last-upgrade.json";

/// Which kernel a stage ran under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The kernel that is left.
    Old,
    /// The kernel that is entered.
    New,
}

/// How long one stage took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// Name of the stage (`freeze`, `dump`, `jump`, `restore`).
    pub name: String,
    /// The kernel it ran under.
    pub side: Side,
    /// When it began, `CLOCK_REALTIME` in ms since 1970.
    pub started_ms: u64,
    /// Its length in ms.
    pub ms: u64,
}

/// `CLOCK_REALTIME` in ms since 1970; 0 for a clock set before that.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// Measures consecutive stages of one side.
#[derive(Debug)]
pub struct StageClock {
    side: Side,
    started_ms: u64,
    done: Vec<StageTime>,
}

impl StageClock {
    /// Starts the first stage now.
    pub fn start(side: Side) -> Self {
        StageClock {
            side,
            started_ms: now_ms(),
            done: Vec::new(),
        }
    }

    /// Ends the running stage under `name` and starts the next one.
    pub fn lap(&mut self, name: &str) {
        let now = now_ms();
        self.done.push(StageTime {
            name: name.to_owned(),
            side: self.side,
            started_ms: self.started_ms,
            ms: now.saturating_sub(self.started_ms),
        });
        self.started_ms = now;
    }

    /// The stages ended so far.
    pub fn stages(&self) -> &[StageTime] {
        &self.done
    }

    /// Ends the clock; a running stage is dropped.
    pub fn finish(self) -> Vec<StageTime> {
        self.done
    }
}

/// Why a handover file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{} does not hold what its name says", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where parsing stopped.
        source: serde_json::Error,
    },
    /// The manifest was written by another version.
    #[error("the manifest has format {found}, this program reads format {FORMAT_VERSION}")]
    Version {
        /// The manifest's version.
        found: u32,
    },
    /// The manifest is not JSON of the right shape.
    #[error("the manifest cannot be read")]
    Manifest(#[source] serde_json::Error),
}

/// Reads a JSON file; `None` where there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, HandoverError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(HandoverError::Io {
                path: path.into(),
                source,
            });
        }
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| HandoverError::Json {
            path: path.into(),
            source,
        })
}

/// Writes a JSON file so that a reader sees the old or the new one whole.
/// Missing directories are made.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), HandoverError> {
    let io_error = |source| HandoverError::Io {
        path: path.into(),
        source,
    };
    let mut text = serde_json::to_vec_pretty(value).map_err(|source| HandoverError::Json {
        path: path.into(),
        source,
    })?;
    text.push(b'\n');
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    fs::write(&temporary, &text).map_err(io_error)?;
    fs::File::open(&temporary)
        .and_then(|f| f.sync_all())
        .map_err(io_error)?;
    fs::rename(&temporary, path).map_err(io_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_follow_each_other() {
        let mut clock = StageClock::start(Side::Old);
        clock.lap("freeze");
        clock.lap("dump");
        let stages = clock.finish();
        assert_eq!(stages[0].name, "freeze");
        assert_eq!(stages[0].started_ms + stages[0].ms, stages[1].started_ms);
    }

    #[test]
    fn json_files_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.json");
        assert!(read_json::<Vec<u32>>(&path).unwrap().is_none());
        write_json(&path, &vec![1u32, 2]).unwrap();
        write_json(&path, &vec![3u32]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap().unwrap(), vec![3]);
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
        fs::write(&path, b"[3").unwrap();
        assert!(matches!(
            read_json::<Vec<u32>>(&path),
            Err(HandoverError::Json { .. })
        ));
    }
}
