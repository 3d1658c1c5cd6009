//! The engine as this program calls it for services.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use rcr_engine::dump::{self, Checked, DumpOptions, DumpStats};
use rcr_engine::file::{FilePolicy, TcpPolicy, UnixPolicy};
use rcr_engine::freeze::{Frozen, freeze as freeze_tree};
use rcr_engine::image::ImageSink;
use rcr_engine::predump::Parent;
use rcr_engine::{Tree, content};
use rcr_systemd::handover::{OutputKind, OutputStream, RUNTIME_TREE};

const STDERR: i32 = 2;

/// Pages that processes have in common take memory once.
pub const PAGES_ONCE: bool = true;

/// How often a service is looked at in which something stands in the way.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(30);

/// How services are carried: connections of clients go on.
fn options() -> DumpOptions {
    DumpOptions {
        files: FilePolicy {
            tcp: TcpPolicy::Carry,
            // Connections that no program has seen yet end as at a restart.
            skip_in_flight: true,
            unix: UnixPolicy::Reopened,
            ..FilePolicy::frozen()
        },
        pages_once: PAGES_ONCE,
        ..DumpOptions::default()
    }
}

/// Everything that stands in the way of a tree, and what becomes of connections
/// that lead out of it.
pub fn preflight(tree: &Tree) -> Result<Checked> {
    let mut checked = dump::examine(tree, &options())?;
    for _ in 1..LOOKS {
        if checked.refusals.is_empty() {
            break;
        }
        // The service is at work: what it does at this moment is no obstacle.
        std::thread::sleep(BETWEEN_LOOKS);
        checked = dump::examine(tree, &options())?;
    }
    Ok(checked)
}

/// About how many bytes a tree's images take.
pub fn estimate_bytes(tree: &Tree) -> Result<u64> {
    Ok(dump::estimate_bytes(tree, &options())?)
}

/// About how many bytes files on tmpfs take.
pub fn estimate_files(paths: &[PathBuf]) -> Result<u64> {
    Ok(content::estimate_paths(root()?.as_fd(), paths)?)
}

/// Stops every thread of a tree.
pub fn freeze(tree: &Tree) -> Result<Frozen> {
    Ok(freeze_tree(tree)?)
}

/// Writes a frozen tree's images. What is in `parent` and was not written to
/// since stays there.
pub fn dump(
    frozen: &Frozen,
    sink: &mut dyn ImageSink,
    parent: Option<&Parent<'_>>,
) -> Result<DumpStats> {
    Ok(match parent {
        Some(parent) => dump::dump_onto(frozen, sink, &options(), parent)?,
        None => dump::dump(frozen, sink, &options())?,
    })
}

/// The descriptors that lead to the journal, for the manifest.
pub fn journal_streams(stats: &DumpStats) -> Vec<OutputStream> {
    let kind = |fd| {
        if fd == STDERR {
            OutputKind::Stderr
        } else {
            OutputKind::Stdout
        }
    };
    stats
        .journal
        .iter()
        .map(|stream| OutputStream {
            pid: stream.pid,
            fd: stream.fd,
            kind: kind(stream.fd),
        })
        .collect()
}

/// Writes files on tmpfs.
pub fn save_files(paths: &[PathBuf], sink: &mut dyn ImageSink) -> Result<()> {
    if !paths.is_empty() {
        content::save_paths(root()?.as_fd(), paths, RUNTIME_TREE, sink)?;
    }
    Ok(())
}

fn root() -> Result<File> {
    File::open("/").context("/")
}
