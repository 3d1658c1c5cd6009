//! `rcr check`, `rcr dump`, `rcr restore`: one tree, no kexec.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rcr_engine::dump::{self, DumpOptions, DumpStats};
use rcr_engine::file::{FilePolicy, TcpPolicy};
use rcr_engine::freeze::freeze;
use rcr_engine::image::{DirSink, DirSource};
use rcr_engine::restore::{RestoreOptions, WORTH_WAITING, restore as restore_tree};
use rcr_engine::{Becomes, OutsidePeer, Tree};
use rcr_systemd::tags::ServiceName;
use rcr_systemd::unit::Unit;

use crate::exit::{Exit, Failure, OrExit, Refused};
use crate::service::Service;

/// A shell's exit code for a program ended by signal N is this plus N.
const SIGNALLED: i32 = 128;

/// Says whether a running unit can be carried.
pub fn check(word: &str, json: bool) -> Result<(), Failure> {
    let name = ServiceName::parse(word).or_environment()?;
    let unit = Unit::query(&name).or_environment()?;
    unit.require_running().or_environment()?;
    let service = Service::of(unit).or_environment()?;
    let (refusals, peers) = service.preflight().or_environment()?;
    let warnings = service.warnings();
    if json {
        let value = serde_json::json!({
            "unit": service.unit.id,
            "refusals": refusals,
            "warnings": warnings,
            "peers": peers,
        });
        println!("{value:#}");
    }
    for warning in warnings {
        eprintln!("rcr: warning: {warning}");
    }
    if !refusals.is_empty() {
        return Err(Failure::refused(refusals));
    }
    if !json {
        let mib = service.estimate_bytes().or_environment()? >> 20;
        let processes = service.pids.len();
        println!(
            "{} can be carried: {processes} processes, about {mib} MiB",
            service.unit.id
        );
        for line in peer_lines(&peers) {
            println!("{line}");
        }
    }
    Ok(())
}

/// What becomes of connections out of the service, a line for each peer.
fn peer_lines(peers: &[OutsidePeer]) -> Vec<String> {
    let mut counts = BTreeMap::new();
    for peer in peers {
        let becomes = match peer.becomes {
            Becomes::Reconnected => "connected again",
            Becomes::Closed => "closed, as if the other side had gone",
        };
        *counts.entry((peer.peer.as_str(), becomes)).or_insert(0) += 1;
    }
    let line = |((peer, becomes), count)| match count {
        1 => format!("  to {peer}: {becomes}"),
        _ => format!("  to {peer} ({count} times): {becomes}"),
    };
    counts.into_iter().map(line).collect()
}

/// How a tree is dumped.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpMode {
    /// Let it run on instead of killing it.
    pub leave_running: bool,
    /// What becomes of established TCP connections.
    pub tcp: TcpPolicy,
    /// Connections that wait to be accepted may be lost.
    pub skip_in_flight: bool,
    /// Its terminal is that of a shell outside.
    pub shell_job: bool,
}

/// Writes the images of the tree of `pid` into `directory`.
pub fn dump(pid: i32, directory: &Path, mode: DumpMode) -> Result<(), Failure> {
    require_root()?;
    let options = DumpOptions {
        files: FilePolicy {
            tcp: mode.tcp,
            skip_in_flight: mode.skip_in_flight,
            shell_job: mode.shell_job,
            ..FilePolicy::frozen()
        },
        ..DumpOptions::default()
    };
    if !Path::new("/proc").join(pid.to_string()).exists() {
        return Err(Failure::new(
            Exit::Environment,
            anyhow!("there is no process {pid}"),
        ));
    }
    let tree = Tree::Root(pid);
    let mut sink = DirSink::create(directory)
        .with_context(|| directory.display().to_string())
        .or_environment()?;
    let stats = match take(&tree, &mut sink, &options, mode) {
        Ok(stats) => stats,
        Err(failure) => {
            sink.discard();
            // Looked at again as it runs: all that stands in the way, not the first.
            let refusals = dump::check(&tree, &options).unwrap_or_default();
            if refusals.is_empty() {
                return Err(failure);
            }
            let refused = |refusal| Refused {
                unit: String::new(),
                refusal,
            };
            return Err(Failure::refused(
                refusals.into_iter().map(refused).collect(),
            ));
        }
    };
    println!(
        "{}: {} processes, {} threads, {} MiB of memory",
        directory.display(),
        stats.processes,
        stats.threads,
        stats.page_bytes >> 20
    );
    Ok(())
}

/// Freezes and dumps; after a failure the tree runs on.
fn take(
    tree: &Tree,
    sink: &mut DirSink,
    options: &DumpOptions,
    mode: DumpMode,
) -> Result<DumpStats, Failure> {
    let frozen = freeze(tree).or_rolled_back()?;
    let stats = dump::dump(&frozen, sink, options).or_rolled_back()?;
    if mode.leave_running {
        frozen.thaw();
    } else {
        frozen.kill();
    }
    Ok(stats)
}

/// Brings the tree in `directory` back. Unless detached, waits for its first
/// process and ends as that one does. If `lazy`, it runs before all of its
/// memory is filled.
pub fn restore(directory: &Path, detach: bool, lazy: bool) -> Result<ExitCode, Failure> {
    require_root()?;
    let source = DirSource::open(directory)
        .with_context(|| directory.display().to_string())
        .or_environment()?;
    let options = RestoreOptions {
        lazy: lazy.then_some(WORTH_WAITING),
        ..RestoreOptions::default()
    };
    let restored = restore_tree(&source, &options).or_exit(Exit::RolledBack)?;
    let root = restored.pids().first().copied();
    restored.resume().or_exit(Exit::RolledBack)?;
    let Some(root) = root.filter(|_| !detach) else {
        return Ok(ExitCode::SUCCESS);
    };
    loop {
        let code = match waitpid(Pid::from_raw(root), None).or_exit(Exit::Internal)? {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => SIGNALLED + signal as i32,
            _ => continue,
        };
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
    }
}

fn require_root() -> Result<(), Failure> {
    if crate::signals::is_root() {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Environment,
        anyhow!("this needs root: run it with sudo"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_told_once_each() {
        let peer = |peer: &str, becomes| OutsidePeer {
            pid: 7,
            comm: "a".into(),
            object: "fd 1".into(),
            peer: peer.into(),
            becomes,
        };
        let stream = "/run/systemd/journal/stdout";
        let peers = [
            peer(stream, Becomes::Reconnected),
            peer("/dev/log", Becomes::Closed),
            peer(stream, Becomes::Reconnected),
        ];
        assert_eq!(
            peer_lines(&peers),
            [
                "  to /dev/log: closed, as if the other side had gone",
                "  to /run/systemd/journal/stdout (2 times): connected again",
            ]
        );
    }
}
