//! vDSO images.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("vdso"), |bytes: &[u8]| rcr_engine::fuzzing::vdso(bytes));
