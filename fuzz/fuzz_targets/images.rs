//! Containers, and every type of record in every kind of image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rcr_engine::fuzzing;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("images"), |bytes: &[u8]| {
    let &[kind, record, ref rest @ ..] = bytes else {
        return;
    };
    fuzzing::image(kind, record, rest);
    fuzzing::record(record, rest);
    fuzzing::rules(rest);
});
