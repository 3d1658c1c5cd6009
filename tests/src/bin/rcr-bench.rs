//! Benchmarks of the engine and the store, as root, beside a peer.
//! `rcr-bench run --ours RCR [--peer CRIU] [--only NAME] [--json FILE]` on this
//! host, `--root DIR` instead of `--peer` in a Debian root that has CRIU in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use rcr_tests::bench::contest::Contest;
use rcr_tests::bench::load::Load;
use rcr_tests::bench::row::Row;
use rcr_tests::bench::{store, tool::Tool};
use rcr_tests::conformance::sys;
use rcr_tests::cross;

/// Our program in the root, by the name that makes it what it is.
const OURS: &str = "/run/rcr/rcr";

/// Checkpoint and restore, side by side with a peer.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Measure.
    Run(Run),
    /// Be one of the trees.
    #[command(hide = true)]
    Load { name: String, dir: PathBuf },
    /// Hold a store in RAM.
    #[command(hide = true)]
    Store { pid: i32 },
}

#[derive(Debug, Args)]
struct Run {
    /// Our program.
    #[arg(long)]
    ours: PathBuf,
    /// The peer's; without it ours alone are measured.
    #[arg(long, conflicts_with = "root")]
    peer: Option<PathBuf>,
    /// A Debian root with the peer, in which all of it happens.
    #[arg(long)]
    root: Option<PathBuf>,
    /// Only rows whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Also write the rows to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Samples of each.
    #[arg(long, default_value_t = 7)]
    samples: usize,
    /// A folder on tmpfs for images.
    #[arg(long, default_value = "/dev/shm/rcr-bench")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    sys::close_inherited();
    match act() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn act() -> Result<ExitCode> {
    match Arguments::parse().command {
        What::Run(mut run) => {
            let json = run.json.as_ref().map(|path| {
                let file = File::create(path);
                file.with_context(|| path.display().to_string())
            });
            let json = json.transpose()?;
            let Some(root) = run.root.take() else {
                measure(&run, json.as_ref())?;
                return Ok(ExitCode::SUCCESS);
            };
            let root = root.canonicalize()?;
            let ours = std::mem::replace(&mut run.ours, OURS.into());
            run.peer = Some(cross::THEIRS.into());
            // All other descriptors are closed in the root.
            let json = json.as_ref();
            let kept = json.map(File::as_fd);
            let code = cross::enter(&root, &ours, kept, move || match inside(&run, json) {
                Ok(()) => 0,
                Err(e) => {
                    eprintln!("Error: {e:#}");
                    1
                }
            })?;
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
        }
        What::Load { name, dir } => {
            Load::parse(&name)?.hold(&dir)?;
            Ok(ExitCode::SUCCESS)
        }
        What::Store { pid } => {
            store::hold(pid)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn inside(run: &Run, json: Option<&File>) -> Result<()> {
    std::fs::hard_link(Path::new(cross::OURS), OURS)?;
    measure(run, json)
}

fn measure(run: &Run, json: Option<&File>) -> Result<()> {
    if run.samples == 0 {
        bail!("a median of no samples is none");
    }
    // What loses its parent becomes ours, restored trees among them.
    nix::sys::prctl::set_child_subreaper(true)?;
    let contest = Contest {
        ours: Tool::Ours(run.ours.clone()),
        peer: run.peer.clone().map(Tool::Peer),
        dir: run.dir.clone(),
        samples: run.samples,
    };
    println!("ours: {}", contest.ours.version()?);
    if let Some(peer) = &contest.peer {
        println!("peer: {}", peer.version()?);
    }
    println!("{}", Row::head());
    let mut rows = Vec::new();
    let mut done = |row: Row| {
        println!("{}", row.line());
        rows.push(row);
    };
    let only = run.only.as_deref();
    contest.run(only, &mut done)?;
    store::trees(&contest, only, &mut done)?;
    if only.is_none_or(|o| "store write read (memcpy)".contains(o)) {
        store::against_memcpy(run.samples, &mut done)?;
    }
    if let Some(mut file) = json {
        writeln!(file, "{}", serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}
