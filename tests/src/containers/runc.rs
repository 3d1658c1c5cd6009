//! runc, with our program in the place of CRIU.

use std::cell::Cell;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use super::bundle::Bundle;

/// Every container has this name; each has a runc of its own.
const NAME: &str = "rcr-contained";

/// A runc with one container.
#[derive(Debug)]
pub struct Runc {
    dir: PathBuf,
    criu: PathBuf,
    /// Part of the container's name, which is that of its cgroup.
    name: String,
    /// How many have been run.
    commands: Cell<u32>,
}

impl Runc {
    /// For a bundle.
    pub fn new(rcr: &Path, bundle: &Bundle) -> Result<Self> {
        let criu = bundle.dir.join("criu");
        symlink(rcr, &criu)?;
        let place = bundle.dir.display().to_string().replace('/', "-");
        Ok(Self {
            dir: bundle.dir.clone(),
            criu,
            name: format!("{NAME}{place}"),
            commands: Cell::new(0),
        })
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.join("state"));
        command.arg("--criu").arg(&self.criu).arg(what);
        command.current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    fn done(&self, mut command: Command) -> Result<()> {
        let (status, said) = self.ended(&mut command)?;
        if !status.success() {
            bail!("{command:?}: {status}\n{said}{}", self.logs());
        }
        Ok(())
    }

    /// Runs a command whose output goes to a file: what it leaves behind may
    /// hold that longer than it lives.
    fn ended(&self, command: &mut Command) -> Result<(ExitStatus, String)> {
        let out = self.output()?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", out.as_raw_fd()));
        let status = command
            .stdout(out.try_clone()?)
            .stderr(out.try_clone()?)
            .status()
            .context("the package runc is missing")?;
        Ok((status, fs::read_to_string(path)?))
    }

    /// A new file for what a command prints: the container's output may be one
    /// from before.
    fn output(&self) -> Result<fs::File> {
        let number = self.commands.get();
        self.commands.set(number + 1);
        let path = self.dir.join(format!("output-{number}"));
        Ok(fs::File::create(path)?)
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        ["work/dump.log", "work/restore.log"].map(read).concat()
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// The id of the container's first process, as the host has it.
    pub fn pid(&self) -> Result<i32> {
        Ok(fs::read_to_string(self.pid_file())?.trim().parse()?)
    }

    /// Starts the container.
    pub fn run(&self) -> Result<()> {
        let mut command = self.command("run");
        command.arg("--detach");
        command.arg("--pid-file").arg(self.pid_file());
        command.arg(&self.name);
        self.done(command)
    }

    /// Starts it and waits for its end, which has to be a good one.
    pub fn run_to_the_end(&self) -> Result<()> {
        let mut command = self.command("run");
        command.arg(&self.name);
        self.done(command)
    }

    /// Checkpoints it; it goes on only if that is said.
    pub fn checkpoint(&self, leave_running: bool) -> Result<()> {
        let mut command = self.command("checkpoint");
        command.arg("--image-path").arg(self.dir.join("images"));
        command.arg("--work-path").arg(self.dir.join("work"));
        if leave_running {
            command.arg("--leave-running");
        }
        command.arg(&self.name);
        self.done(command)
    }

    fn restoring(&self) -> Command {
        let mut command = self.command("restore");
        command.arg("--image-path").arg(self.dir.join("images"));
        command.arg("--work-path").arg(self.dir.join("work"));
        command
    }

    /// Restores it.
    pub fn restore(&self) -> Result<()> {
        let mut command = self.restoring();
        command.arg("--detach");
        command.arg("--pid-file").arg(self.pid_file());
        command.arg(&self.name);
        self.done(command)
    }

    /// Restores it and waits for its end; returns its exit code.
    pub fn restore_to_the_end(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<i32> {
        let mut command = self.restoring();
        command.arg(&self.name);
        let out = self.output()?;
        command.stdout(out.try_clone()?).stderr(out);
        let mut child = command.spawn()?;
        let done = meanwhile();
        let status = child.wait()?;
        done?;
        status
            .code()
            .with_context(|| format!("{status}\n{}", self.logs()))
    }

    /// Starts the container, or restores it, with pipes for its standard
    /// streams: what it prints comes to a file.
    pub fn attached(&self, restored: bool, output: &Path) -> Result<Attached> {
        let mut command = match restored {
            true => self.restoring(),
            false => self.command("run"),
        };
        command.arg("--pid-file").arg(self.pid_file());
        command.arg(&self.name);
        command
            .stdout(fs::File::create(output)?)
            .stderr(Stdio::null());
        Ok(Attached(command.spawn()?))
    }

    /// What a program in the container prints.
    pub fn exec(&self, program: &[&str]) -> Result<String> {
        let mut command = self.command("exec");
        command.arg(&self.name).args(program);
        let out = command.output()?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            bail!("{program:?}: {}\n{said}", out.status);
        }
        Ok(String::from_utf8(out.stdout)?)
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let mut command = self.command("delete");
        command.arg("--force").arg(&self.name);
        // It is not there when all went well and it has ended.
        let _ = self.ended(&mut command);
    }
}

/// An engine that stays with its container and holds the ends of its pipes.
#[derive(Debug)]
pub struct Attached(Child);

impl Attached {
    /// Waits for the end of the container; returns its exit code.
    pub fn end(mut self) -> Result<Option<i32>> {
        Ok(self.0.wait()?.code())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // It has ended when all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
