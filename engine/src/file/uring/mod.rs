//! Rings of io_uring(7), as long as no request is in flight.
//!
//! What a ring was made with, what is registered with it and whether requests
//! are in flight stands in no file of /proc: it is read from the kernel's own
//! structures ([`crate::sys::kernel`]). The memory that the ring shares with the
//! program is read and written through a mapping. But the kernel keeps numbers
//! of its own beside those in that memory, which begin at 0: they are brought to
//! where they were by as many requests that do nothing.

mod back;
mod forward;
mod record;
mod save;
mod settle;

pub use record::{RcrRingBuffer, RcrRingFile, RcrRingThread, RcrUring};
pub(crate) use save::{Rings, save};

/// Requests that can be made for the sake of the numbers.
const REQUESTS_MAX: u32 = 1 << 24;
