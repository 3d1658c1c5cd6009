//! Benchmarks of checkpoint and restore, side by side with a peer.
//!
//! ```text
//!  rcr-bench run ── spawns ──> rcr-bench load KIND   (a tree that waits)
//!       │
//!       ├─ times `dump`, looks that the tree is gone
//!       ├─ times `restore`, looks that it is back as it was
//!       └─ ends it; the other tool's turn
//! ```
//! Both tools take turns in one run on one machine, so what disturbs one
//! disturbs the other as well. A row is a pair of medians and their ratio.

pub mod contest;
pub mod load;
pub mod store;
pub mod sys;
pub mod tool;
pub mod tree;

pub use crate::row::{self, Row};
