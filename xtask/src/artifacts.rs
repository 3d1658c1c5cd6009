//! The built programs and where they are installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::host::run;
use crate::root;

/// The packages whose programs are the product.
const PRODUCT: [&str; 3] = ["rcr-cli", "rcr-initramfs", "rcr-systemd"];

/// Builds programs of one package and returns where they are, in that order.
///
/// # Errors
/// When the build fails.
pub fn build(package: &str, programs: &[&str]) -> Result<Vec<PathBuf>> {
    let mut arguments = vec!["--package", package, "--no-default-features"];
    for program in programs {
        arguments.extend(["--bin", program]);
    }
    in_order(&build_programs(&arguments)?, programs)
}

/// Builds one program that needs a feature of its package.
///
/// # Errors
/// When the build fails.
pub fn build_with(package: &str, feature: &str, program: &str) -> Result<PathBuf> {
    let arguments = ["--package", package, "--no-default-features"];
    let arguments = [&arguments[..], &["--features", feature, "--bin", program]].concat();
    build_programs(&arguments)?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name == program))
        .with_context(|| format!("cargo built no {program}"))
}

/// Builds programs of several packages as they are shipped, optimized.
///
/// # Errors
/// When the build fails.
pub fn build_fast(packages: &[&str], programs: &[&str]) -> Result<Vec<PathBuf>> {
    let mut arguments = vec!["--release"];
    for package in packages {
        arguments.extend(["--package", package]);
    }
    for program in programs {
        arguments.extend(["--bin", program]);
    }
    in_order(&build_programs(&arguments)?, programs)
}

fn in_order(built: &[PathBuf], programs: &[&str]) -> Result<Vec<PathBuf>> {
    programs
        .iter()
        .map(|program| {
            built
                .iter()
                .find(|path| path.file_name().is_some_and(|name| name == *program))
                .cloned()
                .with_context(|| format!("cargo built no {program}"))
        })
        .collect()
}

/// Runs `cargo build` and returns the programs it names.
fn build_programs(arguments: &[&str]) -> Result<Vec<PathBuf>> {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["build", "--message-format=json-render-diagnostics"])
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("`cargo build {}` failed", arguments.join(" "));
    }
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if let Some(path) = message["executable"].as_str() {
            programs.push(PathBuf::from(path));
        }
    }
    Ok(programs)
}

/// Builds the product, lays it out as a package would, and packs it together
/// with what the tests run in the guest.
///
/// # Errors
/// When the build fails or a file cannot be written.
pub fn product() -> Result<PathBuf> {
    println!("Building rcr");
    let tree = payloads().join("product");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let mut arguments = vec!["--bins"];
    for package in PRODUCT {
        arguments.extend(["--package", package]);
    }
    for program in build_programs(&arguments)? {
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let folder = match name.as_str() {
            "rcr" | "rcr-upgrade" => "usr/bin",
            "rcr-generator" => "usr/lib/systemd/system-generators",
            _ => "usr/lib/rcr",
        };
        install_program(&program, &tree, &format!("{folder}/{name}"))?;
    }
    let units = root().join("systemd/units");
    for unit in fs::read_dir(&units).with_context(|| units.display().to_string())? {
        let unit = unit?;
        let name = unit.file_name().to_string_lossy().into_owned();
        install(
            &unit.path(),
            &tree,
            &format!("usr/lib/systemd/system/{name}"),
            0o644,
        )?;
    }
    let helpers = ["rcr-workload", "rcr-plain-kexec"];
    for (program, name) in build("rcr-tests", &helpers)?.iter().zip(helpers) {
        install_program(program, &tree, &format!("usr/local/lib/{name}"))?;
    }
    pack(&tree, "product")
}

/// Copies a program without its debug information.
fn install_program(from: &Path, tree: &Path, to: &str) -> Result<()> {
    install(from, tree, to, 0o755)?;
    run(Command::new("strip").arg(tree.join(to)))
}

/// Copies a file into a tree.
///
/// # Errors
/// When it cannot be copied.
pub fn install(from: &Path, tree: &Path, to: &str, mode: u32) -> Result<()> {
    let to = tree.join(to.trim_start_matches('/'));
    fs::create_dir_all(to.parent().context("a file has a folder")?)?;
    fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
    fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// Packs a tree for [`rcr_tests::vm::Options::payload`].
///
/// # Errors
/// When it cannot be packed.
pub fn pack(tree: &Path, name: &str) -> Result<PathBuf> {
    let tar = payloads().join(format!("{name}.tar"));
    fs::create_dir_all(payloads())?;
    run(Command::new("tar")
        .args([
            "--create",
            "--owner=0",
            "--group=0",
            "--sort=name",
            "--no-recursion",
            "--file",
        ])
        .arg(&tar)
        .arg("-C")
        .arg(tree)
        .args(files(tree, Path::new(""))?))?;
    Ok(tar)
}

/// Where packed trees are. Images may be shared by several checkouts, what was
/// built from one may not.
fn payloads() -> PathBuf {
    root().join("target/payload")
}

/// Every file of a tree, without the folders: unpacking must not change the
/// mode of a folder that is there.
fn files(tree: &Path, under: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(tree.join(under))? {
        let entry = entry?;
        let path = under.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            found.extend(files(tree, &path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}
