//! dax devices as sysfs shows them (Documentation/ABI/testing/sysfs-bus-dax).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::region_error::{Context, RegionError};
use super::sysfs;
use crate::range::PhysRange;

const DEVICES_DIR: &str = "/sys/bus/dax/devices";
const DRIVERS_DIR: &str = "/sys/bus/dax/drivers";
/// The driver that offers `/dev/daxN.M`.
pub(super) const DEVICE_DRIVER: &str = "device_dax";
/// The driver that makes RAM of it.
pub(super) const RAM_DRIVER: &str = "kmem";

/// One dax device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DaxDevice {
    /// `dax0.0`.
    pub name: String,
    /// Its memory.
    pub range: PhysRange,
}

impl DaxDevice {
    /// All with memory.
    pub fn list() -> Result<Vec<DaxDevice>, RegionError> {
        let entries = match fs::read_dir(DEVICES_DIR) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.doing(|| format!("listing {DEVICES_DIR}"))?,
        };
        let mut devices = Vec::new();
        for entry in entries {
            let name = entry
                .doing(|| format!("listing {DEVICES_DIR}"))?
                .file_name();
            let name = name.to_string_lossy().into_owned();
            let dir = Path::new(DEVICES_DIR).join(&name);
            let len = sysfs::read_u64(&dir.join("size"))?;
            if len > 0 {
                let start = sysfs::read_hex(&dir.join("resource"))?;
                devices.push(DaxDevice {
                    name,
                    range: PhysRange { start, len },
                });
            }
        }
        Ok(devices)
    }

    /// The driver bound to it.
    pub fn driver(&self) -> Result<Option<String>, RegionError> {
        let link = self.dir().join("driver");
        match fs::read_link(&link) {
            Ok(target) => Ok(target
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).doing(|| format!("reading {}", link.display())),
        }
    }

    /// Binds `driver`, whose module must be loaded.
    pub fn bind(&self, driver: &str) -> Result<(), RegionError> {
        sysfs::write(&driver_file(driver, "new_id"), &self.name)
    }

    /// Unbinds `driver` and makes it forget the device.
    pub fn unbind(&self, driver: &str) -> Result<(), RegionError> {
        sysfs::write(&driver_file(driver, "unbind"), &self.name)?;
        // Only a device that was bound by new_id has an id to remove.
        match fs::write(driver_file(driver, "remove_id"), &self.name) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            Err(error) => Err(error).doing(|| format!("removing {} from {driver}", self.name)),
        }
    }

    /// Opens its node, making one where /dev has none yet.
    pub fn open(&self) -> Result<File, RegionError> {
        let mut node = Path::new("/dev").join(&self.name);
        if !node.exists() {
            let path = self.dir().join("dev");
            let text = sysfs::read(&path)?;
            let (major, minor) = text
                .split_once(':')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
                .ok_or_else(|| sysfs::unparsable(&path, text.clone()))?;
            fs::create_dir_all("/run/rcr").doing(|| "creating /run/rcr".to_owned())?;
            node = Path::new("/run/rcr").join(&self.name);
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            match mknod(&node, SFlag::S_IFCHR, mode, makedev(major, minor)) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(error).doing(|| format!("making {}", node.display())),
            }
        }
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&node)
            .doing(|| format!("opening {}", node.display()))
    }

    fn dir(&self) -> PathBuf {
        Path::new(DEVICES_DIR).join(&self.name)
    }
}

fn driver_file(driver: &str, name: &str) -> PathBuf {
    Path::new(DRIVERS_DIR).join(driver).join(name)
}

/// The device that holds all of `range`. The kernel may have joined neighbouring
/// ranges into one device.
pub(super) fn holder(devices: &[DaxDevice], range: PhysRange) -> Result<&DaxDevice, RegionError> {
    devices
        .iter()
        .find(|device| device.range.contains(&range))
        .ok_or(RegionError::NoDevice { range })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_in_a_device_that_joins_several() {
        let device = |name: &str, start, len| DaxDevice {
            name: name.into(),
            range: PhysRange { start, len },
        };
        let devices = [
            device("dax0.0", 0x1000, 0x3000),
            device("dax1.0", 0x9000, 0x1000),
        ];
        let name = |start, len| holder(&devices, PhysRange { start, len }).map(|d| d.name.as_str());
        assert_eq!(name(0x2000, 0x1000).unwrap(), "dax0.0");
        assert_eq!(name(0x9000, 0x1000).unwrap(), "dax1.0");
        assert!(name(0x3000, 0x2000).is_err());
        assert!(name(0x5000, 0x1000).is_err());
    }
}
