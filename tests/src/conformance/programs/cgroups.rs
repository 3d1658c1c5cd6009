//! Cgroup namespaces.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "namespaces/cgroup",
        "a cgroup namespace, with a process in a cgroup below its root and one outside",
        cgroup,
    )
    .in_cgroup(),
    Case::new(
        "namespaces/cgroup-left",
        "a cgroup namespace whose processes have all left its root",
        left,
    )
    .in_cgroup()
    .refused(),
];

/// The cgroup that the program was given.
fn given() -> Result<PathBuf> {
    Ok(PathBuf::from(
        std::env::var_os("RCR_CGROUP").context("no cgroup")?,
    ))
}

/// A process's cgroup in the second hierarchy, as the caller sees it.
fn seen(pid: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("0::"));
    Ok(line.context("no cgroup2")?.to_owned())
}

fn cgroup(_: &Stage) -> Result<Check> {
    let dir = given()?;
    fs::write(dir.join("cgroup.procs"), "0")?;
    let outer = seen("self")?;
    let member = Member::start("the first inside", move || {
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        ensure!(seen("self")? == "/", "not the root");
        let inner = dir.join("inner");
        fs::create_dir_all(&inner)?;
        let below = Member::start("one below", move || {
            fs::write(inner.join("cgroup.procs"), "0")?;
            Ok(Box::new(|f: &mut Findings| {
                f.same("its cgroup", "/inner", seen("self")?.as_str());
                Ok(())
            }) as Check)
        })?;
        let child = below.pid.to_string();
        Ok(Box::new(move |f: &mut Findings| {
            f.same("its cgroup", "/", seen("self")?.as_str());
            f.same("its child's", "/inner", seen(&child)?.as_str());
            below.check(f)
        }) as Check)
    })?;
    let inside = member.pid.to_string();
    Ok(Box::new(move |f| {
        f.same("cgroup", &outer, &seen("self")?);
        f.same("the cgroup of the one inside", &outer, &seen(&inside)?);
        member.check(f)
    }))
}

fn left(stage: &Stage) -> Result<Check> {
    let dir = given()?;
    fs::write(dir.join("cgroup.procs"), "0")?;
    let member = Member::start("who has left", move || {
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        let inner = dir.join("inner");
        fs::create_dir_all(&inner)?;
        fs::write(inner.join("cgroup.procs"), "0")?;
        Ok(Box::new(|f: &mut Findings| {
            f.same("its cgroup", "/inner", seen("self")?.as_str());
            Ok(())
        }) as Check)
    })?;
    stage.expect_refusal(&[
        member.pid.to_string(),
        "cgroup namespace".into(),
        "0::/inner".into(),
    ])?;
    Ok(Box::new(move |f| member.check(f)))
}
