//! `rcr-upgrade`: the old kernel's half of the journey.
//!
//! ```text
//! Tagged ▶ Cleared ▶ Prepared ▶ Loaded ▶ Frozen ▶ Dumped ▶ Sealed ▶ jump
//!    nothing touched │ memory, image │ services stand still          │ no way back
//! ```
//! Each stage is a type that consumes the one before. Dropping any of them puts
//! everything back: services run on, nothing is loaded, the memory is free.

mod cleared;
mod dumped;
pub mod fault;
mod frozen;
mod jump;
mod loaded;
mod lock;
pub mod options;
mod outcome;
mod pre_kexec;
mod prepared;
mod sealed;
mod tagged;
pub mod target;

use std::io::{BufRead, IsTerminal, Write};

use rcr_systemd::handover::now_ms;

use crate::exit::{Failure, OrExit};
use crate::progress::Progress;
use crate::{environment, signals};

use cleared::{Cleared, declined};
use dumped::Dumped;
use fault::{FailAt, point};
use frozen::Frozen;
use loaded::Loaded;
use lock::Lock;
use options::Options;
pub use outcome::{Ended, record_failure};
use prepared::Prepared;
use sealed::Sealed;
use tagged::Tagged;
use target::Target;

/// Runs the program as asked.
pub fn run(options: &Options, progress: &mut Progress) -> Result<Ended, Failure> {
    signals::hold().or_environment()?;
    if options.pre_kexec {
        return pre_kexec::run(options, progress);
    }
    let started_ms = now_ms();
    let _lock = Lock::take().or_environment()?;
    let cleared = clear(options, progress)?;
    let summary = outcome::summary(&cleared).or_environment()?;
    if options.dry_run {
        return Ok(Ended::Checked(summary));
    }
    if !confirmed(options, &summary.to_string()) {
        return Err(declined());
    }
    if options.load {
        return pre_kexec::load(options, cleared, progress);
    }
    let sealed = carry(options, cleared, started_ms, progress)?;
    let ended = Ended::Jumping(summary);
    jump::jump(sealed, options.fail_at.as_ref())?;
    Ok(ended)
}

/// Up to the last stage in which nothing was touched.
fn clear(options: &Options, progress: &mut Progress) -> Result<Cleared, Failure> {
    progress.begin("checking the machine, the kernel and the services");
    environment::check().or_environment()?;
    let target = Target::read(options).or_environment()?;
    let tagged = Tagged::read().or_environment()?;
    let cleared = Cleared::check(tagged, target)?;
    progress.end("check");
    for warning in cleared.warnings() {
        progress.note(&format!("warning: {warning}"));
    }
    Ok(cleared)
}

/// From nothing touched to everything in the store.
fn carry(
    options: &Options,
    cleared: Cleared,
    started_ms: u64,
    progress: &mut Progress,
) -> Result<Sealed, Failure> {
    let fail_at = options.fail_at.as_ref();
    let reached = |stage: &FailAt| {
        signals::check().or_rolled_back()?;
        point(fail_at, stage)
    };

    progress.begin("taking memory that outlives the kernel");
    let prepared = Prepared::prepare(cleared, fail_at)?;
    reached(&FailAt::Prepare)?;
    progress.end("prepare");

    progress.begin("loading the kernel, preparing systemd");
    let loaded = Loaded::load(prepared).or_rolled_back()?;
    reached(&FailAt::Load)?;
    progress.end("load");

    progress.begin("freezing the services");
    let frozen = Frozen::freeze(loaded).or_rolled_back()?;
    reached(&FailAt::Freeze)?;
    progress.end("freeze");

    progress.begin("writing their images");
    let dumped = Dumped::dump(frozen, started_ms).or_rolled_back()?;
    reached(&FailAt::Dump)?;
    progress.end("dump");
    progress.note(&format!("{} MiB written", dumped.bytes() >> 20));

    progress.begin("sealing the store");
    let sealed = Sealed::seal(dumped, progress, fail_at).or_rolled_back()?;
    reached(&FailAt::Seal)?;
    progress.end("seal");
    Ok(sealed)
}

/// Asks on a terminal; programs that call this one have decided already.
fn confirmed(options: &Options, summary: &str) -> bool {
    let stdin = std::io::stdin();
    if options.yes || options.json || !stdin.is_terminal() {
        return true;
    }
    eprint!("{summary}\nGo on? [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    let _ = stdin.lock().read_line(&mut answer);
    matches!(answer.trim(), "y" | "Y" | "yes")
}
