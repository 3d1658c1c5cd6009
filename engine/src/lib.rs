//! Checkpoint and restore of process trees.

mod arch;
pub mod clock;
pub mod content;
pub mod dump;
pub mod ext;
pub mod file;
pub mod freeze;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod memory;
pub mod namespace;
pub mod predump;
mod refusal;
pub mod remote;
pub mod restore;
pub mod stdio;
pub mod sys;
pub mod task;
mod tree;

mod socket;

pub use refusal::Refusal;
pub use socket::peer::{Becomes, OutsidePeer};
pub use tree::{Process, Tree};
