//! Remote programs: what a target does for us, as data.
//!
//! ```text
//! Program (ops + data) ── Tracee::run ──► table in the target's Arena
//!                                          │ interpreter, one syscall an entry
//! Outcome (results + data) ◄───────────────┘ int3
//! ```

mod program;
#[cfg(test)]
mod tests;
mod tracee;

pub use program::{Arg, DataRef, OnError, Op, OpId, Outcome, Program};
pub use tracee::{Arena, Births, RemoteError, SavedRegs, Tracee, find_syscall};
