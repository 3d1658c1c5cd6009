//! Loading the next kernel with a memory map of our own.
//!
//! ```text
//!  BzImage ─┐
//!  Machine ─┼─ Request ── Plan::new ── Plan ── load ── (reboot into it)
//!  cmdline ─┘             no system call        kexec_load(2)
//! ```
//! The map calls chosen ranges *soft reserved*, so that the next kernel keeps its
//! hands off them and offers them to user space as dax devices.

// Ranges of addresses are what this crate is about: a list of one is meant.
#![allow(clippy::single_range_in_vec_init)]

mod boot_params;
mod bzimage;
pub mod cmdline;
mod e820;
mod efi;
#[doc(hidden)]
pub mod fuzzing;
mod load;
mod machine;
mod place;
mod plan;
mod setup_data;
mod support;
mod sys;

pub use bzimage::{BzImage, ImageError};
pub use e820::{Entry, Kind};
pub use efi::Efi;
pub use load::{LoadError, is_loaded, load, unload};
pub use machine::{Machine, MachineError};
pub use plan::{Plan, PlanError, Request, Segment};
pub use support::{Unsupported, check};
