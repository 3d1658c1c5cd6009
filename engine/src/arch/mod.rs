//! What depends on the processor.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("rcr carries x86-64 processes only so far");

mod x86_64;

pub use x86_64::*;
