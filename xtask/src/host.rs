//! What this machine needs before a virtual machine can be made: Debian
//! packages, installed by apt if they are missing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::mirror;

/// Packages with a program whose presence says that they are installed.
const PACKAGES: [(&str, &str); 5] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-utils", "qemu-img"),
    ("mmdebstrap", "mmdebstrap"),
    ("e2fsprogs", "mkfs.ext4"),
    ("iproute2", "ip"),
];

/// Our own source file for this machine's backports suite.
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/rcr-backports.sources";

/// Debian's keys, where a source does not name its own.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Installs what is missing, saying so.
///
/// # Errors
/// When apt cannot install a package.
pub fn install_missing() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, program)| !has_program(program))
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("Installing Debian packages: {}", missing.join(", "));
    let backports = if missing.iter().any(|package| package.starts_with("qemu")) {
        offer_backports()?
    } else {
        None
    };
    if backports.is_none() {
        apt(&["update", "-q"])?;
    }
    // A newer QEMU emulates faster, so it comes from backports where there are
    // any; both packages must then be of one version.
    let (qemu, others): (Vec<&str>, Vec<&str>) = missing
        .iter()
        .partition(|package| package.starts_with("qemu"));
    if !qemu.is_empty() {
        let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
        if let Some(suite) = &backports {
            arguments.extend(["-t", suite.as_str()]);
        }
        arguments.extend(["qemu-system-x86", "qemu-utils"]);
        apt(&arguments)?;
    }
    if !others.is_empty() {
        let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
        arguments.extend(others);
        apt(&arguments)?;
    }
    Ok(())
}

/// Installs the packages of programs that are missing.
///
/// # Errors
/// When apt cannot install one.
pub fn install(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !has_program(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("Installing Debian packages: {}", missing.join(", "));
    apt(&["update", "-q"])?;
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(missing);
    apt(&arguments)
}

/// Makes this machine's backports suite known to apt. Returns its name, or
/// nothing if the mirror has none for this release.
fn offer_backports() -> Result<Option<String>> {
    let codename = codename()?;
    let suite = format!("{codename}-backports");
    let sources = mirror::sources()?;
    if mirror::with_suite(&sources, &suite).is_ok() {
        apt(&["update", "-q"])?;
        return Ok(Some(suite));
    }
    let Ok(main) = mirror::with_suite(&sources, &codename) else {
        return Ok(None);
    };
    let key = main.signed_by.as_deref().unwrap_or(KEYRING);
    let text = format!(
        "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {key}\n",
        main.uri
    );
    println!("Adding {BACKPORTS_FILE} for a newer QEMU");
    write_as_root(Path::new(BACKPORTS_FILE), &text)?;
    if apt(&["update", "-q", "--error-on=any"]).is_ok() {
        return Ok(Some(suite));
    }
    println!("The mirror has no {suite}; taking QEMU from {codename}");
    run(as_root("rm").arg(BACKPORTS_FILE))?;
    Ok(None)
}

fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME; is this Debian?")
}

fn has_program(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| Path::new(folder).join(name).is_file())
}

fn apt(arguments: &[&str]) -> Result<()> {
    run(as_root("env")
        .args(["DEBIAN_FRONTEND=noninteractive", "apt-get"])
        .args(arguments))
}

fn write_as_root(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut child = as_root("tee")
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("writing {} failed: {status}", path.display());
    }
    Ok(())
}

/// A command that runs as root: by sudo unless we are root already.
pub fn as_root(program: &str) -> Command {
    if nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Runs a command that has to succeed.
///
/// # Errors
/// When it cannot be started or exits with anything but 0.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("starting {name}"))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        bail!("`{name} {}` failed: {status}", arguments.join(" "));
    }
    Ok(())
}
