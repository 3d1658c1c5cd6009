//! The built programs and where they are installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::run;
use crate::{root, vm_dir};

/// Builds programs of one package and returns where they are.
///
/// # Errors
/// When the build fails.
pub fn build(package: &str, programs: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(root())
        .args(["build", "--quiet", "--package", package]);
    for program in programs {
        command.args(["--bin", program]);
    }
    run(&mut command)?;
    let folder = root().join("target/x86_64-unknown-linux-gnu/debug");
    Ok(programs
        .iter()
        .map(|program| folder.join(program))
        .collect())
}

/// Copies a file into a tree, without debug information.
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
    let tar = vm_dir().join(format!("{name}.tar"));
    fs::create_dir_all(vm_dir())?;
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
