//! podman, which starts containers by runc and finds our program as `criu`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::bundle::{Bundle, Life};
use super::journeys::{COUNTER, alive, count, goes_on};

/// The only image and the only container.
const IMAGE: &str = "rcr/contained";
const NAME: &str = "contained";
/// First argument of this program where it stands in the place of runc.
pub const AS_RUNTIME: &str = "--as-runtime";

/// A podman with storage of its own.
struct Podman {
    dir: PathBuf,
    data: PathBuf,
}

/// Checkpoint while it runs, checkpoint and restore, the same over a file, end.
pub fn journey(rcr: &Path, place: &Path) -> Result<()> {
    let bundle = Bundle::make(place, &Life::new(COUNTER))?;
    let podman = Podman::new(rcr, &bundle)?;
    podman.run("run", &["--detach"], COUNTER)?;
    goes_on(&bundle)?;
    podman.container("checkpoint", &["--leave-running", "--keep"])?;
    goes_on(&bundle).context("left running")?;
    let pid = podman.pid()?;
    podman.container("checkpoint", &["--keep"])?;
    let stood = count(&bundle)?;
    ensure!(!alive(pid), "it runs on after the checkpoint");
    podman.container("restore", &["--keep"])?;
    goes_on(&bundle).context("restored")?;
    ensure!(count(&bundle)? > stood, "it began anew");
    podman.printed_all()?;
    let file = place.join("exported.tar.gz");
    let file = file.to_str().context("a path in Unicode")?;
    podman.container("checkpoint", &["--export", file])?;
    podman.done(&["rm", NAME])?;
    let mut command = podman.command(&["container", "restore", "--import", file]);
    Podman::said(&mut command)?;
    goes_on(&bundle).context("imported")?;
    fs::write(podman.data.join("end"), "")?;
    let code = podman.done(&["wait", NAME])?;
    ensure!(code.trim() == "7", "it ended with {code} instead of 7");
    Ok(())
}

/// Whether podman can run anything here.
pub fn starts(rcr: &Path, place: &Path) -> Result<Result<()>> {
    let bundle = Bundle::make(place, &Life::new("exit 0"))?;
    let podman = Podman::new(rcr, &bundle);
    Ok(podman.and_then(|podman| podman.run("run", &[], "exit 0")))
}

impl Podman {
    fn new(rcr: &Path, bundle: &Bundle) -> Result<Self> {
        let podman = Self {
            dir: bundle.dir.clone(),
            data: bundle.data.clone(),
        };
        let bin = podman.bin();
        fs::create_dir(&bin)?;
        symlink(rcr, bin.join("criu"))?;
        let ours = std::env::current_exe()?;
        let runtime = format!("#!/bin/sh\nexec '{}' {AS_RUNTIME} \"$@\"\n", ours.display());
        fs::write(podman.runtime(), runtime)?;
        fs::set_permissions(podman.runtime(), fs::Permissions::from_mode(0o755))?;
        let root = bundle.dir.join("root.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(bundle.dir.join("rootfs"));
        Self::said(tar.arg("-cf").arg(&root).arg("."))?;
        let root = root.to_str().context("a path in Unicode")?;
        podman.done(&["import", root, IMAGE])?;
        Ok(podman)
    }

    fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    fn runtime(&self) -> PathBuf {
        self.bin().join("runtime")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.dir.join("store"));
        command.arg("--runroot").arg(self.dir.join("run"));
        command.args(["--storage-driver=vfs", "--cgroup-manager=cgroupfs"]);
        command.arg("--events-backend=file");
        command.arg("--runtime").arg(self.runtime()).args(arguments);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.bin().display()));
        command.stdin(Stdio::null());
        command
    }

    /// What it prints; what went wrong is on the other stream.
    fn said(command: &mut Command) -> Result<String> {
        let out = command.output().with_context(|| format!("{command:?}"))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            bail!("{command:?}: {}\n{said}", out.status);
        }
        Ok(String::from_utf8(out.stdout)?)
    }

    fn done(&self, arguments: &[&str]) -> Result<String> {
        Self::said(&mut self.command(arguments))
    }

    /// Starts a container that runs a script.
    fn run(&self, what: &str, options: &[&str], script: &str) -> Result<()> {
        let mut command = self.command(&[what, "--network=none", "--log-driver=k8s-file"]);
        let volume = format!("{}:/data", self.data.display());
        command
            .args(options)
            .args(["--name", NAME, "--volume", &volume]);
        command.args([IMAGE, "/bin/sh", "-c", script]);
        Self::said(&mut command).map(drop)
    }

    fn container(&self, what: &str, options: &[&str]) -> Result<()> {
        let mut command = self.command(&["container", what]);
        command.args(options).arg(NAME);
        let done = Self::said(&mut command).map(drop);
        done.with_context(|| self.logs())
    }

    fn logs(&self) -> String {
        let mut find = Command::new("find");
        find.arg(&self.dir)
            .args(["-name", "dump.log", "-o", "-name", "restore.log"]);
        let names = Self::said(&mut find).unwrap_or_default();
        names
            .lines()
            .map(|n| fs::read_to_string(n).unwrap_or_default())
            .collect()
    }

    fn pid(&self) -> Result<i32> {
        let said = self.done(&["inspect", "--format", "{{.State.Pid}}", NAME])?;
        Ok(said.trim().parse()?)
    }

    /// What it prints goes through pipes of the engine's, and nothing is lost.
    fn printed_all(&self) -> Result<()> {
        let printed = self.done(&["logs", NAME])?;
        for (line, n) in printed.lines().zip(1..) {
            ensure!(line == format!("{n}"), "line {n} of its output is {line:?}");
        }
        ensure!(printed.lines().count() > 2, "it printed only {printed:?}");
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Gone already if all went well.
        let _ = self.done(&["rm", "--force", "--all"]);
    }
}

/// Stands in the place of runc: limits, which podman always sets, need a
/// capability that root does not have everywhere.
pub fn as_runtime(arguments: &[String]) -> Result<()> {
    let bundle = arguments.iter().position(|a| a == "--bundle");
    if let Some(bundle) = bundle.and_then(|at| arguments.get(at + 1)) {
        let path = Path::new(bundle).join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        if let Some(process) = config["process"].as_object_mut() {
            process.remove("rlimits");
        }
        fs::write(path, serde_json::to_vec(&config)?)?;
    }
    Err(Command::new("runc").args(arguments).exec()).context("runc")
}
