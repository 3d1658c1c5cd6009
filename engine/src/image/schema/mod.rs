//! The messages inside images: CRIU's protobuf schema as prost structs.
//!
//! Field numbers, names and types are those of CRIU's `images/*.proto`, which
//! its authors license under the MIT licence (Copyright (c) 2020 The CRIU
//! developers), unlike the rest of that project. The schema is proto2:
//! `required` fields are plain, `optional` ones are [`Option`], repeated numbers
//! are not packed. Unknown fields (other architectures' registers among them)
//! are skipped on reading.
//!
//! What we need beyond that schema lives in images of our own.

mod core;
mod files;
mod fsnotify;
mod inventory;
mod misc;
mod mm;
mod ns;
mod sockets;
mod timers;
mod tty;
mod x86;

pub use core::*;
pub use files::*;
pub use fsnotify::*;
pub use inventory::*;
pub use misc::*;
pub use mm::*;
pub use ns::*;
pub use sockets::*;
pub use timers::*;
pub use tty::*;
pub use x86::*;
