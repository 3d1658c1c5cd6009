//! Giving a region back as RAM once nothing of it is needed any more.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::dax_device::{DEVICE_DRIVER, DaxDevice, RAM_DRIVER, holder};
use super::hotplug;
use super::region_error::{Context, RegionError};
use super::sysfs;
use crate::locator::Locator;
use crate::range::PhysRange;

/// For a service's memory to come out of a region.
const MAPPED_PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks.
const MAPPED_POLL: Duration = Duration::from_millis(100);

/// What came of giving a region back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// Bytes of the region that are RAM now.
    pub bytes: u64,
    /// The kernel's MemTotal before, in bytes.
    pub mem_total_before: u64,
    /// The kernel's MemTotal now, in bytes.
    pub mem_total_after: u64,
}

/// Makes RAM of every device that holds a range of the locator.
///
/// Waits until nobody has the devices mapped: a service's memory may still be
/// coming out of them. Loads the module kmem, which must not be
/// loaded earlier: it would take soft-reserved memory at once. Calling it again
/// is harmless.
///
/// # Errors
/// [`RegionError::NoDevice`], [`RegionError::NotOnline`], [`RegionError::Mapped`]
/// after ten minutes, or what the system says;
/// what was given back until then stays RAM.
pub fn give_back(locator: &Locator) -> Result<Released, RegionError> {
    let mem_total_before = sysfs::meminfo("MemTotal")?;
    let devices = DaxDevice::list()?;
    let mut holders: Vec<&DaxDevice> = Vec::new();
    for &range in &locator.ranges {
        let device = holder(&devices, range)?;
        if !holders.contains(&device) {
            holders.push(device);
        }
    }
    wait_until_unmapped(&holders)?;
    load_ram_driver()?;
    for device in holders {
        make_ram(device)?;
    }
    let total = locator.total_bytes();
    let mut online = 0;
    for &range in &locator.ranges {
        for start in blocks_of(range, hotplug::block_bytes()?) {
            if !hotplug::is_online(start)? {
                bring_online(start)?;
            }
            if hotplug::is_online(start)? {
                online += hotplug::block_bytes()?;
            }
        }
    }
    if online < total {
        let missing_mib = (total - online) >> 20;
        return Err(RegionError::NotOnline {
            missing_mib,
            total_mib: total >> 20,
        });
    }
    let mem_total_after = sysfs::meminfo("MemTotal")?;
    Ok(Released {
        bytes: total,
        mem_total_before,
        mem_total_after,
    })
}

fn wait_until_unmapped(devices: &[&DaxDevice]) -> Result<(), RegionError> {
    // Wherever its file system is mounted by now.
    let paths: Vec<String> = devices.iter().map(|d| format!("/{}", d.name)).collect();
    let end = Instant::now() + MAPPED_PATIENCE;
    while let Some(pid) = mapped_by(&paths)? {
        if Instant::now() > end {
            return Err(RegionError::Mapped { pid });
        }
        std::thread::sleep(MAPPED_POLL);
    }
    Ok(())
}

/// A process that has one of the files mapped.
fn mapped_by(paths: &[String]) -> Result<Option<i32>, RegionError> {
    for entry in fs::read_dir("/proc").doing(|| "reading /proc".to_owned())? {
        let name = entry.doing(|| "reading /proc".to_owned())?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/maps")) else {
            continue;
        };
        let mapped = |line: &str| paths.iter().any(|p| line.ends_with(p.as_str()));
        if maps.lines().any(mapped) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

fn make_ram(device: &DaxDevice) -> Result<(), RegionError> {
    match device.driver()?.as_deref() {
        Some(RAM_DRIVER) => return Ok(()),
        Some(DEVICE_DRIVER) => device.unbind(DEVICE_DRIVER)?,
        Some(driver) => {
            let (device, driver) = (device.name.clone(), driver.to_owned());
            return Err(RegionError::Taken { device, driver });
        }
        None => {}
    }
    device.bind(RAM_DRIVER)
}

/// Older kernels leave the blocks offline.
fn bring_online(start: u64) -> Result<(), RegionError> {
    // Movable memory is what the next upgrade can empty again.
    hotplug::bring_online(start, "online_movable")
        .or_else(|_| hotplug::bring_online(start, "online"))
}

fn load_ram_driver() -> Result<(), RegionError> {
    if Path::new("/sys/bus/dax/drivers").join(RAM_DRIVER).exists() {
        return Ok(());
    }
    let doing = || format!("loading the module {RAM_DRIVER}");
    let status = Command::new("modprobe")
        .args(["--", RAM_DRIVER])
        .status()
        .doing(doing)?;
    match status.success() {
        true => Ok(()),
        false => Err(std::io::Error::other(format!("modprobe: {status}"))).doing(doing),
    }
}

/// Start addresses of the memory blocks that lie wholly in a range.
fn blocks_of(range: PhysRange, block_len: u64) -> impl Iterator<Item = u64> {
    let first = range.start.next_multiple_of(block_len);
    (first..range.end())
        .step_by(block_len as usize)
        .take_while(move |s| s + block_len <= range.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_of_a_range_can_be_ram() {
        let blocks = |start, len| blocks_of(PhysRange { start, len }, 128).collect::<Vec<_>>();
        assert_eq!(blocks(256, 256), [256, 384]);
        assert_eq!(blocks(200, 256), [256]);
        assert!(blocks(200, 100).is_empty());
    }
}
