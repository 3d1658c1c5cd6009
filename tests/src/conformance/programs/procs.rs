//! File systems of the kernel's that belong to a namespace of the tree.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, fork};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "pid-namespaces/proc",
        "a /proc that shows the PID namespace of the tree, parts of it read-only or covered",
        own,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/proc-below",
        "a /proc that shows a PID namespace below the tree's, seen from above",
        below,
    ),
    Case::new(
        "pid-namespaces/proc-two",
        "two /proc in one mount namespace, of two PID namespaces",
        two,
    ),
    Case::new(
        "pid-namespaces/proc-foreign",
        "a /proc of a PID namespace that no process of the tree is in",
        foreign,
    )
    .refused(),
];

const NONE: Option<&str> = None;

fn separate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    Ok(())
}

fn mount_proc(place: impl AsRef<Path>) -> Result<()> {
    let place = place.as_ref();
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("proc"), place, Some("proc"), quiet, NONE)
        .with_context(|| format!("proc on {}", place.display()))
}

fn bind(from: &str, to: &str, flags: MsFlags) -> Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)?;
    let all = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    mount(NONE, to, NONE, all, NONE).with_context(|| format!("bind of {to}"))
}

/// The processes that a proc shows.
fn shown(place: impl AsRef<Path>) -> Result<Vec<i32>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(place.as_ref())? {
        ids.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok()),
        );
    }
    ids.sort_unstable();
    Ok(ids)
}

fn idle(name: &str) -> Result<Member> {
    Member::start(name, || Ok(Box::new(|_: &mut Findings| Ok(())) as Check))
}

/// What a task sees of its mounts, without their numbers.
fn mounts() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let lines = text.lines().filter_map(|l| {
        let (_, mount) = l
            .split_once(" / /proc")
            .or_else(|| l.split_once(" /proc/"))?;
        Some(mount.to_owned())
    });
    let mut lines: Vec<String> = lines.collect();
    lines.sort();
    Ok(lines)
}

fn own(_: &Stage) -> Result<Check> {
    ensure!(std::process::id() == 1, "not the first process");
    separate()?;
    mount_proc("/proc")?;
    let child = idle("its child")?;
    bind("/proc/sys", "/proc/sys", MsFlags::MS_RDONLY)?;
    let cover = Some("size=0");
    mount(
        Some("tmpfs"),
        "/proc/irq",
        Some("tmpfs"),
        MsFlags::MS_RDONLY,
        cover,
    )?;
    bind("/dev/null", "/proc/filesystems", MsFlags::empty())?;
    let (ids, before) = (shown("/proc")?, mounts()?);
    ensure!(ids == [1, 2], "{ids:?}");
    Ok(Box::new(move |f| {
        f.same("processes", &ids, &shown("/proc")?);
        f.same("mounts on /proc", &before, &mounts()?);
        let me = fs::read_link("/proc/self")?;
        f.same("itself", Path::new("1"), me.as_path());
        let name = fs::read_to_string("/proc/2/comm")?;
        f.same("its child", &fs::read_to_string("/proc/self/comm")?, &name);
        let forbidden = fs::write("/proc/sys/kernel/hostname", "x");
        let errno = forbidden.err().and_then(|e| e.raw_os_error());
        f.same("settings are read-only", &Some(libc::EROFS), &errno);
        f.same(
            "a covered directory",
            &0,
            &fs::read_dir("/proc/irq")?.count(),
        );
        f.same("a covered file", &0, &fs::read("/proc/filesystems")?.len());
        child.check(f)
    }))
}

/// A process that is in the caller's mount namespace, and the first of a PID
/// namespace that it shows at a place.
fn first_at(name: &str, place: &Path) -> Result<Member> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let place = place.to_owned();
    Member::start(name, move || {
        mount_proc(&place)?;
        let child = idle("its child")?;
        Ok(Box::new(move |f: &mut Findings| {
            f.same("processes", &vec![1, 2], &shown(&place)?);
            let me = fs::read_link(place.join("self"))?;
            f.same("itself", Path::new("1"), me.as_path());
            child.check(f)
        }) as Check)
    })
}

fn below(stage: &Stage) -> Result<Check> {
    let place = stage.path("proc");
    fs::create_dir(&place)?;
    let member = Member::start("the parent", move || {
        separate()?;
        let first = first_at("the first", &place)?;
        Ok(Box::new(move |f: &mut Findings| {
            f.same("processes", &vec![1, 2], &shown(&place)?);
            let none = fs::read_link(place.join("self"));
            f.that("who looks is not among them", none.is_err());
            first.check(f)
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn two(stage: &Stage) -> Result<Check> {
    let places = ["one", "two"].map(|name| stage.path(name));
    for place in &places {
        fs::create_dir(place)?;
    }
    let member = Member::start("the parent of both", move || {
        separate()?;
        let [one, two] = places;
        let sides = [(one, "one"), (two, "another")].map(|(place, name)| {
            Member::start(name, move || {
                let first = first_at("the first", &place)?;
                Ok(Box::new(move |f: &mut Findings| first.check(f)) as Check)
            })
        });
        let [one, two] = sides;
        let (one, two) = (one?, two?);
        Ok(Box::new(move |f: &mut Findings| {
            one.check(f)?;
            two.check(f)
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn foreign(stage: &Stage) -> Result<Check> {
    let place = stage.path("proc");
    fs::create_dir(&place)?;
    separate()?;
    let there = place.clone();
    stage.outsider(move || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        // SAFETY: there is one thread, so no lock is held that the child would miss.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => drop(nix::sys::wait::waitpid(child, None)?),
            ForkResult::Child => {
                let with_parent = nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGKILL);
                if with_parent.is_err() || mount_proc(&there).is_err() {
                    std::process::exit(1);
                }
                loop {
                    nix::unistd::pause();
                }
            }
        }
        Ok(())
    })?;
    while !place.join("1").exists() {
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    stage.expect_refusal(&["PID namespace".into(), place.display().to_string()])?;
    Ok(Box::new(move |f| {
        f.that("it is still shown", place.join("1").exists());
        Ok(())
    }))
}
