//! Descriptors of namespaces: `/proc/PID/ns/KIND`, opened.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use super::RestoreEnv;
use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::record::{RcrFile, RcrNamespaceFd};
use crate::image::schema::{FdTypes, NsFileEntry};

/// Kinds by their names, with their `CLONE_NEW*` and the numbers that the
/// host's own have in the images.
const KINDS: [(&str, i32, u32); 8] = [
    ("pid", libc::CLONE_NEWPID, 1),
    ("net", libc::CLONE_NEWNET, 2),
    ("ipc", libc::CLONE_NEWIPC, 3),
    ("uts", libc::CLONE_NEWUTS, 4),
    ("mnt", libc::CLONE_NEWNS, 5),
    ("user", libc::CLONE_NEWUSER, 6),
    ("cgroup", libc::CLONE_NEWCGROUP, 7),
    ("time", 0x80, 8),
];

/// Kinds that exist again before any process takes its descriptors.
const MADE_FIRST: [&str; 5] = ["mnt", "uts", "user", "net", "ipc"];

/// Saves which kind it is, and whether it is the host's.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let name = file.link.split(':').next().unwrap_or_default();
    let Some((kind, flag, host_number)) = KINDS.into_iter().find(|k| k.0 == name) else {
        let reason = format!("{} is of a kind that is not known", file.link);
        return refuse("namespace descriptor", reason, "untag the unit");
    };
    let host = inode("self", kind) == Some(file.stat.st_ino);
    saved.extra.namespace = Some(RcrNamespaceFd {
        kind: kind.to_owned(),
        host,
        pid: None,
    });
    saved.entry.r#type = FdTypes::Ns.into();
    saved.entry.nsf = Some(NsFileEntry {
        id: saved.entry.id,
        ns_id: if host { host_number } else { 0 },
        ns_cflag: flag as u32,
        flags: file.flags(),
    });
    Ok(())
}

/// Finds a process of the tree that lives in it.
pub(crate) fn settle(saved: &mut Saved, pids: impl Iterator<Item = i32>) -> Result<(), Stop> {
    let wanted = saved.found.inode.1;
    let Some(ns) = saved.extra.namespace.as_mut().filter(|ns| !ns.host) else {
        return Ok(());
    };
    let lives = |pid: &i32| inode(&pid.to_string(), &ns.kind) == Some(wanted);
    ns.pid = pids.into_iter().find(lives);
    if ns.pid.is_some() && MADE_FIRST.contains(&ns.kind.as_str()) {
        return Ok(());
    }
    if ns.pid.is_some() {
        let reason = format!(
            "descriptors of the service's own {} namespace are not carried",
            ns.kind
        );
        return refuse("namespace descriptor", reason, "untag the unit");
    }
    refuse(
        "namespace descriptor",
        format!(
            "no process of the service lives in that {} namespace",
            ns.kind
        ),
        "untag the unit",
    )
}

fn inode(pid: &str, kind: &str) -> Option<u64> {
    let at = std::fs::metadata(format!("/proc/{pid}/ns/{kind}"));
    at.ok().map(|m| m.ino())
}

/// Opens it.
pub(crate) fn restore(
    extra: Option<&RcrFile>,
    env: &dyn RestoreEnv,
) -> Result<OwnedFd, BuildError> {
    let missing = || BuildError::Images("a namespace descriptor without its part".into());
    let ns = extra
        .and_then(|e| e.namespace.as_ref())
        .ok_or_else(missing)?;
    let pid = ns.pid.filter(|_| !ns.host);
    env.namespace(&ns.kind, pid)
        .map_err(|source| BuildError::Env {
            what: format!(
                "{} namespace of {}",
                ns.kind,
                pid.map_or("the host".into(), |p| format!("process {p}"))
            ),
            source,
        })
}
