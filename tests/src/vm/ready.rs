//! Snapshots of machines that have just finished booting: resuming one takes a
//! second or two, booting takes many.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::qemu::{Machine, QEMU};
use super::qmp::Qmp;
use super::{BOOT_TIMEOUT, Options, Ports, Vm};

/// The snapshot's name in the disk.
pub(super) const TAG: &str = "ready";

/// A disk with a snapshot of a machine at multi-user in it.
pub struct Snapshot {
    /// The qcow2 file; its backing file is the image's root.
    pub disk: PathBuf,
}

/// The snapshot of a machine with these options, made now if there is none.
///
/// # Errors
/// When the machine does not boot.
pub fn snapshot(options: &Options<'_>) -> Result<Snapshot> {
    let disk = place(options, None)?;
    let lock = File::create(disk.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    if !disk.exists() {
        make(options, &disk)?;
    }
    Ok(Snapshot { disk })
}

/// Where a snapshot of a machine with these options lies, or one that was made
/// later and has a name.
fn place(options: &Options<'_>, name: Option<&str>) -> Result<PathBuf> {
    let dir = options.image.dir.join("ready");
    fs::create_dir_all(&dir)?;
    let machine = Machine {
        accel: options.accel,
        kernel: options.kernel,
        ports: Ports::default(),
        resume_from: None,
        detached: false,
        cmpxchg16b: options.cmpxchg16b,
    };
    let mut file = format!(
        "{}-{}-{}-{}",
        options.kernel.release,
        options.accel.name(),
        qemu_version()?,
        machine.fingerprint()
    );
    if let Some(name) = name {
        file = format!("{file}-{name}");
    }
    Ok(dir.join(format!("{file}.qcow2")))
}

/// A machine as it was when it was kept under this name, if one was. Its
/// processes, its disk and its memory are those of that moment.
///
/// # Errors
/// When it does not go on.
pub fn resume(options: &Options<'_>, name: &str) -> Result<Option<Vm>> {
    let disk = place(options, Some(name))?;
    if !disk.exists() {
        return Ok(None);
    }
    Vm::go_on(options, &disk, name).map(Some)
}

/// Keeps a running machine for [`resume`]; it goes on.
///
/// # Errors
/// When QEMU or the copy of the disk fails.
pub fn keep(vm: &mut Vm, options: &Options<'_>, name: &str) -> Result<()> {
    let disk = place(options, Some(name))?;
    let mut qmp = Qmp::connect(&vm.dir.join("qmp.sock"))?;
    qmp.monitor("stop")?;
    qmp.monitor(&format!("savevm {name}"))?;
    let unfinished = disk.with_extension("new");
    super::copy_sparse(&vm.dir.join("disk.qcow2"), &unfinished)?;
    fs::rename(&unfinished, &disk)?;
    qmp.monitor("cont")?;
    drop(qmp);
    vm.set_clock()
}

fn make(options: &Options<'_>, disk: &Path) -> Result<()> {
    let empty = disk.with_extension("empty");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(options.image.root().canonicalize()?)
        .arg(&empty)
        .status()
        .context("starting qemu-img")?;
    if !made.success() {
        bail!("qemu-img create failed: {made}");
    }
    let dir = disk.with_extension("boot");
    let options = Options {
        dir: &dir,
        payload: None,
        detached: false,
        ..*options
    };
    let mut vm = Vm::spawn(&options, &empty, None)?;
    vm.agent
        .wait(BOOT_TIMEOUT, &mut vm.child)
        .map_err(|error| vm.with_console(error))?;
    let state = vm.wait_settled()?;
    if state != "running" {
        let failed = vm.exec(&["systemctl", "--failed", "--no-legend", "--plain"])?;
        return Err(vm.with_console(anyhow::anyhow!("the guest is {state}: {failed}")));
    }
    vm.exec(&["sync"])?;
    let mut qmp = Qmp::connect(&vm.dir.join("qmp.sock"))?;
    qmp.monitor(&format!("savevm {TAG}"))?;
    qmp.quit()?;
    if let Some(mut child) = vm.child.take() {
        child.wait()?;
    }
    fs::rename(dir.join("disk.qcow2"), disk)?;
    fs::remove_file(&empty)?;
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// QEMU's version, as a file name: snapshots do not fit another one.
fn qemu_version() -> Result<String> {
    let output = Command::new(QEMU)
        .arg("--version")
        .output()
        .with_context(|| format!("starting {QEMU}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .with_context(|| format!("{QEMU} --version said {text}"))?;
    Ok(version.to_owned())
}
