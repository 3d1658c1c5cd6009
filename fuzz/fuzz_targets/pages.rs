//! Pagemaps with their pages, and images with content between their records.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rcr_engine::fuzzing;
use rcr_fuzz::Images;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("pages"), |bytes: &[u8]| {
    let images = Images::from_row(bytes);
    fuzzing::pages(&images);
    fuzzing::contents(&images);
});
