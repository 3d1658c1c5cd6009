//! Where images, log and other files of a run are.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::options::Options;
use super::{Error, log};

/// The directories of a run.
#[derive(Debug, Clone)]
pub struct Places {
    /// The images.
    pub images: PathBuf,
    /// Logs, pid files, statistics.
    pub work: PathBuf,
}

impl Places {
    /// Finds the directories and opens the log.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let images = directory(options.images_dir.as_deref().unwrap_or(Path::new(".")))?;
        let work = match &options.work_dir {
            Some(dir) => directory(dir)?,
            None => images.clone(),
        };
        let places = Self { images, work };
        if let Some(name) = &options.log_file {
            let path = places.in_work(name);
            log::to_file(&path).with_context(|| format!("log file {}", path.display()))?;
        }
        log::set_level(options.verbosity);
        Ok(places)
    }

    /// A path that is relative to the work directory.
    pub fn in_work(&self, name: &Path) -> PathBuf {
        self.work.join(name)
    }
}

fn directory(path: &Path) -> Result<PathBuf, Error> {
    let full = std::path::absolute(path)?;
    let meta =
        std::fs::metadata(&full).with_context(|| format!("can't open dir {}", path.display()))?;
    if !meta.is_dir() {
        bail!("{} is no directory", path.display());
    }
    Ok(full)
}
