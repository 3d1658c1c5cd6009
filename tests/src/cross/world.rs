//! The root as a world of its own: mounts, processes, network.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, fork, pivot_root};

/// Runs `inside` as the first process of a world with this root, in which our
/// program stands as [`super::OURS`]. It keeps the standard descriptors and
/// `kept`. Returns its exit code.
pub fn enter(
    root: &Path,
    ours: &Path,
    kept: Option<BorrowedFd<'_>>,
    inside: impl FnOnce() -> i32,
) -> Result<i32> {
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC,
    )
    .context("unshare")?;
    // SAFETY: this program has a single thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => loop {
            match waitpid(child, None)? {
                WaitStatus::Exited(_, code) => return Ok(code),
                WaitStatus::Signaled(_, signal, _) => return Ok(128 + signal as i32),
                _ => {}
            }
        },
        ForkResult::Child => {
            let code = match furnish(root, ours, kept) {
                Ok(()) => inside(),
                Err(e) => {
                    eprintln!("{e:#}");
                    1
                }
            };
            std::process::exit(code);
        }
    }
}

fn furnish(root: &Path, ours: &Path, kept: Option<BorrowedFd<'_>>) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("/")?;
    mount(Some(root), root, none, MsFlags::MS_BIND, none).context("root")?;
    for (kind, at) in [
        ("proc", "proc"),
        ("sysfs", "sys"),
        ("tmpfs", "run"),
        ("tmpfs", "tmp"),
        ("tmpfs", "dev"),
    ] {
        let target = root.join(at);
        mount(Some(kind), &target, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("{kind} on {at}"))?;
    }
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let node = root.join("dev").join(name);
        fs::write(&node, "")?;
        let from = Path::new("/dev").join(name);
        mount(Some(&from), &node, none, MsFlags::MS_BIND, none).context(name)?;
    }
    fs::create_dir(root.join("run/rcr"))?;
    fs::copy(ours, root.join("run/rcr/criu")).context("our program")?;
    let old = root.join("tmp/old");
    fs::create_dir(&old)?;
    pivot_root(root, &old).context("pivot_root")?;
    chdir("/")?;
    umount2("/tmp/old", MntFlags::MNT_DETACH).context("the old root")?;
    fs::remove_dir("/tmp/old")?;
    loopback_up().context("loopback")?;
    // Nothing of the world outside is to be inherited.
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    let kept = kept.map(|fd| fd.as_raw_fd());
    close_others(&[Some(null.as_raw_fd()), kept])
}

fn loopback_up() -> Result<()> {
    let status = std::process::Command::new("/bin/ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    anyhow::ensure!(status.success(), "ip: {status}");
    Ok(())
}

/// Closes what this program was started with, beyond the standard three.
fn close_others(spared: &[Option<i32>]) -> Result<()> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let number: i32 = entry?.file_name().to_string_lossy().parse()?;
        numbers.push(number);
    }
    for n in numbers
        .into_iter()
        .filter(|&n| n > 2 && !spared.contains(&Some(n)))
    {
        // The listing's own descriptor is among them and gone already.
        let _ = nix::unistd::close(n);
    }
    Ok(())
}

/// Ends every other process of this world.
pub fn end_all() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    while waitpid(None, None).is_ok() {}
}
