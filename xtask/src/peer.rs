//! A Debian root with CRIU in it, and the tests that use it.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host::{KEYRING, as_root, install_missing, run};
use crate::{artifacts, mirror, root};

/// Debian's releases that have the newest CRIU.
const SUITES: [&str; 2] = ["sid", "experimental"];

/// What the tests use; CRIU itself comes from the newer suite.
const PACKAGES: &str = "criu/experimental,python3-pycriu/experimental,python3-minimal,redis-server,\
                        iproute2,nftables";

/// Runs the tests across programs; `only` is a part of their names.
///
/// # Errors
/// When something cannot be made or run, or a test fails.
pub fn test(only: Option<&str>) -> Result<()> {
    let debian = prepare()?;
    let rcr = artifacts::build("rcr-cli", &["rcr"])?.remove(0);
    let mut command = as_root("env");
    command.arg(artifacts::build_with(
        "rcr-tests",
        "conformance",
        "rcr-cross",
    )?);
    command.arg("--root").arg(&debian).arg("--rcr").arg(rcr);
    if let Some(only) = only {
        command.args(["--only", only]);
    }
    run(&mut command)
}

/// The root, made now if it is not there yet.
///
/// # Errors
/// When packages cannot be had.
pub fn prepare() -> Result<PathBuf> {
    install_missing()?;
    let mut hasher = DefaultHasher::new();
    (SUITES, PACKAGES).hash(&mut hasher);
    let dir = root().join("target/peers");
    let made = dir.join(format!("debian-{:016x}", hasher.finish()));
    if made.exists() {
        return Ok(made);
    }
    println!("Making a Debian root with CRIU; this is done once");
    let work = dir.join("debian.new");
    fs::create_dir_all(&dir)?;
    run(as_root("rm").arg("-rf").arg(&work))?;
    let mut command = as_root("mmdebstrap");
    command.args(["--quiet", "--variant=apt", "--mode=root"]);
    command.arg(format!("--include={PACKAGES}"));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    if let Some(option) = validity()? {
        command.arg(format!("--aptopt={option}"));
    }
    for unneeded in ["man", "doc", "locale"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{unneeded}/*"));
    }
    command.arg(SUITES[0]).arg(&work);
    let have = mirror::sources()?;
    let main = have
        .iter()
        .find(|source| source.uri.trim_end_matches('/').ends_with("/debian"))
        .context("apt's sources on this machine name no Debian mirror")?;
    let key = main.signed_by.as_deref().unwrap_or(KEYRING);
    for suite in SUITES {
        command.arg(format!("deb [signed-by={key}] {} {suite} main", main.uri));
    }
    run(&mut command)?;
    fs::rename(&work, &made)?;
    Ok(made)
}

/// A mirror that stands still has lists past their date; whether that is
/// accepted is this machine's choice.
fn validity() -> Result<Option<String>> {
    let out = Command::new("apt-config")
        .args(["dump", "Acquire::Check-Valid-Until"])
        .output()
        .context("apt-config")?;
    if !out.status.success() {
        bail!("apt-config: {}", out.status);
    }
    let text = String::from_utf8(out.stdout)?;
    let line = text.lines().find(|l| l.contains("Check-Valid-Until \""));
    Ok(line.map(|l| l.trim_end_matches(';').to_owned()))
}
