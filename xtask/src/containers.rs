//! Containers of Debian's engines, checkpointed and restored through our front.

use anyhow::Result;

use crate::artifacts;
use crate::host::{as_root, install, run};

/// What the tests use: programs and the packages they come from.
const PROGRAMS: [(&str, &str); 3] = [
    ("runc", "runc"),
    ("podman", "podman"),
    ("busybox", "busybox-static"),
];

/// Runs the tests; `only` is a part of their names.
///
/// # Errors
/// When something cannot be made or run, or a test fails.
pub fn test(only: Option<&str>) -> Result<()> {
    install(&PROGRAMS)?;
    let rcr = artifacts::build("rcr-cli", &["rcr"])?.remove(0);
    let mut command = as_root("env");
    command.arg(artifacts::build_with(
        "rcr-tests",
        "conformance",
        "rcr-containers",
    )?);
    command.arg("--rcr").arg(rcr);
    if let Some(only) = only {
        command.args(["--only", only]);
    }
    run(&mut command)
}
