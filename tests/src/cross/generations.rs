//! Memory written while a tree runs, the rest on top of it; CRIU restores both.

use std::path::Path;

use anyhow::Result;

use super::direction::command;
use super::workload::Workload;
use super::{OURS, THEIRS};

/// Two generations and a dump by us, restored by `to`.
pub fn journey(workload: &Workload, to: &str, dir: &Path) -> Result<()> {
    let running = workload.start()?;
    let pid = running.pid().to_string();
    let steps = [
        ("1", "pre-dump", None),
        ("2", "pre-dump", Some("../1")),
        ("3", "dump", Some("../2")),
    ];
    for (name, what, before) in steps {
        let images = dir.join(name);
        std::fs::create_dir(&images)?;
        let mut more = vec!["--track-mem", "--tree", &pid];
        if let Some(before) = before {
            more.extend(["--prev-images-dir", before]);
        }
        command(OURS, &images, what, &more)?;
    }
    running.is_gone()?;
    command(to, &dir.join("3"), "restore", &["--restore-detached"])?;
    workload.goes_on(running.pid())
}

/// Who restores.
pub const RESTORERS: [(&str, &str); 2] = [("rcr", OURS), ("criu", THEIRS)];
