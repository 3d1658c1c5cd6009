//! Text files of /proc.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("proc"), |bytes: &[u8]| {
    if let Some((&which, rest)) = bytes.split_first() {
        rcr_engine::fuzzing::proc(which, rest);
    }
});
