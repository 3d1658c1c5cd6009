//! The programs, by area.

pub mod creds;
pub mod files;
pub mod memory;
pub mod namespaces;
pub mod process;
pub mod refusals;
pub mod seccomp;
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
    timers::CASES,
    process::CASES,
    creds::CASES,
    seccomp::CASES,
    namespaces::CASES,
    files::CASES,
    sockets::CASES,
    refusals::CASES,
];
