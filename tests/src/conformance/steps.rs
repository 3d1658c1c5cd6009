//! The engine's steps, each in a process of its own: ptrace belongs to a
//! thread, and a restore starts from a process with a single one.

use std::error::Error;
use std::path::{Path, PathBuf};

use rcr_engine::dump::{self, DumpError, DumpOptions};
use rcr_engine::file::{FilePolicy, TcpPolicy};
use rcr_engine::freeze::FreezeError;
use rcr_engine::image::{DirSink, DirSource};
use rcr_engine::predump::{self, Parent, PreDumpOptions};
use rcr_engine::restore::{self, RestoreOptions};
use rcr_engine::{Refusal, Tree, freeze};

/// Exit status of a dump that was refused.
pub const REFUSED: i32 = 3;

/// What a dump is made of.
#[derive(Debug, Clone)]
pub struct DumpStep {
    /// The tree.
    pub tree: Tree,
    /// Where the images go.
    pub images: PathBuf,
    /// The tree goes on afterwards.
    pub leave_running: bool,
    /// Pages in common are written once.
    pub pages_once: bool,
    /// What becomes of connections.
    pub tcp: TcpPolicy,
    /// Images of a pre-dump that these refer to.
    pub parent: Option<PathBuf>,
}

/// Preflight, freeze, dump, then thaw or kill. Refusals are printed, those of
/// the preflight first, with a word in front that says whose they are.
pub fn dump(step: &DumpStep) -> anyhow::Result<i32> {
    let previous = step.parent.as_deref().map(DirSource::open).transpose()?;
    let tracked = match &previous {
        Some(source) => predump::tracked(source).map_err(chain)?,
        None => Vec::new(),
    };
    let options = |files: FilePolicy| DumpOptions {
        pages_once: step.pages_once,
        tracked: tracked.iter().copied().collect(),
        files: FilePolicy {
            tcp: step.tcp,
            ..files
        },
        ..DumpOptions::default()
    };
    let found = dump::check(&step.tree, &options(FilePolicy::live())).map_err(chain)?;
    print("preflight", &found);
    let frozen = match freeze::freeze(&step.tree) {
        Ok(frozen) => frozen,
        Err(FreezeError::Refused(refusal)) => {
            print("dump", &[refusal]);
            return Ok(REFUSED);
        }
        Err(e) => return Err(chain(e)),
    };
    let mut sink = DirSink::create(&step.images)?;
    let parent = parent(previous.as_ref())?;
    if let (Some(path), Some(_)) = (&step.parent, &parent) {
        sink.set_parent(path)?;
    }
    let options = options(FilePolicy::frozen());
    let done = match &parent {
        Some(parent) => dump::dump_onto(&frozen, &mut sink, &options, parent),
        None => dump::dump(&frozen, &mut sink, &options),
    };
    match done {
        Ok(_) if step.leave_running => frozen.thaw(),
        Ok(_) => frozen.kill(),
        Err(DumpError::Refused(refusals)) => {
            print("dump", &refusals);
            return Ok(REFUSED);
        }
        Err(e) => return Err(chain(e)),
    }
    Ok(0)
}

/// Memory of a running tree, on top of an earlier pre-dump if there is one.
pub fn pre_dump(
    tree: &Tree,
    images: &Path,
    previous: Option<&Path>,
    pages_once: bool,
) -> anyhow::Result<()> {
    let source = previous.map(DirSource::open).transpose()?;
    let parent = parent(source.as_ref())?;
    if previous.is_some() && parent.is_none() {
        anyhow::bail!("nobody kept the tracking");
    }
    let mut sink = DirSink::create(images)?;
    if let Some(path) = previous {
        sink.set_parent(path)?;
    }
    let options = PreDumpOptions {
        keep: true,
        pages_once,
    };
    predump::pre_dump(tree, parent, &mut sink, options).map_err(chain)?;
    Ok(())
}

fn parent(images: Option<&DirSource>) -> anyhow::Result<Option<Parent<'_>>> {
    let Some(images) = images else {
        return Ok(None);
    };
    let tracking = predump::take(images).map_err(chain)?;
    Ok(tracking.map(|tracking| Parent { images, tracking }))
}

fn print(who: &str, refusals: &[Refusal]) {
    for r in refusals {
        println!("{who}: {r}");
    }
}

/// Images into running processes.
pub fn restore(images: &Path, cgroup_mount: Option<&Path>, lazy: bool) -> anyhow::Result<()> {
    let source = DirSource::open(images)?;
    let options = RestoreOptions {
        cgroup_mount: cgroup_mount.map(Path::to_owned),
        // However little it is.
        lazy: lazy.then_some(1),
        ..RestoreOptions::default()
    };
    let restored = restore::restore(&source, &options).map_err(chain)?;
    if let Some(pager) = restored.pager() {
        println!("{pager}");
    }
    restored.resume().map_err(chain)
}

/// The engine's errors do not repeat their sources: all in one line.
fn chain(e: impl Error) -> anyhow::Error {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text = format!("{text}: {e}");
        source = e.source();
    }
    anyhow::Error::msg(text)
}
