//! The new kernel's side: the old kernel's frames, soft reserved, through devdax.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use super::dax_device::{DEVICE_DRIVER, DaxDevice, holder};
use super::mapping::Mapping;
use super::region_error::{Context, RegionError};
use super::{Region, order_memory_writes};
use crate::locator::Locator;

/// The region that a locator tells of.
#[derive(Debug)]
pub struct DaxRegion {
    mapping: Mapping,
}

impl DaxRegion {
    /// Maps all ranges as one slice in the locator's order.
    ///
    /// The modules dax_hmem and device_dax have to be loaded, and kmem must not
    /// be. A device without a driver (as newer kernels leave it) is bound.
    ///
    /// # Errors
    /// [`RegionError::NoDevice`], [`RegionError::Taken`] or what the system says.
    pub fn open(locator: &Locator) -> Result<DaxRegion, RegionError> {
        let devices = DaxDevice::list()?;
        let mut mapping = Mapping::reserve(locator.total_bytes() as usize)
            .doing(|| "reserving address space".to_owned())?;
        for &range in &locator.ranges {
            let device = holder(&devices, range)?;
            match device.driver()?.as_deref() {
                Some(DEVICE_DRIVER) => {}
                Some(driver) => {
                    let (device, driver) = (device.name.clone(), driver.to_owned());
                    return Err(RegionError::Taken { device, driver });
                }
                None => device.bind(DEVICE_DRIVER)?,
            }
            let file = device.open()?;
            mapping
                .append(
                    file.as_fd(),
                    range.start - device.range.start,
                    range.len as usize,
                )
                .doing(|| format!("mapping {range} of {}", device.name))?;
        }
        Ok(DaxRegion { mapping })
    }
}

impl Region for DaxRegion {
    fn bytes(&self) -> &[u8] {
        self.mapping.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.mapping.bytes_mut()
    }

    fn sync(&mut self, _range: Range<usize>) -> io::Result<()> {
        order_memory_writes();
        Ok(())
    }
}
