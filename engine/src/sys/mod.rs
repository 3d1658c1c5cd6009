//! System calls that no crate wraps, with typed edges.
//!
//! Callers see owned descriptors, slices and [`Result`]s whose error names the
//! call. The raw calls and their `unsafe` stay in this folder.

pub mod guard;
pub mod keeper;
pub mod kernel;
pub mod map;
pub mod mqueue;
pub mod pagemap;
pub mod paging;
pub mod parallel;
pub mod process;
pub mod ptrace;
pub mod shm;
pub mod sysv;
pub mod text;
pub mod timens;
pub mod userfault;

use nix::errno::Errno;

/// A failed system call: which one, on what, and the errno.
#[derive(Debug, thiserror::Error)]
#[error("{call} ({on}): {errno}")]
pub struct SysError {
    /// Name of the call.
    pub call: &'static str,
    /// What it was applied to ("task 812", a path).
    pub on: String,
    /// The kernel's answer.
    #[source]
    pub errno: Errno,
}

impl SysError {
    /// Builds the error for `call` on `on`.
    pub fn new(call: &'static str, on: impl ToString, errno: Errno) -> Self {
        Self {
            call,
            on: on.to_string(),
            errno,
        }
    }

    /// Builds the error from the calling thread's `errno`.
    pub fn last(call: &'static str, on: impl ToString) -> Self {
        Self::new(call, on, Errno::last())
    }
}

/// Result of a raw call.
pub type SysResult<T> = Result<T, SysError>;
