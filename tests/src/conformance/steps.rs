//! The engine's steps, each in a process of its own: ptrace belongs to a
//! thread, and a restore starts from a process with a single one.

use std::error::Error;
use std::path::{Path, PathBuf};

use rcr_engine::dump::{self, DumpError, DumpOptions};
use rcr_engine::file::{FilePolicy, TcpPolicy};
use rcr_engine::freeze::FreezeError;
use rcr_engine::image::{DirSink, DirSource};
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
    /// What becomes of connections.
    pub tcp: TcpPolicy,
}

/// Preflight, freeze, dump, then thaw or kill. Refusals are printed, those of
/// the preflight first, with a word in front that says whose they are.
pub fn dump(step: &DumpStep) -> anyhow::Result<i32> {
    let options = |files: FilePolicy| DumpOptions {
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
    match dump::dump(&frozen, &mut sink, &options(FilePolicy::frozen())) {
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

fn print(who: &str, refusals: &[Refusal]) {
    for r in refusals {
        println!("{who}: {r}");
    }
}

/// Images into running processes.
pub fn restore(images: &Path, cgroup_mount: Option<&Path>) -> anyhow::Result<()> {
    let source = DirSource::open(images)?;
    let options = RestoreOptions {
        cgroup_mount: cgroup_mount.map(Path::to_owned),
        ..RestoreOptions::default()
    };
    let restored = restore::restore(&source, &options).map_err(chain)?;
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
