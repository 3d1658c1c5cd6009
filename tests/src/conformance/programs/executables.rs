//! Executables without their names, and probed ones.

use std::fs::{self, File};
use std::os::fd::FromRawFd;

use anyhow::{Context, Result, ensure};

use crate::conformance::case::Unavailable;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "mappings/deleted-executable",
        "a process whose executable was deleted",
        deleted_executable,
    ),
    Case::new(
        "mappings/replaced-executable",
        "a process whose executable was replaced, as by an upgrade of its package",
        replaced_executable,
    ),
    Case::new(
        "mappings/uprobes",
        "a process that was probed (uprobes)",
        uprobes,
    )
    .refused(),
];

/// Starts a copy of a system program and waits until it is that.
fn start_copy(stage: &Stage) -> Result<(std::path::PathBuf, std::process::Child)> {
    let path = stage.path("sleeper");
    fs::copy("/bin/sleep", &path)?;
    let child = std::process::Command::new(&path)
        .arg("1000")
        .stdin(std::process::Stdio::null())
        .spawn()?;
    let exe = format!("/proc/{}/exe", child.id());
    while fs::read_link(&exe)? != path {
        std::thread::sleep(crate::conformance::stage::POLL);
    }
    Ok((path, child))
}

/// The program runs, from an executable that has the right content and no name.
fn nameless(child: &std::process::Child) -> Result<bool> {
    let exe = format!("/proc/{}/exe", child.id());
    let link = fs::read_link(&exe)?;
    let deleted = link.to_string_lossy().ends_with(" (deleted)");
    Ok(deleted && fs::read(&exe)? == fs::read("/bin/sleep")?)
}

fn deleted_executable(stage: &Stage) -> Result<Check> {
    let (path, child) = start_copy(stage)?;
    fs::remove_file(path)?;
    Ok(Box::new(move |f| {
        f.that("its executable", nameless(&child)?);
        Ok(())
    }))
}

fn replaced_executable(stage: &Stage) -> Result<Check> {
    let (path, child) = start_copy(stage)?;
    let newer = stage.path("newer");
    fs::write(&newer, "#!/bin/sh\n")?;
    fs::rename(newer, &path)?;
    Ok(Box::new(move |f| {
        f.that("its executable", nameless(&child)?);
        let there = fs::read_to_string(&path)?;
        f.same("what has its name", "#!/bin/sh\n", &there);
        Ok(())
    }))
}

// What is probed: its first instruction is one that the kernel does not emulate.
std::arch::global_asm!(
    ".globl rcr_conformance_probed",
    "rcr_conformance_probed:",
    "lea rax, [rdi + 1]",
    "ret",
);

unsafe extern "C" {
    safe fn rcr_conformance_probed(n: u64) -> u64;
}

/// Makes the kernel probe a function of ours.
fn probe() -> Result<File> {
    let unavailable = |what: &str, e: &dyn std::fmt::Display| {
        Unavailable::because(format!("uprobes: {what}: {e}"))
    };
    let kind = fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")
        .map_err(|e| unavailable("type", &e))?;
    let at = rcr_conformance_probed as *const () as usize;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut offset = None;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (start, end) = words[0].split_once('-').context("maps")?;
        let hex = |s| usize::from_str_radix(s, 16);
        if (hex(start)?..hex(end)?).contains(&at) {
            offset = Some(at - hex(start)? + hex(words[2])?);
        }
    }
    let path = std::ffi::CString::new(fs::read_link("/proc/self/exe")?.to_str().context("path")?)?;
    // struct perf_event_attr: type, size; config1 and config2 name the place.
    let mut attr = [0_u64; 16];
    attr[0] = kind.trim().parse::<u64>()? | 128 << 32;
    attr[7] = path.as_ptr() as u64;
    attr[8] = offset.context("no such code")? as u64;
    let args = [attr.as_ptr() as u64, 0, u64::MAX, u64::MAX, 0, 0];
    // SAFETY: the attributes and the path live through the call.
    let fd = unsafe { sys::call(libc::SYS_perf_event_open, args) }
        .map_err(|e| unavailable("perf_event_open", &e))?;
    // SAFETY: just given to us.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn uprobes(stage: &Stage) -> Result<Check> {
    let event = probe()?;
    ensure!(rcr_conformance_probed(1) == 2);
    drop(event);
    let maps = fs::read_to_string("/proc/self/maps")?;
    if !maps.contains("[uprobes]") {
        return Err(Unavailable::because("the probe needed no memory"));
    }
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        "[uprobes]".to_owned(),
        "probed".to_owned(),
    ])?;
    Ok(Box::new(|f| {
        f.same("the function's value", &2, &rcr_conformance_probed(1));
        Ok(())
    }))
}
