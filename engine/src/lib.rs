//! Checkpoint and restore of process trees.

pub mod content;
mod arch;
pub mod clock;
pub mod ext;
pub mod freeze;
pub mod memory;
pub mod sys;
pub mod task;
mod tree;
pub mod image;
pub mod namespace;
mod refusal;
pub mod remote;

pub use refusal::Refusal;
pub use tree::{Process, Tree};
