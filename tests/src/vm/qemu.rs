//! QEMU's command line.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Ports;
use super::agent::PORTS;
use super::image::Kernel;

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";

/// Guest memory. The q35 board puts what exceeds 2 GiB above 4 GiB, which is
/// where memory is handed over from.
const MEMORY: &str = "4G";

/// The kernel command line: Debian's, less what emulation makes expensive.
/// A panic ends QEMU (`-no-reboot`) instead of hanging it.
pub const COMMAND_LINE: &str = "root=LABEL=root ro console=ttyS0 mitigations=off audit=0 panic=-1";

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The host's virtualization.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accel {
    /// The name of it in QEMU and in our cache.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Guests oopsed at random with the cmpxchg16b of older emulators.
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"],
        }
    }

    /// KVM if it really runs `kernel`, else emulation. `/dev/kvm` alone says
    /// little: it may be there and not be able to start a stock guest.
    ///
    /// # Errors
    /// When QEMU cannot be started at all.
    pub fn detect(kernel: &Kernel) -> Result<Accel> {
        if File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            return Ok(Accel::Tcg);
        }
        // Without a root the kernel boots, panics and so ends QEMU.
        let mut child = base_command(Accel::Kvm)
            .args([
                "-m",
                "1G",
                "-append",
                "panic=-1 console=ttyS0",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(&kernel.vmlinuz)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {QEMU}"))?;
        let start = Instant::now();
        while child.try_wait()?.is_none() {
            if start.elapsed() > Duration::from_secs(30) {
                child.kill()?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let booted = text.contains("Unable to mount root fs");
        Ok(if booted { Accel::Kvm } else { Accel::Tcg })
    }
}

/// Everything that makes one QEMU process.
pub(super) struct Machine<'a> {
    pub accel: Accel,
    pub kernel: &'a Kernel,
    pub ports: Ports,
    /// A snapshot in the disk to go on from.
    pub resume_from: Option<&'a str>,
    pub detached: bool,
    /// Programs may use the instruction cmpxchg16b.
    pub cmpxchg16b: bool,
}

impl Machine<'_> {
    /// A name for everything a snapshot depends on besides the disk.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        for argument in self.command().get_args() {
            argument.hash(&mut hasher);
        }
        format!("{:016x}", hasher.finish())
    }

    fn command(&self) -> Command {
        let mut command = base_command(self.accel);
        command.args(["-m", MEMORY]);
        if self.cmpxchg16b && self.accel == Accel::Tcg {
            // The later of two takes effect.
            command.args(["-cpu", "max"]);
        }
        command.arg("-kernel").arg(&self.kernel.vmlinuz);
        command.arg("-initrd").arg(&self.kernel.initrd);
        command.args(["-append", COMMAND_LINE]);
        command.args([
            "-drive",
            "if=none,id=root,file=disk.qcow2,format=qcow2,cache=unsafe,discard=unmap",
            "-device",
            "virtio-blk-pci,drive=root,serial=root",
            "-drive",
            "if=none,id=payload,file=payload.img,format=raw,readonly=on",
            "-device",
            "virtio-blk-pci,drive=payload,serial=payload",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
            "-device",
            "virtio-serial-pci",
        ]);
        command.arg("-netdev").arg(format!(
            "user,id=net,hostfwd=tcp:127.0.0.1:{}-:6379,hostfwd=tcp:127.0.0.1:{}-:80",
            self.ports.redis, self.ports.nginx
        ));
        for number in 0..PORTS {
            command.arg("-chardev").arg(format!(
                "socket,id=agent{number},path=agent{number}.sock,server=on,wait=off"
            ));
            command.arg("-device").arg(format!(
                "virtserialport,chardev=agent{number},name=rcr.agent.{number}"
            ));
        }
        command.args(["-serial", "file:console.log"]);
        command.args(["-qmp", "unix:qmp.sock,server=on,wait=off"]);
        command
    }

    /// Starts QEMU in `dir`, which holds `disk.qcow2` and `payload.img`.
    pub fn spawn(&self, dir: &Path) -> Result<Child> {
        let log = File::create(dir.join("qemu.log"))?;
        let mut command = self.command();
        command.current_dir(dir);
        if let Some(tag) = self.resume_from {
            command.args(["-loadvm", tag]);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if self.detached {
            // Its own group: an interrupt at our terminal is not for it.
            command.process_group(0);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {QEMU}"))?;
        std::thread::sleep(Duration::from_millis(50));
        if let Some(status) = child.try_wait()? {
            let said = std::fs::read_to_string(dir.join("qemu.log"))?;
            bail!("{QEMU} ended at once ({status}): {said}");
        }
        Ok(child)
    }
}

fn base_command(accel: Accel) -> Command {
    let mut command = Command::new(QEMU);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(["-M", "q35,sata=off,smbus=off,usb=off,i8042=off,vmport=off"]);
    command.args(accel.arguments()).args(["-smp", "2"]);
    command
}
