//! What crosses the jump beside images, what systemd says, and tags.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rcr_fuzz::text;
use rcr_systemd::handover::{AdoptionRecord, Manifest, Report};
use rcr_systemd::tags::{ServiceName, TagList};
use rcr_systemd::{fuzzing, unit::Unit};

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("handover"), |bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else {
        return;
    };
    let text = text(bytes);
    match which % 7 {
        0 => drop(Manifest::from_bytes(bytes)),
        1 => drop(serde_json::from_slice::<AdoptionRecord>(bytes)),
        2 => drop(serde_json::from_slice::<Report>(bytes)),
        3 => drop(Unit::parse("a.service", &text)),
        4 => fuzzing::mounts(&text),
        5 => drop(TagList::parse(&text)),
        _ => drop(ServiceName::parse(&text)),
    }
});
