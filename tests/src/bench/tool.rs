//! The tools that are compared, as commands.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcr_engine::image::schema::StatsEntry;
use rcr_engine::image::{DirSource, Kind, get_reader};

/// A program that dumps and restores.
#[derive(Debug, Clone)]
pub enum Tool {
    /// `rcr`.
    Ours(PathBuf),
    /// `criu`.
    Peer(PathBuf),
}

/// How long one call took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// From the start of the program to its end, milliseconds.
    pub ms: f64,
    /// The time that the tree stood still, milliseconds, where the images say.
    pub frozen_ms: Option<f64>,
}

impl Tool {
    /// Dumps a tree and ends it.
    ///
    /// # Errors
    /// What the program said.
    pub fn dump(&self, pid: i32, images: &Path) -> Result<Took> {
        let pid = pid.to_string();
        let mut command = match self {
            Tool::Ours(path) => {
                let mut c = Command::new(path);
                c.args(["dump", "--tree", &pid, "--images-dir"]).arg(images);
                c
            }
            Tool::Peer(path) => {
                let mut c = Command::new(path);
                c.args(["dump", "-v1", "-o", "dump.log", "-t", &pid, "-D"])
                    .arg(images);
                c
            }
        };
        let ms = timed(&mut command)?;
        Ok(Took {
            ms,
            frozen_ms: frozen(images),
        })
    }

    /// Restores a tree and leaves it running.
    ///
    /// # Errors
    /// What the program said.
    pub fn restore(&self, images: &Path) -> Result<Took> {
        let mut command = match self {
            Tool::Ours(path) => {
                let mut c = Command::new(path);
                c.args(["restore", "--detach", "--images-dir"]).arg(images);
                c
            }
            Tool::Peer(path) => {
                let mut c = Command::new(path);
                c.args(["restore", "-v1", "-o", "restore.log", "-d", "-D"])
                    .arg(images);
                c
            }
        };
        let ms = timed(&mut command)?;
        Ok(Took {
            ms,
            frozen_ms: None,
        })
    }

    /// Its version, as it says.
    ///
    /// # Errors
    /// When it does not start.
    pub fn version(&self) -> Result<String> {
        let (Tool::Ours(path) | Tool::Peer(path)) = self;
        let out = Command::new(path).arg("--version").output();
        let out = out.with_context(|| path.display().to_string())?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

fn timed(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let status = child.wait()?;
    let took = start.elapsed();
    if !status.success() {
        // A restored tree may hold the pipes open: only what is there is read.
        let mut text = String::new();
        if let Some(stderr) = child.stderr.take() {
            text = super::sys::available(stderr)?;
        }
        bail!("{command:?}: {status}: {}", text.trim());
    }
    Ok(milliseconds(took))
}

/// In the unit of the tables.
pub fn milliseconds(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// What `stats-dump` says about the time that the tree stood still.
fn frozen(images: &Path) -> Option<f64> {
    let source = DirSource::open(images).ok()?;
    let mut reader = get_reader(&source, Kind::Stats, "stats-dump").ok()??;
    let stats: StatsEntry = reader.record().ok()??;
    Some(f64::from(stats.dump?.frozen_time) / 1e3)
}
