//! Whole dumps, as `rcr` reads them before it makes anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rcr_fuzz::Images;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("verify"), |bytes: &[u8]| {
    let images = Images::from_row(bytes);
    let _ = rcr_engine::restore::verify(&images);
});
