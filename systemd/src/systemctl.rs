//! Calls of `systemctl`, the one interface to systemd that every release keeps.

use std::io;
use std::process::Command;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum SystemctlError {
    /// The program could not be run.
    #[error("systemctl could not be run")]
    Run(#[source] io::Error),
    /// It ran and said no.
    #[error("`systemctl {arguments}` failed: {message}")]
    Failed {
        /// What it was called with.
        arguments: String,
        /// What it wrote to standard error.
        message: String,
    },
}

/// Runs `systemctl` and returns what it wrote to standard output.
pub fn run(arguments: &[&str]) -> Result<String, SystemctlError> {
    let output = Command::new("systemctl")
        .args(arguments)
        .env("LC_ALL", "C")
        .env("SYSTEMD_COLORS", "0")
        .env("SYSTEMD_PAGER", "")
        .output()
        .map_err(SystemctlError::Run)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let message = if message.is_empty() {
            output.status.to_string()
        } else {
            message
        };
        return Err(SystemctlError::Failed {
            arguments: arguments.join(" "),
            message,
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Has systemd read its unit files and run its generators anew.
pub fn daemon_reload() -> Result<(), SystemctlError> {
    run(&["daemon-reload"]).map(drop)
}

/// Whether the transition into a kexec'd kernel is under way.
pub fn kexec_is_pending() -> Result<bool, SystemctlError> {
    // `Job=` is the number of the unit's job, and is left out or 0 without one.
    let shown = run(&["show", "--property=Job", "--value", "kexec.target"])?;
    Ok(!matches!(shown.trim(), "" | "0"))
}

/// Starts the transition into the loaded kernel and returns at once: what
/// `systemctl kexec` does after it has loaded a kernel. No later job can
/// replace it.
pub fn enqueue_kexec() -> Result<(), SystemctlError> {
    run(&[
        "start",
        "--no-block",
        "--job-mode=replace-irreversibly",
        "kexec.target",
    ])
    .map(drop)
}

/// Queues a restart and returns at once.
pub fn enqueue_restart(unit: &str) -> Result<(), SystemctlError> {
    run(&["restart", "--no-block", "--", unit]).map(drop)
}
