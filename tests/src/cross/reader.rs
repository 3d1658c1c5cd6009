//! crit reads our images.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Runs crit once for each line of its input, in one interpreter: starting one
/// for every image would take longer than everything else together.
const MANY: &str = "
import sys
from crit.__main__ import main
for line in sys.argv[1].splitlines():
    print('crit', line, file=sys.stderr, flush=True)
    sys.argv = ['crit'] + line.split(' ')
    main()
";

/// Images with bytes alone, and those that only we read.
fn is_ours_alone(name: &str) -> bool {
    name.starts_with("pages-") || name.starts_with("rcr-")
}

/// Shows every image and every view of a dump.
pub fn read_all(dir: &Path) -> Result<()> {
    let shown = dir.display();
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let image = name.ends_with(".img") || name.starts_with("stats-");
        if image && !is_ours_alone(&name) {
            lines.push(format!("show {shown}/{name}"));
            lines.push(format!("decode -i {shown}/{name} -o /tmp/decoded"));
        }
    }
    if lines.len() < 16 {
        bail!("only {} images in {shown}", lines.len() / 2);
    }
    for view in ["ps", "fds", "mems", "rss"] {
        lines.push(format!("x {shown} {view}"));
    }
    let out = Command::new("/usr/bin/python3")
        .args(["-c", MANY, &lines.join("\n")])
        .output()
        .context("python3")?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let said: Vec<&str> = said.lines().collect();
        let tail = said[said.len().saturating_sub(12)..].join("\n");
        bail!("{}\n{tail}", out.status);
    }
    Ok(())
}
