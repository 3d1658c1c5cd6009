//! What restores, in a child of PID 1.
//!
//! ```text
//! find ─▶ verify ─▶ prepare ─▶ restore each unit ─▶ consume ─▶ record ─▶ resume ─▶ report
//!  │        │          │             │                  │                  │
//!  └────────┴──────────┴─ cold ──────┴─ that unit cold ─┴─ cold            └─ that unit cold
//! ```
//! Until `resume` nothing restored runs, and dropping it kills it.

mod cgroup;
pub mod cleanup;
mod fail;
mod ground;
mod host;
mod journey;
mod mountinfo;
mod restorer;
#[cfg(test)]
mod tests;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::utsname::uname;
use rcr_initramfs::EarlyConfig;
use rcr_pmem_store::region::DaxRegion;
use rcr_pmem_store::{Locator, Reader};
use rcr_systemd::handover::Report;

use crate::kmsg;
use crate::landmarks::Landmarks;
use fail::FailAt;
use host::Host;
use journey::Journey;

/// Most open files; the kernel's own upper bound (fs.nr_open) at boot.
const FILES_MAX: u64 = 1 << 20;

/// The worker's exit code when boot can go on without cleaning up.
const DONE: i32 = 0;

/// Restores what the locator of this boot tells of.
pub fn main(config: &EarlyConfig) -> i32 {
    let host = Host::default();
    kmsg::take_warnings();
    // A service may have more files open than a kernel's first process may.
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, FILES_MAX, FILES_MAX) {
        kmsg::warn(&format!("find: number of open files: {error}"));
    }
    if let Err(error) = ground::mount_base() {
        kmsg::warn(&format!("find: {error:#}"));
        return DONE;
    }
    match Locator::of_this_boot() {
        Ok(None) => kmsg::info("init: nothing was handed over to this boot"),
        Ok(Some(locator)) => carry(&host, config, &locator),
        Err(error) => {
            let reason = format!("find: {:#}", anyhow::Error::from(error));
            finish(&host, &Report::lost(&release(), &reason));
        }
    }
    DONE
}

fn carry(host: &Host, config: &EarlyConfig, locator: &Locator) {
    let fail_at = FailAt::parse(config.fail_at.as_deref());
    let mut journey = Journey::new(host, host, fail_at, release());
    journey.landmarks = Landmarks::of_this_boot();
    let found = journey.find(|| {
        let region = DaxRegion::open(locator)?;
        Ok(Reader::open(region, &locator.nonce)?)
    });
    let mut engine = restorer::Engine {
        cgroup_root: host.cgroup_root.clone(),
        lazy: !config.eager,
    };
    let report = match found {
        Ok(found) => journey.restore_all(found, &locator.nonce, &mut engine),
        Err(error) => Report::lost(&release(), &format!("{error:#}")),
    };
    finish(host, &report);
}

/// Leaves the report where systemd's side finds it, and says the outcome.
fn finish(host: &Host, report: &Report) {
    let because = if report.reason.is_empty() { "" } else { ": " };
    kmsg::info(&format!(
        "report: {}{because}{}",
        report.outcome.as_str(),
        report.reason
    ));
    if let Err(error) = report.write(&host.report_path()) {
        kmsg::warn(&format!("report: {:#}", anyhow::Error::from(error)));
    }
    crate::progress::Progress::remove(&host.run_dir);
}

fn release() -> String {
    uname().map_or_else(
        |_| String::new(),
        |u| u.release().to_string_lossy().into_owned(),
    )
}
