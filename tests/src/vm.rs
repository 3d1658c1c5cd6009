//! One virtual machine: its directory on the host, its QEMU process, and what
//! can be asked of it.
//!
//! Everything about a running machine lives in its directory, so a machine
//! that was started by one process can be driven and ended by another.

pub mod agent;
pub mod console;
pub mod image;
pub mod qemu;
pub mod qmp;
pub mod ready;

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::wire::Exit;
use agent::Agent;
use console::Console;
use image::{Image, Kernel};
use qemu::{Accel, Machine};
use qmp::Qmp;

/// How long a command in the guest may take unless said otherwise. Generous:
/// it only bounds hangs.
pub const EXEC_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a boot may take until the guest is idle at multi-user.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Size of the disk that carries files into the guest. Fixed, so that a
/// machine resumed from a snapshot finds the size it remembers.
const PAYLOAD_BYTES: u64 = 1 << 30;

/// What a machine is made of.
pub struct Options<'a> {
    /// The cached image.
    pub image: &'a Image,
    /// The kernel it boots with.
    pub kernel: &'a Kernel,
    /// KVM or emulation.
    pub accel: Accel,
    /// The machine's directory; made anew.
    pub dir: &'a Path,
    /// A tar archive that is unpacked to `/` once the guest answers.
    pub payload: Option<&'a Path>,
    /// Whether QEMU goes on when this process ends.
    pub detached: bool,
    /// Programs of the guest use the instruction cmpxchg16b, which emulated
    /// machines are otherwise without.
    pub cmpxchg16b: bool,
}

/// Host ports that lead to the guest's services.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Ports {
    /// Leads to the guest's port 6379.
    pub redis: u16,
    /// Leads to the guest's port 80.
    pub nginx: u16,
}

/// What a machine's directory says about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    pid: u32,
    ports: Ports,
}

/// Which boot of the guest is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The kernel's random boot id.
    pub id: String,
    /// `uname -r`.
    pub kernel: String,
}

/// A running virtual machine.
pub struct Vm {
    dir: PathBuf,
    record: Record,
    agent: Agent,
    child: Option<Child>,
    detached: bool,
}

impl Vm {
    /// Starts a machine that is at multi-user with its clock right and the
    /// payload unpacked.
    ///
    /// # Errors
    /// When QEMU does not start or the guest does not come up; the console's
    /// last lines are part of the message.
    pub fn start(options: &Options<'_>) -> Result<Vm> {
        let snapshot = ready::snapshot(options)?;
        Vm::go_on(options, &snapshot.disk, ready::TAG)
    }

    /// Goes on from the snapshot `tag` in a disk.
    fn go_on(options: &Options<'_>, disk: &Path, tag: &str) -> Result<Vm> {
        let mut vm = Vm::spawn(options, disk, Some(tag))?;
        vm.agent
            .wait(BOOT_TIMEOUT, &mut vm.child)
            .map_err(|error| vm.with_console(error))?;
        vm.set_clock()?;
        if options.payload.is_some() {
            vm.unpack_payload()?;
        }
        Ok(vm)
    }

    /// Starts QEMU over a copy of `disk`, from the snapshot `tag` if one is
    /// given, and does not wait for the guest.
    fn spawn(options: &Options<'_>, disk: &Path, tag: Option<&str>) -> Result<Vm> {
        let dir = options.dir;
        if dir.exists() {
            fs::remove_dir_all(dir).with_context(|| format!("clearing {}", dir.display()))?;
        }
        fs::create_dir_all(dir)?;
        let dir = dir.canonicalize()?;
        copy_sparse(disk, &dir.join("disk.qcow2"))?;
        write_payload(&dir.join("payload.img"), options.payload)?;
        let ports = Ports {
            redis: free_port()?,
            nginx: free_port()?,
        };
        let machine = Machine {
            accel: options.accel,
            kernel: options.kernel,
            ports,
            resume_from: tag,
            detached: options.detached,
            cmpxchg16b: options.cmpxchg16b,
        };
        let child = machine.spawn(&dir)?;
        let record = Record {
            pid: child.id(),
            ports,
        };
        fs::write(dir.join("vm.json"), serde_json::to_vec_pretty(&record)?)?;
        let agent = Agent::new(&dir);
        Ok(Vm {
            dir,
            record,
            agent,
            child: Some(child),
            detached: options.detached,
        })
    }

    /// Takes hold of a machine that another process started.
    ///
    /// # Errors
    /// When there is none in `dir`, or it no longer runs.
    pub fn open(dir: &Path) -> Result<Vm> {
        let text = fs::read(dir.join("vm.json"))
            .with_context(|| format!("no machine in {}", dir.display()))?;
        let record: Record = serde_json::from_slice(&text)?;
        if !is_qemu(record.pid) {
            bail!("the machine in {} is not running", dir.display());
        }
        let dir = dir.canonicalize()?;
        let agent = Agent::new(&dir);
        Ok(Vm {
            dir,
            record,
            agent,
            child: None,
            detached: true,
        })
    }

    /// The machine's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Host ports that lead to the guest's services.
    pub fn ports(&self) -> Ports {
        self.record.ports
    }

    /// Opens a port of this host that leads to one of the guest; gives it.
    ///
    /// # Errors
    /// When QEMU does not.
    pub fn forward(&mut self, guest: u16) -> Result<u16> {
        let port = free_port()?;
        let mut qmp = Qmp::connect(&self.dir.join("qmp.sock"))?;
        qmp.monitor(&format!("hostfwd_add net tcp:127.0.0.1:{port}-:{guest}"))?;
        Ok(port)
    }

    /// The serial console's log.
    pub fn console(&self) -> Console {
        Console::new(self.dir.join("console.log"))
    }

    /// Which boot answers now.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn boot(&mut self) -> Result<Boot> {
        self.agent.ping(EXEC_TIMEOUT, &mut self.child)
    }

    /// Runs a program and returns how it ended, whatever that is.
    ///
    /// # Errors
    /// When it could not be run, or the machine was lost.
    pub fn run<S: AsRef<str>>(&mut self, argv: &[S]) -> Result<Exit> {
        self.run_with(argv, &[], EXEC_TIMEOUT)
    }

    /// [`Vm::run`] with standard input and a time limit.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_with<S: AsRef<str>>(
        &mut self,
        argv: &[S],
        stdin: &[u8],
        timeout: Duration,
    ) -> Result<Exit> {
        let argv: Vec<String> = argv.iter().map(|s| s.as_ref().to_owned()).collect();
        self.agent
            .exec(argv, stdin.to_vec(), timeout, &mut self.child)
            .map_err(|error| self.with_console(error))
    }

    /// Runs a program that has to succeed and returns its output, trimmed.
    ///
    /// # Errors
    /// Also when it exits with anything but 0.
    pub fn exec<S: AsRef<str>>(&mut self, argv: &[S]) -> Result<String> {
        let exit = self.run(argv)?;
        if exit.success() {
            return Ok(exit.out());
        }
        let command: Vec<&str> = argv.iter().map(AsRef::as_ref).collect();
        bail!(
            "guest: `{}` {}\n{}\n{}",
            command.join(" "),
            exit.how(),
            exit.out(),
            exit.err()
        )
    }

    /// [`Vm::exec`] of a shell script.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.exec(&["sh", "-c", script])
    }

    /// Reads a file of the guest.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_file(&mut self, path: &str) -> Result<Vec<u8>> {
        self.agent.read_file(path, &mut self.child)
    }

    /// Creates or replaces a file of the guest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&mut self, path: &str, data: &[u8], mode: u32) -> Result<()> {
        self.agent.write_file(path, data, mode, &mut self.child)
    }

    /// Puts another payload in and unpacks it to `/`.
    ///
    /// # Errors
    /// When the archive does not fit or the guest cannot unpack it.
    pub fn push_payload(&mut self, tar: &Path) -> Result<()> {
        write_payload(&self.dir.join("payload.img"), Some(tar))?;
        self.unpack_payload()
    }

    fn unpack_payload(&mut self) -> Result<()> {
        // The guest may remember blocks of what was on the disk before.
        self.sh(
            "d=/dev/disk/by-id/virtio-payload; blockdev --flushbufs $d && \
             tar -xf $d -C / --unlink-first --no-same-owner && sync && systemctl daemon-reload",
        )?;
        Ok(())
    }

    /// Waits until no start job is left, whether or not a unit failed.
    ///
    /// # Errors
    /// When the guest does not settle in [`BOOT_TIMEOUT`].
    pub fn wait_settled(&mut self) -> Result<String> {
        let exit = self.run_with(
            &["systemctl", "is-system-running", "--wait"],
            &[],
            BOOT_TIMEOUT,
        )?;
        if exit.timed_out {
            return Err(self.with_console(anyhow!("the guest did not settle")));
        }
        Ok(exit.out())
    }

    /// Runs a command that is meant to end in another boot. Exiting with 0
    /// says that the boot is under way; it is then waited for.
    ///
    /// # Errors
    /// When neither a failure nor a new boot comes in `timeout`, or QEMU ends.
    pub fn exec_across<S: AsRef<str>>(
        &mut self,
        argv: &[S],
        timeout: Duration,
    ) -> Result<Crossing> {
        let argv: Vec<String> = argv.iter().map(|s| s.as_ref().to_owned()).collect();
        let before = self.boot()?;
        let outcome = self
            .agent
            .exec_across(argv, &before.id, timeout, &mut self.child);
        match outcome.map_err(|error| self.with_console(error))? {
            Crossing::Returned(exit) if exit.success() => self
                .wait_other_boot(&before.id, timeout)
                .map(Crossing::Jumped),
            crossing => Ok(crossing),
        }
    }

    /// Waits until a boot other than `before` answers.
    ///
    /// # Errors
    /// When none does in `timeout`, or QEMU ends.
    pub fn wait_other_boot(&mut self, before: &str, timeout: Duration) -> Result<Boot> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.with_console(anyhow!("no new boot in {timeout:?}")));
            }
            match self
                .agent
                .ping(left.min(Duration::from_secs(3)), &mut self.child)
            {
                Ok(boot) if boot.id != before => return Ok(boot),
                Ok(_) => std::thread::sleep(Duration::from_millis(200)),
                Err(error) if self.has_ended() => return Err(self.with_console(error)),
                Err(_) => {}
            }
        }
    }

    /// Sets the guest's clock to the host's: a resumed guest believes that it
    /// is still the time of its snapshot.
    fn set_clock(&mut self) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        self.exec(&[
            "date",
            "-u",
            "-s",
            &format!("@{}.{:03}", now.as_secs(), now.subsec_millis()),
        ])?;
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => !is_qemu(self.record.pid),
        }
    }

    fn with_console(&self, error: anyhow::Error) -> anyhow::Error {
        let tail = self.console().tail(30);
        anyhow!(
            "{error:#}\nThe console of {} ends with:\n{tail}",
            self.dir.display()
        )
    }

    /// Ends the machine at once, without telling the guest.
    ///
    /// # Errors
    /// When QEMU cannot be told.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        Qmp::connect(&self.dir.join("qmp.sock"))?.quit()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.detached && self.child.is_some() {
            // Nothing can be done about an error here; QEMU is gone either way.
            let _ = self.end();
        }
    }
}

/// How a command that may replace the kernel turned out.
#[derive(Debug)]
pub enum Crossing {
    /// The command came back; the kernel is the one from before.
    Returned(Exit),
    /// Another boot answers.
    Jumped(Boot),
}

fn is_qemu(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|cmdline| cmdline.windows(4).any(|part| part == b"qemu"))
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .status()?;
    if !status.success() {
        bail!("copying {} failed: {status}", from.display());
    }
    Ok(())
}

/// Writes `tar` over the payload disk in place (a running guest has it open).
fn write_payload(disk: &Path, tar: Option<&Path>) -> Result<()> {
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(disk)?;
    file.set_len(PAYLOAD_BYTES)?;
    let Some(tar) = tar else { return Ok(()) };
    let mut source = File::open(tar).with_context(|| format!("opening {}", tar.display()))?;
    let bytes = std::io::copy(&mut source, &mut file)?;
    if bytes > PAYLOAD_BYTES {
        bail!(
            "{} holds {bytes} bytes; the payload disk {PAYLOAD_BYTES}",
            tar.display()
        );
    }
    Ok(())
}
