//! A tree under measurement: born, looked at, ended.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::load::Load;

/// A tree that is not ready by then hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// What must be the same before and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    processes: usize,
    threads: usize,
    descriptors: usize,
    /// Resident memory of all, MiB.
    resident: u64,
}

/// A load that runs; it ends when this is dropped.
#[derive(Debug)]
pub struct LoadTree {
    /// Its root, which is its session as well.
    pub pid: i32,
    facts: Facts,
}

impl LoadTree {
    /// Starts a load whose files are in `dir`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(load: Load, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let ready = dir.join("ready");
        match fs::remove_file(&ready) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        // A restorer cannot give a process the file that it runs itself.
        let program = dir.join("program");
        if !program.exists() {
            fs::copy("/proc/self/exe", &program)?;
        }
        let mut child = Command::new(program)
            .args(["load", &load.name()])
            .arg(dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = child.id() as i32;
        let end = Instant::now() + PATIENCE;
        while !ready.exists() {
            if let Some(status) = child.try_wait()? {
                bail!("load {}: {status}", load.name());
            }
            if Instant::now() > end {
                bail!("load {} does not come up", load.name());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut tree = Self {
            pid,
            facts: Facts::default(),
        };
        tree.facts = tree.look()?;
        Ok(tree)
    }

    /// Members of its session that are no zombies.
    fn members(&self) -> Result<Vec<i32>> {
        let mut out = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
                continue;
            };
            // pid (comm) state ppid pgrp session …; see proc_pid_stat(5).
            let rest = stat.rsplit(") ").next().unwrap_or_default();
            let fields: Vec<&str> = rest.split(' ').collect();
            if fields.get(3) == Some(&self.pid.to_string().as_str()) && fields[0] != "Z" {
                out.push(pid);
            }
        }
        Ok(out)
    }

    fn look(&self) -> Result<Facts> {
        let mut facts = Facts::default();
        for pid in self.members()? {
            let count =
                |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map(Iterator::count);
            facts.processes += 1;
            facts.threads += count("task")?;
            facts.descriptors += count("fd")?;
            let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
            // Anonymous memory alone: resident less shared pages.
            let pages: Vec<u64> = statm.split(' ').filter_map(|f| f.parse().ok()).collect();
            facts.resident += (pages[1] - pages[2]) * 4 / 1024;
        }
        Ok(facts)
    }

    /// Waits until nothing of it is left after a dump.
    ///
    /// # Errors
    /// When something stays.
    pub fn await_gone(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            reap();
            if self.members()?.is_empty() && !Path::new(&format!("/proc/{}", self.pid)).exists() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the tree of {} is still there after a dump", self.pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it is all there again.
    ///
    /// # Errors
    /// Tells what differs.
    pub fn check(&self) -> Result<()> {
        let now = self.look()?;
        let near = now.resident.abs_diff(self.facts.resident) <= self.facts.resident / 50 + 8;
        let same = Facts {
            resident: self.facts.resident,
            ..now
        };
        if same != self.facts || !near {
            bail!("it came back as {now:?}, not as {:?}", self.facts);
        }
        Ok(())
    }
}

impl Drop for LoadTree {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        while let Ok(members) = self.members().context("members")
            && !members.is_empty()
            && Instant::now() < end
        {
            for pid in members {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(2));
            reap();
        }
    }
}

/// Children that have ended are forgotten, orphans of trees among them.
fn reap() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}
