//! Finishes an upgrade once the boot is over: takes the handed-over memory back
//! as RAM, compares what systemd runs with what was restored, and writes the
//! report to disk.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rcr_pmem_store::Locator;
use rcr_pmem_store::region::release;
use rcr_systemd::check;
use rcr_systemd::generator::OUTPUT_DIR;
use rcr_systemd::handover::{
    EARLY_REPORT, FINAL_REPORT, JUMP_REPORT, MemoryReport, NO_WORD, Outcome, RESTORED_DIR, Report,
    ServiceOutcome,
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rcr-release: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if let Err(e) = check::forget_adoptions(Path::new(OUTPUT_DIR)) {
        eprintln!("rcr-release: adoption drop-ins stay until the next daemon-reload: {e}");
    }
    // The memory comes back whatever became of the services.
    let memory = take_memory_back();
    let Some(mut report) = start_of_report()? else {
        return Ok(());
    };
    report.memory = memory;
    if report.kernel_after.is_empty() {
        // The old side does not know what somebody else has loaded.
        report.kernel_after = nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned();
    }
    check::complete(&mut report, Path::new(RESTORED_DIR));
    report
        .write(Path::new(FINAL_REPORT))
        .context("writing the report")?;
    match fs::remove_file(JUMP_REPORT) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).context(JUMP_REPORT),
        _ => {}
    }
    tell(&report);
    Ok(())
}

/// What early boot reported, completed from what the old side left on disk.
fn start_of_report() -> Result<Option<Report>> {
    let early = Report::read(Path::new(EARLY_REPORT))?;
    let left = Report::read(Path::new(JUMP_REPORT))?;
    Ok(match (early, left) {
        // The old side knows why there is no store to be found.
        (_, Some(left)) if left.reason != NO_WORD => Some(left),
        (Some(early), Some(left)) if early.services.is_empty() => Some(left.because(&early.reason)),
        (early, left) => early.or(left),
    })
}

fn take_memory_back() -> Option<MemoryReport> {
    let locator = match Locator::of_this_boot() {
        Ok(locator) => locator?,
        Err(e) => {
            let reason = format!("{:#}", anyhow::Error::from(e));
            return Some(MemoryReport {
                region_bytes: 0,
                returned_bytes: 0,
                reason,
            });
        }
    };
    let region_bytes = locator.total_bytes();
    Some(match release::give_back(&locator) {
        Ok(released) => MemoryReport {
            region_bytes,
            returned_bytes: released.bytes,
            reason: String::new(),
        },
        Err(e) => MemoryReport {
            region_bytes,
            returned_bytes: 0,
            reason: format!("{:#}", anyhow::Error::from(e)),
        },
    })
}

/// The summary for the journal.
fn tell(report: &Report) {
    println!(
        "{} -> {}: {}",
        report.kernel_before,
        report.kernel_after,
        report.outcome.as_str()
    );
    if report.outcome != Outcome::Carried {
        println!("{}", report.reason);
    }
    for service in &report.services {
        match service.outcome {
            ServiceOutcome::Kept => println!("{}: kept", service.unit),
            ServiceOutcome::Cold => println!("{}: started cold: {}", service.unit, service.reason),
        }
    }
    if let Some(memory) = report.memory.as_ref() {
        let (returned, all) = (memory.returned_bytes >> 20, memory.region_bytes >> 20);
        println!("memory: {returned} of {all} MiB back as RAM");
        if !memory.reason.is_empty() {
            println!("memory: {}", memory.reason);
        }
    }
}
