//! The programs, by area.

pub mod memory;
pub mod signals;
pub mod threads;

use super::Case;

/// All of them.
pub const ALL: &[&[Case]] = &[memory::CASES, threads::CASES, signals::CASES];
