//! Remote programs: what a target does for us, as data.

mod program;

pub use program::{Arg, DataRef, OnError, Op, OpId, Outcome, Program};
