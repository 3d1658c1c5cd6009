//! Small services for the tests: each holds one kernel object and waits.
//! `rcr-workload KIND`.

use std::io::{Error, Result};
use std::os::fd::{FromRawFd, OwnedFd};

/// More than half of a test machine's memory: no room for an image of it.
const BALLAST_BYTES: usize = 2300 << 20;

fn main() -> Result<()> {
    let kind = std::env::args().nth(1).unwrap_or_default();
    let mut ballast = Vec::new();
    let _held = match kind.as_str() {
        "plain" => None,
        "ballast" => {
            ballast.resize(BALLAST_BYTES, 1_u8);
            None
        }
        "polled-ring" => Some(polled_ring()?),
        "userfaultfd" => Some(userfaultfd()?),
        _ => {
            eprintln!("usage: rcr-workload plain|ballast|polled-ring|userfaultfd");
            std::process::exit(2);
        }
    };
    loop {
        nix::unistd::pause();
    }
}

/// An io_uring instance of eight entries that a thread of the kernel polls.
fn polled_ring() -> Result<OwnedFd> {
    const IORING_SETUP_SQPOLL: u8 = 1 << 1;
    // struct io_uring_params of linux/io_uring.h: 120 bytes, all but the flags
    // (the third word) may be zero on entry.
    let mut parameters = [0_u8; 120];
    parameters[8] = IORING_SETUP_SQPOLL;
    // SAFETY: the buffer has the size of io_uring_params and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) };
    owned(fd)
}

fn userfaultfd() -> Result<OwnedFd> {
    // SAFETY: the call takes flags and no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    owned(fd)
}

fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    let fd = match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => fd,
        _ => return Err(Error::last_os_error()),
    };
    // SAFETY: the kernel has just returned this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
