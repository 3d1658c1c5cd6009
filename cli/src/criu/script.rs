//! Action scripts: programs that are told of each stage and may stop it.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, bail};

use super::Error;
use super::options::Options;
use super::places::Places;

/// Who is told of the stages.
pub trait Notify {
    /// A stage has come. `pid` is the root process, where there is one; an
    /// error stops what is being done.
    fn stage(&mut self, stage: &str, pid: Option<i32>) -> Result<(), Error>;
}

/// The programs of `--action-script`.
#[derive(Debug)]
pub struct Scripts {
    commands: Vec<OsString>,
    images: OsString,
}

impl Scripts {
    /// Those of the options.
    pub fn new(options: &Options, places: &Places) -> Self {
        Self {
            commands: options.scripts.clone(),
            images: places.images.clone().into(),
        }
    }
}

impl Notify for Scripts {
    fn stage(&mut self, stage: &str, pid: Option<i32>) -> Result<(), Error> {
        for command in &self.commands {
            let mut shell = Command::new("/bin/sh");
            shell
                .arg("-c")
                .arg(command)
                .env("CRTOOLS_SCRIPT_ACTION", stage)
                .env("CRTOOLS_IMAGE_DIR", &self.images);
            if let Some(pid) = pid {
                shell.env("CRTOOLS_INIT_PID", pid.to_string());
            }
            let status = shell
                .status()
                .with_context(|| format!("option --action-script {command:?}"))?;
            if !status.success() {
                bail!("option --action-script {command:?}: it failed at {stage}: {status}");
            }
        }
        Ok(())
    }
}
