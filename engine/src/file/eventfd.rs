//! eventfd(2).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{read, write};

use super::error::{BuildError, Stop};
use super::examined::{Examined, Saved};
use super::record::RcrFile;
use super::sys;
use crate::image::schema::{EventfdFileEntry, FdTypes};
use crate::sys::SysError;

/// Saves count and mode.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let counter = file
        .info
        .eventfd_count
        .ok_or_else(|| SysError::new("fdinfo", "eventfd-count", nix::errno::Errno::ENODATA))?;
    let semaphore = match file.info.eventfd_semaphore {
        Some(s) => s,
        // A running service is not to be disturbed.
        None if !file.policy.payload => false,
        None => probe_semaphore(file.fd, counter)?,
    };
    saved.extra.semaphore = Some(semaphore);
    saved.entry.r#type = FdTypes::Eventfd.into();
    let flags = file.flags();
    saved.entry.efd = Some(EventfdFileEntry {
        id: saved.entry.id,
        flags,
        fown: file.fown()?,
        counter,
    });
    Ok(())
}

/// Kernels before 6.5 do not show the mode: find out by taking from the count,
/// which is then as it was. The holders are frozen.
fn probe_semaphore(fd: BorrowedFd<'_>, counter: u64) -> Result<bool, SysError> {
    let nonblocking = sys::status_flags(fd)?;
    sys::set_status_flags(fd, nonblocking | libc::O_NONBLOCK)?;
    let probed = (|| {
        if counter < 2 {
            add(fd, 2 - counter)?;
        }
        let semaphore = take(fd)? == 1;
        let left = if semaphore { counter.max(2) - 1 } else { 0 };
        // Put back, or take away, what differs.
        if left < counter {
            add(fd, counter - left)?;
        } else if left > counter {
            take(fd)?;
        }
        Ok(semaphore)
    })();
    sys::set_status_flags(fd, nonblocking)?;
    probed
}

fn add(fd: BorrowedFd<'_>, n: u64) -> Result<(), SysError> {
    write(fd, &n.to_ne_bytes())
        .map(drop)
        .map_err(|e| SysError::new("write", "eventfd", e))
}

fn take(fd: BorrowedFd<'_>) -> Result<u64, SysError> {
    let mut n = [0; 8];
    read(fd, &mut n).map_err(|e| SysError::new("read", "eventfd", e))?;
    Ok(u64::from_ne_bytes(n))
}

/// Makes it again.
pub(crate) fn restore(
    efd: &EventfdFileEntry,
    extra: Option<&RcrFile>,
) -> Result<OwnedFd, BuildError> {
    let semaphore = extra.and_then(|e| e.semaphore).unwrap_or(false);
    let mode = if semaphore {
        EfdFlags::EFD_SEMAPHORE
    } else {
        EfdFlags::empty()
    };
    let fd: OwnedFd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | mode)
        .map_err(|e| SysError::new("eventfd2", efd.counter, e))?
        .into();
    if efd.counter > 0 {
        add(fd.as_fd(), efd.counter)?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_leaves_the_count() {
        for semaphore in [false, true] {
            for count in [0, 1, 2, 7, u64::MAX - 1] {
                let efd = EventfdFileEntry {
                    counter: count,
                    ..EventfdFileEntry::default()
                };
                let extra = RcrFile {
                    semaphore: Some(semaphore),
                    ..RcrFile::default()
                };
                let fd = restore(&efd, Some(&extra)).unwrap();
                assert_eq!(probe_semaphore(fd.as_fd(), count).unwrap(), semaphore);
                let info = std::fs::read_to_string(format!(
                    "/proc/self/fdinfo/{}",
                    std::os::fd::AsRawFd::as_raw_fd(&fd)
                ));
                let info = crate::file::fdinfo::FdInfo::parse(&info.unwrap()).unwrap();
                assert_eq!(info.eventfd_count, Some(count), "{semaphore} {count}");
            }
        }
    }
}
