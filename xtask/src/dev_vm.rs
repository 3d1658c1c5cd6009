//! `cargo xtask vm`: machines to work with by hand.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use rcr_tests::vm::qemu::Accel;
use rcr_tests::vm::{BOOT_TIMEOUT, Options, Vm};

use crate::{artifacts, image, vm_dir};

/// What to do with a machine.
#[derive(Subcommand)]
pub enum Action {
    /// Starts one and returns when it is at multi-user.
    Start {
        /// Its name.
        #[arg(long)]
        name: String,
        /// The kernel it boots with: the start of a release, such as 6.12.
        #[arg(long)]
        kernel: Option<String>,
        /// A folder whose files are copied over the guest's root.
        #[arg(long)]
        payload: Option<PathBuf>,
    },
    /// Runs a command as root; exits as it does.
    Exec {
        /// The machine's name.
        #[arg(long)]
        name: String,
        /// Seconds until the command is killed.
        #[arg(long, default_value_t = 120)]
        timeout: u64,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copies a file or a folder into the guest.
    Push {
        /// The machine's name.
        #[arg(long)]
        name: String,
        /// A file or folder here.
        source: PathBuf,
        /// The absolute path it gets in the guest; for a folder, that folder.
        destination: String,
    },
    /// Copies a file out of the guest.
    Pull {
        /// The machine's name.
        #[arg(long)]
        name: String,
        /// A file in the guest.
        source: String,
        /// A file here.
        destination: PathBuf,
    },
    /// Waits until the guest answers and has settled, such as after a kexec.
    Wait {
        /// The machine's name.
        #[arg(long)]
        name: String,
        /// Waits for a boot other than this one (a boot id).
        #[arg(long)]
        other_than: Option<String>,
    },
    /// Prints the console's log.
    Log {
        /// The machine's name.
        #[arg(long)]
        name: String,
        /// Goes on printing what comes.
        #[arg(long)]
        follow: bool,
    },
    /// Ends a machine.
    Stop {
        /// The machine's name.
        #[arg(long)]
        name: String,
    },
}

/// Carries out one action.
///
/// # Errors
/// When it fails; see the message.
pub fn run(action: Action) -> Result<()> {
    match action {
        Action::Start {
            name,
            kernel,
            payload,
        } => start(&name, kernel.as_deref(), payload.as_deref()),
        Action::Exec {
            name,
            timeout,
            command,
        } => {
            let mut vm = open(&name)?;
            let exit = vm.run_with(&command, &[], Duration::from_secs(timeout))?;
            std::io::stdout().write_all(&exit.stdout.0)?;
            std::io::stderr().write_all(&exit.stderr.0)?;
            if exit.timed_out || exit.signal.is_some() {
                eprintln!("(it {})", exit.how());
            }
            std::process::exit(exit.code.unwrap_or(125));
        }
        Action::Push {
            name,
            source,
            destination,
        } => push(&name, &source, &destination),
        Action::Pull {
            name,
            source,
            destination,
        } => {
            fs::write(destination, open(&name)?.read_file(&source)?)?;
            Ok(())
        }
        Action::Wait { name, other_than } => {
            let mut vm = open(&name)?;
            let boot = match other_than {
                Some(before) => vm.wait_other_boot(&before, BOOT_TIMEOUT)?,
                None => vm.boot()?,
            };
            let state = vm.wait_settled()?;
            println!("kernel {} boot {} {state}", boot.kernel, boot.id);
            Ok(())
        }
        Action::Log { name, follow } => log(&name, follow),
        Action::Stop { name } => open(&name)?.stop(),
    }
}

fn directory(name: &str) -> PathBuf {
    vm_dir().join("run").join(name)
}

fn open(name: &str) -> Result<Vm> {
    Vm::open(&directory(name))
}

fn start(name: &str, kernel: Option<&str>, payload: Option<&Path>) -> Result<()> {
    let image = image::prepare()?;
    let kernel = match kernel {
        Some(prefix) => image.kernel(prefix)?,
        None => image.oldest(),
    };
    let dir = directory(name);
    if Vm::open(&dir).is_ok() {
        bail!("there is a machine {name} already: cargo xtask vm stop --name {name}");
    }
    let payload = payload
        .map(|tree| artifacts::pack(tree, &format!("run-{name}")))
        .transpose()?;
    let accel = Accel::detect(kernel)?;
    let start = Instant::now();
    let options = Options {
        image: &image,
        kernel,
        accel,
        dir: &dir,
        payload: payload.as_deref(),
        detached: true,
        cmpxchg16b: false,
    };
    let mut vm = Vm::start(&options)?;
    let boot = vm.boot()?;
    let ports = vm.ports();
    println!(
        "{}\nkernel {} ({}), boot {}, redis at 127.0.0.1:{}, nginx at 127.0.0.1:{}, {:.1} s",
        vm.dir().display(),
        boot.kernel,
        accel.name(),
        boot.id,
        ports.redis,
        ports.nginx,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn push(name: &str, source: &Path, destination: &str) -> Result<()> {
    let tree = vm_dir().join(format!("push-{name}"));
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    if source.is_dir() {
        copy_tree(source, &tree.join(destination.trim_start_matches('/')))?;
    } else {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(source)
            .with_context(|| source.display().to_string())?
            .permissions()
            .mode();
        artifacts::install(source, &tree, destination, mode & 0o7777)?;
    }
    let tar = artifacts::pack(&tree, &format!("push-{name}"))?;
    open(name)?.push_payload(&tar)?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&tar)?;
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn log(name: &str, follow: bool) -> Result<()> {
    let mut console = open(name)?.console();
    loop {
        for line in console.new_lines()? {
            println!("{line}");
        }
        if !follow {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
