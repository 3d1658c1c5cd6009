//! Mount namespaces with a root directory of their own, as containers have.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::conformance::case::Unavailable;
use crate::conformance::{Case, Check, Findings, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[Case::new(
    "roots/pivoted",
    "a root directory by pivot_root, with /usr of the host and file systems of its own",
    pivoted,
)];

const NONE: Option<&str> = None;

/// Makes `root` the root directory of a new mount namespace.
fn enter(root: &Path) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some(root), root, NONE, MsFlags::MS_BIND, NONE)?;
    let usr = root.join("usr");
    mount(Some("/usr"), &usr, NONE, MsFlags::MS_BIND, NONE)?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("proc"), &root.join("proc"), Some("proc"), quiet, NONE)?;
    mount(
        Some("tmpfs"),
        &root.join("run"),
        Some("tmpfs"),
        quiet,
        Some("mode=755"),
    )?;
    let _ = fs::write(root.join("run/note"), "in memory");
    nix::unistd::chdir(root)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")
}

/// What a process's mounts are, without numbers.
fn mounts(pid: u32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let lines = text.lines().map(|l| {
        let words: Vec<&str> = l.split(' ').collect();
        words[3..].join(" ")
    });
    Ok(lines.collect())
}

fn pivoted(stage: &Stage) -> Result<Check> {
    let root: PathBuf = stage.path("root");
    fs::create_dir(&root)?;
    for dir in ["usr", "proc", "run"] {
        fs::create_dir(root.join(dir))?;
    }
    for link in ["bin", "lib", "lib64"] {
        match fs::read_link(Path::new("/").join(link)) {
            Ok(to) => std::os::unix::fs::symlink(to, root.join(link))?,
            Err(_) => return Err(Unavailable::because(format!("/{link} is no link to /usr"))),
        }
    }
    fs::write(root.join("marker"), "of the new root")?;
    let mut sleep = Command::new("/usr/bin/sleep");
    sleep.arg("100000").env_clear();
    // SAFETY: this program has one thread, so what the child does between fork and
    // exec is not bound to signal-safe calls.
    unsafe {
        sleep.pre_exec(move || {
            enter(&root)?;
            // Those of the program lead out of the new root.
            libc::close_range(0, 2, 0);
            Ok(())
        });
    }
    let child = sleep.spawn().context("sleep")?;
    let pid = child.id();
    // Until it runs its program.
    while fs::read_link(format!("/proc/{pid}/exe"))? != Path::new("/usr/bin/sleep") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let before = mounts(pid)?;
    Ok(Box::new(move |f: &mut Findings| {
        f.same("mounts", &before, &mounts(pid)?);
        let inside = PathBuf::from(format!("/proc/{pid}/root"));
        let read = |name: &str| fs::read_to_string(inside.join(name));
        f.same(
            "a file of the new root",
            "of the new root",
            read("marker")?.as_str(),
        );
        f.same("a file in memory", "in memory", read("run/note")?.as_str());
        f.that("not the host's root", !inside.join("etc").exists());
        let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
        f.same("its program", Path::new("/usr/bin/sleep"), exe.as_path());
        Ok(())
    }))
}
