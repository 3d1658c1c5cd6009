//! `rcr-upgrade`: the old kernel's half of the journey.
//!
//! ```text
//! Tagged ▶ Cleared ▶ Prepared ▶ Loaded ▶ Leaving ▶ Alone ▶ Frozen ▶ Dumped ▶ Sealed ▶ jump
//!    nothing touched │ memory, image │ others  │ services stand still          │
//!                    │    (memory is copied    │ what fails now starts cold    │
//!                    │     ahead)              │
//! ```
//! Each stage is a type that consumes the one before. Dropping any of them up to
//! `Leaving` puts everything back: services run on, nothing is loaded, the memory
//! is free. Behind it the rest of the system is gone; a failure then ends in a
//! cold start under the new kernel, with a report.

mod ahead;
mod alone;
mod apart;
mod cleared;
mod dumped;
pub mod fault;
mod frozen;
mod gate;
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
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use rcr_engine::restore::pagers;
use rcr_systemd::handover::now_ms;

use crate::exit::{Exit, Failure, OrExit};
use crate::progress::Progress;
use crate::{environment, signals};

use ahead::Ahead;
use alone::{Alone, Leaving, Transition};
use apart::{Caller, Side};
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

/// For memory to come back after the upgrade before.
const FILL_PATIENCE: Duration = Duration::from_secs(600);
const FILL_POLL: Duration = Duration::from_millis(100);

/// Runs the program as asked.
pub fn run(options: &Options, progress: &mut Progress) -> Result<Ended, Failure> {
    signals::hold().or_environment()?;
    if options.gate {
        return gate::visit();
    }
    if options.pre_kexec && !pre_kexec::is_wanted()? {
        return Ok(Ended::Nothing);
    }
    if options.dry_run || options.load {
        return stay(options, progress);
    }
    if !signals::is_root() {
        return Err(not_root());
    }
    match apart::split().or_environment()? {
        Side::Waiting(code) => Ok(Ended::Waited(code)),
        Side::Worker(mut caller) if options.pre_kexec => {
            pre_kexec::run(options, &mut caller, progress)
        }
        Side::Worker(mut caller) => go(options, &mut caller, progress),
    }
}

fn not_root() -> Failure {
    Failure::new(
        Exit::Environment,
        anyhow!("this needs root: run it with sudo"),
    )
}

/// What changes nothing that runs.
fn stay(options: &Options, progress: &mut Progress) -> Result<Ended, Failure> {
    let _lock = Lock::take().or_environment()?;
    let cleared = clear(options, progress)?;
    if options.load {
        if !confirmed(
            options,
            &outcome::summary(&cleared).or_environment()?.to_string(),
        ) {
            return Err(declined());
        }
        return pre_kexec::load(options, cleared, progress);
    }
    Ok(Ended::Checked(outcome::summary(&cleared).or_environment()?))
}

/// The upgrade.
fn go(options: &Options, caller: &mut Caller, progress: &mut Progress) -> Result<Ended, Failure> {
    let started_ms = now_ms();
    let _lock = Lock::take().or_environment()?;
    let cleared = clear(options, progress)?;
    let summary = outcome::summary(&cleared).or_environment()?;
    if !confirmed(options, &summary.to_string()) {
        return Err(declined());
    }
    let leaving = leave(options, cleared, Transition::Ours, progress)?;
    Ended::Jumping(summary).print(options.json);
    carry(options, leaving, started_ms, caller, progress)
}

/// Up to the last stage in which nothing was touched.
fn clear(options: &Options, progress: &mut Progress) -> Result<Cleared, Failure> {
    progress.begin("checking the machine, the kernel and the services");
    environment::check().or_environment()?;
    let target = Target::read(options).or_environment()?;
    let tagged = Tagged::read().or_environment()?;
    wait_for_memory(progress)?;
    let cleared = Cleared::check(tagged, target)?;
    progress.end("check");
    for warning in cleared.warnings() {
        progress.note(&format!("warning: {warning}"));
    }
    Ok(cleared)
}

/// After an upgrade a moment ago, what the services have in memory is not yet
/// all that belongs to them.
fn wait_for_memory(progress: &mut Progress) -> Result<(), Failure> {
    let end = Instant::now() + FILL_PATIENCE;
    let mut told = false;
    loop {
        let pagers = pagers().context("/proc").or_environment()?;
        let Some(pid) = pagers.first() else {
            return Ok(());
        };
        if Instant::now() > end {
            let error = anyhow!(
                "rcr-pager ({pid}) still fills the memory of services that were restored; \
                 try again when it has ended"
            );
            return Err(Failure::new(Exit::Environment, error));
        }
        if !told {
            progress.note("the memory of the last upgrade is still being filled: waiting");
            told = true;
        }
        signals::check().or_environment()?;
        std::thread::sleep(FILL_POLL);
    }
}

/// From nothing touched to a transition that is under way.
fn leave(
    options: &Options,
    cleared: Cleared,
    transition: Transition,
    progress: &mut Progress,
) -> Result<Leaving, Failure> {
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
    let mut loaded = Loaded::load(prepared).or_rolled_back()?;
    reached(&FailAt::Load)?;
    progress.end("load");

    let mut ahead = Ahead::new(Duration::from_millis(options.blackout_budget));
    if transition == Transition::Ours {
        // Clients do not wait yet.
        progress.begin("copying memory while the services run");
        ahead.start(&loaded.services, &mut loaded.store, progress);
        signals::check().or_rolled_back()?;
        progress.end("ahead");
    }
    let mut leaving = Leaving::begin(loaded, ahead, transition, fail_at)?;
    if transition == Transition::Again {
        // The rest stops anyway.
        progress.begin("copying memory while the services run");
        leaving.copy_ahead(progress);
        progress.end("ahead");
    }
    Ok(leaving)
}

/// From the transition to everything in the store. Failures up to the gate put
/// everything back; those behind it are told to the gate, and to the next kernel.
fn carry(
    options: &Options,
    leaving: Leaving,
    started_ms: u64,
    caller: &mut Caller,
    progress: &mut Progress,
) -> Result<Ended, Failure> {
    caller.let_go().or_rolled_back()?;
    progress.tell_the_kernel();
    progress.begin("waiting until everything else has stopped");
    let (alone, visitor) = leaving.wait().or_rolled_back()?;
    progress.end("others");
    let result = store(alone, options, started_ms, progress);
    visitor.answer(&result);
    match result {
        Ok(_) => Ok(Ended::Left),
        // The gate has told the next kernel already.
        Err(failure) => {
            progress.note(&failure.to_string());
            Ok(Ended::Left)
        }
    }
}

/// The part in which services stand still. Returns those that do not cross.
fn store(
    mut alone: Alone,
    options: &Options,
    started_ms: u64,
    progress: &mut Progress,
) -> Result<Vec<String>, Failure> {
    let fail_at = options.fail_at.as_ref();
    progress.begin("writing to disk what the services have written");
    alone.settle();
    progress.end("sync");

    progress.begin("copying what they have written since");
    alone.catch_up(progress);
    progress.end("catch-up");

    progress.begin("freezing the services");
    let frozen = Frozen::freeze(alone).or_rolled_back()?;
    point(fail_at, &FailAt::Freeze)?;
    progress.end("freeze");

    progress.begin("writing their images");
    let dumped = Dumped::dump(frozen, started_ms).or_rolled_back()?;
    point(fail_at, &FailAt::Dump)?;
    progress.end("dump");
    progress.note(&format!("{} MiB written", dumped.bytes() >> 20));

    progress.begin("sealing the store");
    let sealed = Sealed::seal(dumped, progress, fail_at).or_rolled_back()?;
    point(fail_at, &FailAt::Seal)?;
    progress.end("seal");
    Ok(sealed.leave())
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
