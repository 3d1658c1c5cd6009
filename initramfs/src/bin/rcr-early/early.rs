//! The first hook: what must happen before udev and most processes exist.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rcr_initramfs::EarlyConfig;
use rcr_initramfs::config::OVERLAY_DIR;
use rcr_pmem_store::Locator;
use rcr_pmem_store::region::DaxRegion;

use crate::{boot, kmsg, landmarks, sys};

/// How long the store's device may take to appear once its modules are loaded.
const DEVICE_WAIT: Duration = Duration::from_secs(5);

/// Numbers processes, loads the overlay's modules and binds the store's device.
///
/// Every step is tried whatever became of the one before: each is of use alone.
pub fn run() -> anyhow::Result<()> {
    let locator = Locator::of_this_boot();
    if matches!(locator, Ok(None)) && !boot::is_named_by_cmdline() {
        return Ok(());
    }
    if let Err(error) = landmarks::note() {
        kmsg::warn(&format!("early: noting the time: {error}"));
    }
    let config = boot::overlay_config()?;
    raise_pids(&config);
    load_modules(&config);
    match locator {
        Ok(Some(locator)) => bind_device(&locator),
        Ok(None) => {
            kmsg::info("early: nothing was handed over to this boot");
            Ok(())
        }
        Err(error) => Err(anyhow::Error::from(error).context("the hand-over's locator")),
    }
}

/// Lifts the numbers of everything that starts from now on above the preserved
/// ones of restored processes.
fn raise_pids(config: &EarlyConfig) {
    // The order matters: without the maximum, the kernel would wrap around.
    for (name, value) in [("pid_max", 4_194_304), ("ns_last_pid", config.pid_base)] {
        let path = Path::new("/proc/sys/kernel").join(name);
        match fs::write(&path, value.to_string()) {
            Ok(()) => kmsg::info(&format!("early: {name}={value}")),
            Err(error) => kmsg::warn(&format!("early: {}: {error}", path.display())),
        }
    }
}

fn load_modules(config: &EarlyConfig) {
    for module in &config.modules {
        let path = Path::new(OVERLAY_DIR).join("modules").join(&module.file);
        let loaded = fs::read(&path).and_then(|bytes| sys::load_module(&bytes, &module.options));
        match loaded {
            Ok(()) => kmsg::info(&format!("early: module {}", module.name)),
            Err(error) => kmsg::warn(&format!("early: module {}: {error}", module.name)),
        }
    }
}

/// Opens the store once so that its device gets the driver that leaves it as it
/// is, before udev could load the one that makes RAM of it.
fn bind_device(locator: &Locator) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        match DaxRegion::open(locator) {
            Ok(_) => break,
            Err(error) if started.elapsed() >= DEVICE_WAIT => {
                return Err(error).context("the handed-over memory");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    kmsg::info(&format!(
        "early: {} MiB of memory found",
        locator.total_bytes() >> 20
    ));
    Ok(())
}
