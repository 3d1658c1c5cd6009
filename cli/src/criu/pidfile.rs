//! Pid files.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use anyhow::Context;

use super::Error;

/// Writes a process id into a file that must not exist yet.
pub fn write(path: &Path, pid: i32) -> Result<(), Error> {
    let told = || format!("pidfile {}", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(told)?;
    write!(file, "{pid}").with_context(told)
}
