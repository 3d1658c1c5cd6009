//! Plain `systemctl kexec`: a kernel is loaded beforehand, the services follow
//! when systemd stops `rcr-pre-kexec.service`.
//!
//! `--load` loads the kernel without a region and notes what was asked for. The
//! stop of the service, which comes before that of any tagged unit, runs the
//! whole journey with the same options, loading the kernel again with the region.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rcr_systemd::handover::{JUMP_REPORT, Outcome, Report, ServiceOutcome, ServiceReport, now_ms};
use rcr_systemd::systemctl;
use rcr_systemd::tags::{TAG_FILE, TagList};
use serde::{Deserialize, Serialize};

use super::cleared::Cleared;
use super::jump::{self, SEALED_MARK};
use super::loaded;
use super::lock::Lock;
use super::options::Options;
use super::{Ended, carry, clear, outcome};
use crate::environment;
use crate::exit::{Exit, Failure, OrExit};
use crate::progress::Progress;

/// What `--load` was asked for, for the time of this boot.
const LOADED_NOTE: &str = "/run/rcr/loaded.json";

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    append: Option<String>,
    command_line: Option<String>,
}

/// Loads the kernel and leaves it loaded.
pub fn load(
    options: &Options,
    cleared: Cleared,
    progress: &mut Progress,
) -> Result<Ended, Failure> {
    progress.begin("loading the kernel");
    let initrd = cleared
        .target
        .initrd_with_overlay(&cleared.pids(), None)
        .or_rolled_back()?;
    let mut image = loaded::load(&cleared.target, &initrd, None).or_rolled_back()?;
    let note = Note {
        kernel: absolute(options.kernel.as_deref().unwrap_or(Path::new("")))?,
        initrd: options.initrd.as_deref().map(absolute).transpose()?,
        append: options.append.clone(),
        command_line: options.command_line.clone(),
    };
    let write = || -> anyhow::Result<()> {
        let path = Path::new(LOADED_NOTE);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, serde_json::to_vec(&note)?)?;
        Ok(())
    };
    write().context(LOADED_NOTE).or_rolled_back()?;
    image.keep();
    progress.end("load");
    Ok(Ended::Loaded(outcome::summary(&cleared).or_rolled_back()?))
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    fs::canonicalize(path)
        .with_context(|| path.display().to_string())
        .or_environment()
}

/// The stop of `rcr-pre-kexec.service`.
pub fn run(options: &Options, progress: &mut Progress) -> Result<Ended, Failure> {
    let pending = systemctl::kexec_is_pending().or_exit(Exit::Internal)?;
    if !pending || Path::new(SEALED_MARK).exists() {
        return Ok(Ended::Nothing);
    }
    let result = carry_under_transition(options, progress);
    if let Err(failure) = &result {
        // The transition goes on and the services start cold: the next kernel's
        // report shall say why.
        leave_word(&failure.to_string().replace('\n', "; "));
    }
    result
}

fn carry_under_transition(options: &Options, progress: &mut Progress) -> Result<Ended, Failure> {
    let started_ms = now_ms();
    let _lock = Lock::take().or_environment()?;
    let options = Options {
        yes: true,
        ..with_note(options)?
    };
    let cleared = clear(&options, progress)?;
    let sealed = carry(&options, cleared, started_ms, progress)?;
    jump::leave(sealed)?;
    Ok(Ended::Left)
}

fn with_note(options: &Options) -> Result<Options, Failure> {
    let note = match fs::read(LOADED_NOTE) {
        Ok(bytes) => serde_json::from_slice::<Note>(&bytes)
            .context(LOADED_NOTE)
            .or_environment()?,
        Err(_) => {
            let error = anyhow!(
                "the loaded kernel is not one that rcr-upgrade --load has loaded, so it cannot \
                 take the services over"
            );
            return Err(Failure::new(Exit::Environment, error));
        }
    };
    Ok(Options {
        kernel: Some(note.kernel),
        initrd: note.initrd,
        append: note.append,
        command_line: note.command_line,
        ..options.clone()
    })
}

/// Leaves a report for the next boot in which every tagged service is cold.
fn leave_word(reason: &str) {
    let tagged = TagList::load(Path::new(TAG_FILE))
        .map(|list| list.units())
        .unwrap_or_default();
    let report = Report {
        outcome: Outcome::ColdStart,
        reason: reason.to_owned(),
        kernel_before: environment::running_release().unwrap_or_default(),
        kernel_after: String::new(),
        started_ms: now_ms(),
        frozen_ms: None,
        resumed_ms: None,
        services: tagged
            .iter()
            .map(|unit| ServiceReport {
                unit: unit.to_string(),
                outcome: ServiceOutcome::Cold,
                main_pid_before: None,
                main_pid_after: None,
                reason: reason.to_owned(),
            })
            .collect(),
        stages: Vec::new(),
        memory: None,
    };
    if let Err(e) = report.write(Path::new(JUMP_REPORT)) {
        tracing::error!("the report was not written: {:#}", anyhow::Error::from(e));
    }
}
