//! Calls of `systemctl`, the one interface to systemd that every release keeps.

use std::collections::HashMap;
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

/// What `systemctl show` says of one unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shown(HashMap<String, String>);

impl Shown {
    /// A property's value; empty where there is none.
    pub fn value(&self, property: &str) -> String {
        self.0.get(property).cloned().unwrap_or_default()
    }

    /// A property that is a list.
    pub fn words(&self, property: &str) -> Vec<String> {
        split_words(&self.value(property))
    }

    /// The answers for several units: blocks with an empty line between them.
    pub(crate) fn parse_all(text: &str) -> Vec<Self> {
        text.split("\n\n")
            .map(|block| {
                let pairs = block.lines().filter_map(|line| line.split_once('='));
                Shown(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
            })
            .filter(|shown| !shown.0.is_empty())
            .collect()
    }
}

/// Asks for properties of units.
pub fn show(units: &[&str], properties: &[&str]) -> Result<Vec<Shown>, SystemctlError> {
    if units.is_empty() {
        return Ok(Vec::new());
    }
    let properties = format!("--property={}", properties.join(","));
    let arguments = [&["show", &properties, "--"], units].concat();
    Ok(Shown::parse_all(&run(&arguments)?))
}

/// Splits a list as systemd prints it: words with a backslash or a space in them
/// are quoted, and escaped as in C.
fn split_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut any) = (false, false);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => (quoted, any) = (!quoted, true),
            '\\' if quoted => word.extend(chars.next()),
            c if c.is_whitespace() && !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            c => word.push(c),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
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

/// Takes all jobs back, a transition's too. What has been stopped stays so.
pub fn cancel_all() -> Result<(), SystemctlError> {
    run(&["cancel"]).map(drop)
}

/// Stops units their ordinary way and waits.
pub fn stop(units: &[&str]) -> Result<(), SystemctlError> {
    run(&[&["stop", "--"], units].concat()).map(drop)
}

/// Queues a restart and returns at once.
pub fn enqueue_restart(unit: &str) -> Result<(), SystemctlError> {
    run(&["restart", "--no-block", "--", unit]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_split_as_systemd_quotes_them() {
        assert_eq!(
            split_words("a.service \"system-x\\\\x2dy.slice\"  b"),
            ["a.service", "system-x\\x2dy.slice", "b"]
        );
        assert!(split_words(" ").is_empty());
    }

    #[test]
    fn several_units_are_told_apart() {
        let all = Shown::parse_all("Id=a\nSlice=x=y\n\nId=b\n");
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[0].value("Slice"), all[1].value("Id")),
            ("x=y".into(), "b".into())
        );
    }
}
