//! The PID allocator, lifted above what early boot uses.
//!
//! Kernel threads and the initramfs of the next kernel take low PIDs. Services
//! that start above [`FLOOR`] keep theirs without ever meeting them.

use std::{fs, io};

/// PIDs of services begin above this one.
pub const FLOOR: i32 = 100_000;

/// A PID below this one may be taken by early boot of the next kernel.
pub const LOW: i32 = 1_000;

/// `PID_MAX_LIMIT` of 64-bit kernels.
const PID_MAX: u64 = 4_194_304;

const PID_MAX_FILE: &str = "/proc/sys/kernel/pid_max";
const LAST_PID_FILE: &str = "/proc/sys/kernel/ns_last_pid";

/// Raises the allocator to [`FLOOR`] unless it is there already.
pub fn lift() -> io::Result<()> {
    if read(PID_MAX_FILE)? < PID_MAX {
        write(PID_MAX_FILE, PID_MAX)?;
    }
    if read(LAST_PID_FILE)? < FLOOR as u64 {
        write(LAST_PID_FILE, FLOOR as u64)?;
    }
    Ok(())
}

fn read(path: &str) -> io::Result<u64> {
    fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {e}")))
}

fn write(path: &str, value: u64) -> io::Result<()> {
    fs::write(path, value.to_string()).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))
}
