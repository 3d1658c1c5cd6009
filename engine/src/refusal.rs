//! What cannot be carried, said so that an admin can act on it.

use std::fmt;

/// One thing that stands in the way of a checkpoint.
///
/// Reads as `nginx (pid 812): fd 7 is an io_uring ring: not carried yet; untag the unit`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// Process id, as the host sees it.
    pub pid: i32,
    /// The process's name (`comm`).
    pub comm: String,
    /// The object: `fd 7 (io_uring)`, `mapping 7f00…-7f01… (/memfd:x)`, `user namespace`.
    pub object: String,
    /// Why it cannot be carried.
    pub reason: String,
    /// What the admin can do.
    pub advice: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (pid {}): {}: {}; {}",
            self.comm, self.pid, self.object, self.reason, self.advice
        )
    }
}
