//! A store of named images in memory that outlives its kernel.
//!
//! ```text
//!  old kernel                                   new kernel
//!  HugeRegion ── Writer ── seal ─┐         ┌─ DaxRegion ── Reader ── verify ── mark_consumed
//!       └─────── Locator ────────┴─ kexec ─┴─────┘                                  │
//!                (in setup_data)                          release::give_back ───────┘
//! ```
//! The format ([`layout`], drawn in `FORMAT.md`) knows one slice of bytes; the
//! kinds of [`region`] make such a slice out of physical memory.

mod error;
mod hash;
pub mod layout;
mod locator;
mod range;
mod reader;
pub mod region;
mod writer;

pub use error::Error;
pub use layout::{Nonce, fresh_nonce};
pub use locator::{Locator, LocatorError, SETUP_DATA_TYPE};
pub use range::PhysRange;
pub use reader::Reader;
pub use region::Region;
pub use writer::{Rest, Writer, Written};
