//! Plain `systemctl kexec`: a kernel is loaded beforehand, the services follow
//! when systemd stops `rcr-pre-kexec.service`.
//!
//! `--load` loads the kernel without a region and notes what was asked for. The
//! stop of the service, which comes before that of any tagged unit, runs the
//! whole journey with the same options, loading the kernel again with the region.
//! systemd has planned to stop the tagged units by then, so its transition is taken
//! back and begun anew.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rcr_systemd::handover::now_ms;
use rcr_systemd::systemctl;
use serde::{Deserialize, Serialize};

use super::alone::Transition;
use super::apart::Caller;
use super::cleared::Cleared;
use super::loaded;
use super::lock::Lock;
use super::options::Options;
use super::{Ended, carry, clear, gate, leave, outcome};
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
    eager: bool,
    blackout_budget: u64,
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
        eager: options.eager,
        blackout_budget: options.blackout_budget,
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

/// Whether the stop of `rcr-pre-kexec.service` has anything to do: a transition
/// has begun that is not ours.
pub fn is_wanted() -> Result<bool, Failure> {
    let pending = systemctl::kexec_is_pending().or_exit(Exit::Internal)?;
    Ok(pending && !gate::stands().or_exit(Exit::Internal)?)
}

/// The stop of `rcr-pre-kexec.service`.
pub fn run(
    options: &Options,
    caller: &mut Caller,
    progress: &mut Progress,
) -> Result<Ended, Failure> {
    let result = carry_under_transition(options, caller, progress);
    if let Err(failure) = &result {
        // The transition goes on and the services start cold: the next kernel's
        // report shall say why.
        outcome::leave_word(&failure.to_string().replace('\n', "; "));
    }
    result
}

fn carry_under_transition(
    options: &Options,
    caller: &mut Caller,
    progress: &mut Progress,
) -> Result<Ended, Failure> {
    let started_ms = now_ms();
    let _lock = Lock::take().or_environment()?;
    let options = Options {
        yes: true,
        ..with_note(options)?
    };
    let cleared = clear(&options, progress)?;
    let leaving = leave(&options, cleared, Transition::Again, progress)?;
    carry(&options, leaving, started_ms, caller, progress)
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
        eager: note.eager,
        blackout_budget: note.blackout_budget,
        ..options.clone()
    })
}
