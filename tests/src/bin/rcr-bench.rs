//! Benchmarks of the engine and the store on this host, as root.
//! `rcr-bench run --ours RCR [--peer CRIU] [--only NAME] [--json FILE]`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rcr_tests::bench::contest::Contest;
use rcr_tests::bench::load::Load;
use rcr_tests::bench::row::Row;
use rcr_tests::bench::{store, tool::Tool};
use rcr_tests::conformance::sys;

/// Checkpoint and restore, side by side with a peer.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Measure.
    Run {
        /// Our program.
        #[arg(long)]
        ours: PathBuf,
        /// The peer's; without it ours alone are measured.
        #[arg(long)]
        peer: Option<PathBuf>,
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
    },
    /// Be one of the trees.
    #[command(hide = true)]
    Load { name: String, dir: PathBuf },
    /// Hold a store in RAM.
    #[command(hide = true)]
    Store { pid: i32 },
}

fn main() -> ExitCode {
    sys::close_inherited();
    match act() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn act() -> Result<()> {
    match Args::parse().command {
        What::Run {
            ours,
            peer,
            only,
            json,
            samples,
            dir,
        } => {
            // What loses its parent becomes ours, restored trees among them.
            nix::sys::prctl::set_child_subreaper(true)?;
            let contest = Contest {
                ours: Tool::Ours(ours),
                peer: peer.map(Tool::Peer),
                dir,
                samples,
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
            let only = only.as_deref();
            contest.run(only, &mut done)?;
            store::trees(&contest, only, &mut done)?;
            if only.is_none_or(|o| "store write read (memcpy)".contains(o)) {
                store::against_memcpy(samples, &mut done)?;
            }
            if let Some(path) = json {
                let text = serde_json::to_string_pretty(&rows)?;
                std::fs::write(&path, text).with_context(|| path.display().to_string())?;
            }
            Ok(())
        }
        What::Load { name, dir } => Load::parse(&name)?.hold(&dir),
        What::Store { pid } => store::hold(pid),
    }
}
