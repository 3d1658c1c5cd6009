//! Remote programs: what a target does for us, as data.
//!
//! ```text
//! Program (ops + data) ── Tracee::run ──► table in the target's Arena
//!                                          │ interpreter, one syscall an entry
//! Outcome (results + data) ◄───────────────┘ int3
//! ```

mod footpath;
mod program;
mod saved;
#[cfg(test)]
mod tests;
mod tracee;

pub use footpath::{Footpath, left_behind};
pub use program::{Arg, DataRef, OnError, Op, OpId, Outcome, Program};
pub use saved::SavedRegs;
pub(crate) use tracee::Halt;
pub use tracee::{Arena, Births, RemoteError, Tracee, find_syscall};
