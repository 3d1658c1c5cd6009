//! Conformance: one small program per kernel object, checked after dump and
//! restore against what it knew before.
//!
//! ```text
//!  runner ── spawns ──> program: setup, "ready", waits
//!     │                                 ▲
//!     ├─ observes /proc of the tree     │
//!     ├─ dump (own process), reaps ─────┤
//!     ├─ restore (own process) ─────────┤
//!     ├─ observes /proc again, compares │
//!     └─ "go" ──────────────────────────┴──> program checks itself: result
//! ```
//! A program and the runner talk through files of the program's directory
//! ([`stage`]): no descriptor leads out of the tree. Every program goes through
//! several modes ([`report::Mode`]), in a worker that has process ids, mounts,
//! System V objects and a network of its own.

pub mod case;
pub mod findings;
pub mod forge;
pub mod host;
pub mod member;
pub mod mutate;
pub mod observe;
pub mod programs;
pub mod report;
pub mod runner;
pub mod stage;
pub mod steps;
pub mod support;
pub mod sys;

pub use case::{Case, Check, Fate, Setup, Unavailable};
pub use findings::Findings;
pub use member::Member;
pub use stage::Stage;
