//! The unit's cgroup as systemd will find it (cgroup v2).

use std::fs;
use std::io;
use std::path::{Component, Path};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// Controllers that account memory and processes to the cgroup they are first
/// used in. What is charged is not moved when systemd enables them later.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// How long killed processes may take to be gone.
const GONE_WAIT: Duration = Duration::from_secs(10);

/// Whether `path` is a cgroup below the root.
pub fn check_path(path: &str) -> anyhow::Result<()> {
    let mut components = Path::new(path).components();
    ensure!(
        components.next() == Some(Component::RootDir)
            && path.len() > 1
            && components.all(|part| matches!(part, Component::Normal(_))),
        "{path:?} is no cgroup of a unit"
    );
    Ok(())
}

/// Makes the cgroup at `dir` with the controllers that charge enabled on the way
/// from `root`.
pub fn create(root: &Path, dir: &Path) -> anyhow::Result<()> {
    let mut at = root.to_path_buf();
    for name in dir.strip_prefix(root)?.components() {
        enable_controllers(&at)?;
        at.push(name);
        match fs::create_dir(&at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("making cgroup {}", at.display()));
            }
            _ => {}
        }
    }
    let populated = is_populated(&at)?;
    ensure!(!populated, "cgroup {} has processes already", at.display());
    Ok(())
}

fn enable_controllers(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("cgroup.controllers");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let path = dir.join("cgroup.subtree_control");
    for name in CONTROLLERS {
        // A kernel may be booted without one (cgroup_disable=).
        if text.split_ascii_whitespace().any(|word| word == name) {
            fs::write(&path, format!("+{name}")).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Kills everything in the cgroup and below, and removes it. One that does not
/// exist is well.
pub fn kill_and_remove(dir: &Path) -> anyhow::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let kill = dir.join("cgroup.kill");
    fs::write(&kill, "1").with_context(|| kill.display().to_string())?;
    let started = Instant::now();
    while is_populated(dir)? {
        if started.elapsed() > GONE_WAIT {
            bail!("{}: killed processes are still there", dir.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    remove(dir).with_context(|| format!("removing cgroup {}", dir.display()))
}

fn remove(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

fn is_populated(dir: &Path) -> anyhow::Result<bool> {
    let path = dir.join("cgroup.events");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.lines().any(|line| line == "populated 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_root_are_cgroups() {
        assert!(check_path("/system.slice/a.service").is_ok());
        for path in ["", "/", "a", "/a/../b", "/..", "a/b"] {
            assert!(check_path(path).is_err(), "{path:?}");
        }
    }
}
