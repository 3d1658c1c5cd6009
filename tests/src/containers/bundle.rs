//! A container's directory: a root with busybox in it, and its settings.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Statically linked: a root needs nothing else.
const BUSYBOX: &str = "/bin/busybox";
const NAMES: [&str; 8] = ["sh", "cat", "echo", "sleep", "ps", "ls", "readlink", "tty"];

/// What a container runs, and in which surroundings.
#[derive(Debug, Clone)]
pub struct Life {
    script: String,
    namespaces: Vec<&'static str>,
    hardened: bool,
}

impl Life {
    /// A script for sh in a container that shares the host's network.
    pub fn new(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            namespaces: vec!["pid", "ipc", "uts", "mount"],
            hardened: false,
        }
    }

    /// It also has its own namespace of this kind.
    pub fn with(mut self, namespace: &'static str) -> Self {
        self.namespaces.push(namespace);
        self
    }

    /// It has few capabilities, a filter of system calls, covered places, and a
    /// root directory that is read-only but for a volume.
    pub fn hardened(mut self) -> Self {
        self.hardened = true;
        self
    }
}

/// A directory that runc takes.
#[derive(Debug)]
pub struct Bundle {
    /// Where it is.
    pub dir: PathBuf,
    /// The volume that the container sees as `/data`.
    pub data: PathBuf,
}

impl Bundle {
    /// Makes one.
    pub fn make(dir: &Path, life: &Life) -> Result<Self> {
        let root = dir.join("rootfs");
        for name in ["bin", "proc", "sys", "dev", "tmp", "etc", "data"] {
            fs::create_dir_all(root.join(name))?;
        }
        let busybox = root.join("bin/busybox");
        fs::copy(BUSYBOX, &busybox).context("the package busybox-static is missing")?;
        fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755))?;
        for name in NAMES {
            symlink("busybox", root.join("bin").join(name))?;
        }
        let data = dir.join("data");
        fs::create_dir(&data)?;
        let config = serde_json::to_vec_pretty(&config(life, &data))?;
        fs::write(dir.join("config.json"), config)?;
        Ok(Self {
            dir: dir.to_owned(),
            data,
        })
    }

    /// Whether its programs need nothing that is not in its root.
    pub fn works_alone(&self) -> Result<()> {
        let root = self.dir.join("rootfs");
        let mut command = Command::new("/bin/busybox");
        command.arg("true");
        // SAFETY: chroot and chdir are system calls, and allocate nothing beyond
        // what is thrown away with the child; this program has a single thread.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::chroot(&root)?;
                Ok(nix::unistd::chdir("/")?)
            });
        }
        let status = command.status().context("busybox in the root")?;
        anyhow::ensure!(status.success(), "busybox: {status}");
        Ok(())
    }
}

fn config(life: &Life, data: &Path) -> Value {
    let namespaces: Vec<Value> = life
        .namespaces
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    let capabilities = match life.hardened {
        true => json!(["CAP_KILL", "CAP_NET_BIND_SERVICE"]),
        false => json!(["CAP_KILL", "CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]),
    };
    let mut linux = json!({
        "namespaces": namespaces,
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
    });
    if life.hardened {
        linux["maskedPaths"] = json!(["/proc/kcore", "/proc/keys", "/proc/irq", "/sys/firmware"]);
        linux["readonlyPaths"] = json!(["/proc/bus", "/proc/fs", "/proc/sys"]);
        linux["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{
                "names": ["reboot", "swapon", "init_module"],
                "action": "SCMP_ACT_ERRNO",
            }],
        });
    }
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh", "-c", life.script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities.clone(),
                "effective": capabilities.clone(),
                "permitted": capabilities,
            },
            "noNewPrivileges": life.hardened,
        },
        "root": { "path": "rootfs", "readonly": life.hardened },
        "hostname": "contained",
        "mounts": mounts(data),
        "linux": linux,
    })
}

fn mounts(data: &Path) -> Value {
    let quiet = ["nosuid", "noexec", "nodev"];
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        {
            "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": quiet },
        {
            "destination": "/data", "type": "bind", "source": data,
            "options": ["bind", "rw"],
        },
    ])
}
