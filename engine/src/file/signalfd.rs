//! signalfd(2).

use std::os::fd::OwnedFd;

use super::error::{BuildError, Stop};
use super::examined::{Examined, Saved};
use super::sys;
use crate::image::schema::{FdTypes, SignalfdEntry};
use crate::sys::SysError;

/// Saves the mask.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let sigmask = file
        .info
        .sigmask
        .ok_or_else(|| SysError::new("fdinfo", "sigmask", nix::errno::Errno::ENODATA))?;
    saved.entry.r#type = FdTypes::Signalfd.into();
    let flags = file.flags();
    saved.entry.sgfd = Some(SignalfdEntry {
        id: saved.entry.id,
        flags,
        fown: file.fown()?,
        sigmask,
    });
    Ok(())
}

/// Makes it again. Whose signals it shows depends on the reader, not on us.
pub(crate) fn restore(sgfd: &SignalfdEntry) -> Result<OwnedFd, BuildError> {
    Ok(sys::signalfd(sgfd.sigmask)?)
}
