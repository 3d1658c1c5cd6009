//! Dump and restore over the RPC, spoken by CRIU's own messages.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::workload::Workload;

const CLIENT: &str = include_str!("rpc.py");

/// There and back; each step by a client of its own.
pub fn journey(workload: &Workload, dir: &Path) -> Result<()> {
    let running = workload.start()?;
    client("dump", running.pid(), dir)?;
    running.is_gone()?;
    client("restore", running.pid(), dir)?;
    workload.goes_on(running.pid())
}

fn client(what: &str, pid: i32, dir: &Path) -> Result<()> {
    let out = Command::new("/usr/bin/python3")
        .args(["-c", CLIENT, what, &pid.to_string()])
        .arg(dir)
        .output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let log = std::fs::read_to_string(dir.join(format!("{what}.log")));
        bail!("{}\n{said}{}", out.status, log.unwrap_or_default());
    }
    Ok(())
}
