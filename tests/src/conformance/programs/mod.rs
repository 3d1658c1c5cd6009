//! The programs, by area.

pub mod memory;

use super::Case;

/// All of them.
pub const ALL: &[&[Case]] = &[memory::CASES];
