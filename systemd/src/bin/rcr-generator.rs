//! systemd's generator: see `rcr_systemd::generator`.

use std::path::Path;
use std::process::ExitCode;

use rcr_systemd::generator;
use rcr_systemd::handover::{AdoptionRecord, EARLY_REPORT, RESTORED_DIR, Report};
use rcr_systemd::tags::{TAG_FILE, TagList};

fn main() -> ExitCode {
    // systemd.generator(7): normal, early and late directory; one for all when
    // called by hand.
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let Some(directory) = arguments.get(2).or(arguments.first()) else {
        eprintln!("rcr-generator: usage: rcr-generator NORMAL-DIR [EARLY-DIR LATE-DIR]");
        return ExitCode::from(2);
    };
    let mut complete = true;
    let mut told = |what: &str, error: &dyn std::error::Error| {
        let source = error.source().map(|s| format!(": {s}")).unwrap_or_default();
        eprintln!("rcr-generator: {what}: {error}{source}");
        complete = false;
    };
    // One unreadable source must not cost the others: an adoption that is not
    // arranged becomes a second copy of a running service.
    let records = AdoptionRecord::read_all_in(Path::new(RESTORED_DIR)).unwrap_or_else(|e| {
        told("adoption records", &e);
        Vec::new()
    });
    let tagged = TagList::load(Path::new(TAG_FILE)).unwrap_or_else(|e| {
        told(TAG_FILE, &e);
        TagList::default()
    });
    let reported = Report::read(Path::new(EARLY_REPORT)).unwrap_or_else(|e| {
        told("report of early boot", &e);
        None
    });
    let tagged: Vec<String> = tagged.units().iter().map(ToString::to_string).collect();
    let reported: Vec<String> = reported
        .map(|r| r.services.into_iter().map(|s| s.unit).collect())
        .unwrap_or_default();
    let outputs = generator::outputs(&records, &tagged, &reported);
    if let Err(e) = generator::write(Path::new(directory), &outputs) {
        told("output", &e);
    }
    if complete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
