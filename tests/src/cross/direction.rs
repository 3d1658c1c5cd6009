//! Who dumps and who restores.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Who dumps; the other one restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    WeDump,
    TheyDump,
}

impl Direction {
    /// For the test's name.
    pub fn shows(self) -> &'static str {
        match self {
            Self::WeDump => "from rcr to criu",
            Self::TheyDump => "from criu to rcr",
        }
    }
}

/// Runs one program's dump or restore; both take the same command line. What
/// it logged is in the error.
pub fn command(program: &str, dir: &Path, what: &str, more: &[&str]) -> Result<()> {
    let log = format!("{what}.log");
    let status = Command::new(program)
        .arg(what)
        .arg("--images-dir")
        .arg(dir)
        .args(["-v4", "--log-file", &log])
        .args(more)
        .stdin(Stdio::null())
        .status()
        .with_context(|| program.to_owned())?;
    if !status.success() {
        let text = std::fs::read_to_string(dir.join(&log)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        bail!("{program} {what}: {status}\n{tail}");
    }
    Ok(())
}
