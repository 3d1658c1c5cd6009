//! The processes below a worker, from the outside.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rcr_engine::Tree;

use crate::conformance::stage::POLL;

/// A killed process that takes longer to end hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the processes of a tree wait for.
pub(super) fn states(tree: &Tree) -> String {
    let processes = tree.scan().unwrap_or_default();
    let one = |p: &rcr_engine::Process| {
        let wchan = fs::read_to_string(format!("/proc/{}/syscall", p.pid)).unwrap_or_default();
        format!("{} {} ({})", p.pid, p.state, wchan.trim())
    };
    processes.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The exit status of a child that has ended.
pub(super) fn reap_if_ended(pid: i32) -> Result<Option<WaitStatus>> {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => Ok(None),
        Ok(status) => Ok(Some(status)),
        Err(e) => Err(e).context("the program is not our child"),
    }
}

/// Takes the exit status of every child that has ended or is about to: the
/// whole tree was killed. `others` live on.
pub(super) fn reap_all(others: &[i32]) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let me = std::process::id() as i32;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {
                let all = Tree::Root(me).scan()?;
                if all.iter().all(|p| p.pid == me || others.contains(&p.pid)) {
                    return Ok(());
                }
                if Instant::now() > end {
                    bail!("a killed process does not end");
                }
                std::thread::sleep(POLL);
            }
            Ok(_) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Ends every process below this one. Only our own descendants are touched.
pub(super) fn kill_descendants() -> Result<()> {
    let me = std::process::id() as i32;
    let end = Instant::now() + PATIENCE;
    loop {
        let all = Tree::Root(me).scan()?;
        for p in all.iter().filter(|p| p.pid != me && !p.is_zombie()) {
            let _ = kill(Pid::from_raw(p.pid), Signal::SIGKILL);
        }
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return Ok(()),
            _ if Instant::now() > end => bail!("a killed process does not end"),
            Ok(WaitStatus::StillAlive) => std::thread::sleep(POLL),
            _ => {}
        }
    }
}
