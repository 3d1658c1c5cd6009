//! `--manage-cgroups`: who decides where processes come back.
//!
//! A container engine puts the restoring program into the container's cgroup
//! and names that (`--cgroup-root`); what is restored stays in it.

use anyhow::{Context, bail};
use rcr_engine::{Process, Tree};

use super::Error;
use super::options::Options;

/// Whether cgroups are to be managed at all.
fn wanted(options: &Options) -> bool {
    let modes: Vec<String> = options.values("manage-cgroups").collect();
    options.has("manage-cgroups") && !modes.iter().any(|m| m == "ignore" || m == "none")
}

/// Refuses a tree that is not all in one cgroup, where cgroups are to be managed.
pub fn check(options: &Options, tree: &Tree) -> Result<(), Error> {
    if !wanted(options) {
        return Ok(());
    }
    let mut first: Option<(i32, String)> = None;
    for p in tree.scan().context("reading the process table")? {
        // One that ends meanwhile is in none.
        let Ok(text) = std::fs::read_to_string(format!("/proc/{}/cgroup", p.pid)) else {
            continue;
        };
        if p.is_zombie() {
            continue;
        }
        match &first {
            None => first = Some((p.pid, text)),
            Some((pid, known)) if *known != text && !is_ending(p.pid) => bail!(
                "{} (pid {}): cgroup: it is in another one than process {pid}, and all come \
                 back into one; option --manage-cgroups=ignore leaves them out",
                p.comm,
                p.pid
            ),
            Some(_) => {}
        }
    }
    Ok(())
}

/// Whether a process is about to end: it then shows no cgroups of version 1
/// any more. `PF_EXITING` of the flags in `proc_pid_stat(5)`.
fn is_ending(pid: i32) -> bool {
    const PF_EXITING: u32 = 4;
    match Process::read(pid) {
        Ok(Some(p)) => p.is_zombie() || p.flags & PF_EXITING != 0,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_and_the_dead() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        // Without being reaped.
        let id = nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(pid));
        let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(id, flags).unwrap();
        assert!(is_ending(pid));
        child.wait().unwrap();
        assert!(is_ending(pid));
        assert!(!is_ending(std::process::id() as i32));
    }
}
