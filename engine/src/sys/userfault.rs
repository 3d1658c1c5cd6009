//! A userfaultfd that only remembers which pages were written to
//! (`UFFD_FEATURE_WP_ASYNC`, linux/userfaultfd.h, Linux 6.7): nobody has to
//! answer faults, and when it is closed nothing of it is left.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{SysError, SysResult};

/// `UFFD_USER_MODE_ONLY`: needs no privilege of the task that asks.
pub const USER_MODE_ONLY: i32 = 1;

const UFFD_API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

/// Watches an address space for writes.
#[derive(Debug)]
pub struct WriteWatch(OwnedFd);

impl WriteWatch {
    /// Takes over a new userfaultfd. `None`: this kernel cannot watch for
    /// writes without somebody who answers.
    pub fn new(fd: OwnedFd) -> SysResult<Option<Self>> {
        let mut api = [UFFD_API, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, 0];
        // SAFETY: the call reads and writes a uffdio_api of three words.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        match Errno::result(r) {
            Ok(_) => Ok(Some(Self(fd))),
            Err(Errno::EINVAL) => Ok(None),
            Err(e) => Err(SysError::new("ioctl(UFFDIO_API)", "userfaultfd", e)),
        }
    }

    /// Takes over one that was set up before.
    pub fn from_ready(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Watches a range of the address space it was made in. `false`: it
    /// cannot be watched, or is by somebody else, or is no longer there.
    pub fn add(&self, range: &Range<u64>) -> SysResult<bool> {
        let len = range.end - range.start;
        let mut arg = [range.start, len, REGISTER_MODE_WP, 0];
        // SAFETY: the call reads and writes a uffdio_register of four words.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, arg.as_mut_ptr()) };
        match Errno::result(r) {
            Ok(_) => Ok(true),
            Err(Errno::EBUSY | Errno::EINVAL | Errno::EPERM | Errno::ENOENT) => Ok(false),
            Err(e) => {
                let on = format!("{:x}-{:x}", range.start, range.end);
                Err(SysError::new("ioctl(UFFDIO_REGISTER)", on, e))
            }
        }
    }
}

impl AsFd for WriteWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
