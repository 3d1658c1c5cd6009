//! What the kernel keeps for a process and for each of its threads.
//!
//! Every file saves one kind of state and restores it: the saving half takes
//! what stands outside (`/proc`, ptrace) or adds queries to a remote program;
//! the restoring half adds calls to one.

pub mod creds;
pub mod knobs;
pub mod limits;
pub mod nap;
pub mod registers;
pub mod sched;
pub mod seccomp;
pub mod settle;
pub mod signals;
pub mod status;
pub mod timers;

use crate::sys::text;

/// The nice value in `/proc/PID/autogroup`; the file is absent where the
/// kernel groups nothing.
pub fn autogroup_nice(pid: i32) -> Option<i32> {
    let text = text::read_string(format!("/proc/{pid}/autogroup")).ok()?;
    text.rsplit(' ').next()?.trim().parse().ok()
}
