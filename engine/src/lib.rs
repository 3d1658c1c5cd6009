//! Checkpoint and restore of process trees.

pub mod image;
mod refusal;
pub mod remote;

pub use refusal::Refusal;
