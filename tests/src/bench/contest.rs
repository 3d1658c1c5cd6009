//! Trees dumped into a directory and restored from it, by both tools in turn.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::load::Load;
use super::row::Row;
use super::tool::{Took, Tool};
use super::tree::LoadTree;

/// What is compared, with the least ratio for dump and for restore.
const LOADS: &[(Load, f64)] = &[
    (Load::Sleep, 2.0),
    (Load::Flat(100), 2.0),
    (Load::Chain(100), 2.0),
    (Load::Threads(200), 2.0),
    (Load::Files(5000), 2.0),
    (Load::Eventfds(5000), 2.0),
    (Load::Vmas(10_000), 2.0),
    // The peer stops at 1,024 pipes.
    (Load::Pipes(5000), 1.0),
    (Load::Small(1024), 2.0),
    (Load::Huge(1024), 2.0),
];

/// How the contest is run.
#[derive(Debug)]
pub struct Contest {
    /// Our tool.
    pub ours: Tool,
    /// The other one.
    pub peer: Option<Tool>,
    /// Where images go: a folder on tmpfs.
    pub dir: PathBuf,
    /// Samples of each.
    pub samples: usize,
}

/// Samples of one tool, milliseconds.
#[derive(Debug, Default)]
struct Samples {
    dump: Vec<f64>,
    frozen: Vec<f64>,
    restore: Vec<f64>,
    failure: Option<String>,
}

impl Contest {
    /// Runs the loads whose name contains `only`; `done` is given each row at once.
    ///
    /// # Errors
    /// When ours fails, or a load does not start.
    pub fn run(&self, only: Option<&str>, done: &mut dyn FnMut(Row)) -> Result<()> {
        for (load, bar) in LOADS {
            let name = load.name();
            if only.is_some_and(|o| !name.contains(o)) {
                continue;
            }
            let (mut ours, mut peer) = (Samples::default(), Samples::default());
            // The first round warms caches and is not counted.
            for round in 0..=self.samples {
                let (dump, restore) = self.once(&self.ours, *load).with_context(|| name.clone())?;
                if round > 0 {
                    ours.add(dump, restore);
                }
                let Some(tool) = &self.peer else { continue };
                if peer.failure.is_some() {
                    continue;
                }
                match self.once(tool, *load) {
                    Ok((dump, restore)) if round > 0 => peer.add(dump, restore),
                    Ok(_) => {}
                    Err(e) => peer = Samples::failed(&e),
                }
            }
            let note = peer.failure.clone().unwrap_or_default();
            let row = |what: &str, a: &[f64], b: &[f64]| {
                Row::compare(format!("{what} {name}"), "ms", a, b, *bar).noting(&note)
            };
            done(row("dump", &ours.dump, &peer.dump));
            if !ours.frozen.is_empty() {
                done(row("frozen", &ours.frozen, &peer.frozen));
            }
            done(row("restore", &ours.restore, &peer.restore));
        }
        Ok(())
    }

    /// One dump and restore of a fresh tree.
    pub(super) fn once(&self, tool: &Tool, load: Load) -> Result<(Took, Took)> {
        let tree = LoadTree::start(load, &self.dir.join("load"))?;
        let images = self.dir.join("images");
        fs::create_dir_all(&images)?;
        let result = round(tool, &tree, &images);
        drop(tree);
        fs::remove_dir_all(&images)?;
        result
    }
}

fn round(tool: &Tool, tree: &LoadTree, images: &Path) -> Result<(Took, Took)> {
    let dump = tool.dump(tree.pid, images)?;
    tree.await_gone()?;
    let restore = tool.restore(images)?;
    tree.check()?;
    Ok((dump, restore))
}

impl Samples {
    fn add(&mut self, dump: Took, restore: Took) {
        self.dump.push(dump.ms);
        self.frozen.extend(dump.frozen_ms);
        self.restore.push(restore.ms);
    }

    fn failed(error: &anyhow::Error) -> Self {
        let text = format!("{error:#}");
        let first: String = text.chars().take(100).collect();
        Self {
            failure: Some(format!("the peer fails: {}", first.replace('\n', " "))),
            ..Self::default()
        }
    }
}
