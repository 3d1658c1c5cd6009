//! What comes over netlink: socket diagnosis, devices, routes, packet filters.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("netlink"), |bytes: &[u8]| rcr_engine::fuzzing::netlink(bytes));
