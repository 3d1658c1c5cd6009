//! The programs, by area.

pub mod files;
pub mod memory;
pub mod signals;
pub mod sockets;
pub mod threads;
pub mod timers;

use super::Case;

/// All of them.
pub const ALL: &[&[Case]] = &[
    memory::CASES,
    threads::CASES,
    signals::CASES,
    files::CASES,
    sockets::CASES,
    timers::CASES,
];
