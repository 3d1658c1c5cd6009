//! Conformance programs of the engine, on this host, as root.
//! `rcr-conformance run [--only AREA/NAME] [--cycles N] [--jobs N] [--json FILE]`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rcr_engine::Tree;
use rcr_engine::file::TcpPolicy;
use rcr_tests::conformance::mutate;
use rcr_tests::conformance::runner::{self, Plan, WorkerPlan};
use rcr_tests::conformance::steps::{self, DumpStep};
use rcr_tests::conformance::{stage, support, sys};

/// Conformance programs: one kernel object each, checked after dump and restore.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Run the programs in all modes.
    Run {
        /// Only those whose name contains this; may be given several times.
        #[arg(long)]
        only: Vec<String>,
        /// Dumps and restores in a row in the last mode.
        #[arg(long, default_value_t = 2)]
        cycles: u32,
        /// Leave the directories of programs that failed.
        #[arg(long)]
        keep: bool,
        /// Programs at a time; as many as there are processors unless given.
        #[arg(long)]
        jobs: Option<usize>,
        /// Also write all results to this file.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Write the support table of all programs to this file.
        #[arg(long, conflicts_with = "only")]
        write_support: Option<PathBuf>,
        /// Fail where this support table says something else.
        #[arg(long, conflicts_with = "only")]
        check_support: Option<PathBuf>,
    },
    /// Run trees of random objects in all modes.
    Random {
        /// The same number builds the same trees; a new one unless given.
        #[arg(long)]
        seed: Option<u64>,
        /// How often the random programs are run, each time with other trees.
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// Leave the directories of programs that failed.
        #[arg(long)]
        keep: bool,
    },
    /// Read damaged images.
    #[command(hide = true)]
    Mutate {
        images: PathBuf,
        seed: u64,
        count: u32,
    },
    /// List the programs.
    List,
    /// Run programs that are named on the standard input.
    #[command(hide = true)]
    Worker {
        home: PathBuf,
        unique: String,
        #[arg(long)]
        cycles: u32,
        #[arg(long)]
        seed: u64,
    },
    /// Be one of the programs.
    #[command(hide = true)]
    Program { name: String, dir: PathBuf },
    /// Dump a tree.
    #[command(hide = true)]
    Dump {
        pid: i32,
        images: PathBuf,
        #[arg(long)]
        leave_running: bool,
        #[arg(long)]
        pages_once: bool,
        #[arg(long)]
        close_tcp: bool,
        #[arg(long)]
        tcp_established: bool,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(long)]
        parent: Option<PathBuf>,
    },
    /// Write the memory of a tree that runs.
    #[command(hide = true)]
    PreDump {
        pid: i32,
        images: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(long)]
        parent: Option<PathBuf>,
        #[arg(long)]
        pages_once: bool,
    },
    /// Restore a tree.
    #[command(hide = true)]
    Restore {
        images: PathBuf,
        #[arg(long)]
        cgroup_mount: Option<PathBuf>,
        #[arg(long)]
        lazy: bool,
    },
}

fn main() -> ExitCode {
    sys::close_inherited();
    match act() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn act() -> Result<ExitCode> {
    match Args::parse().command {
        What::Run {
            only,
            cycles,
            keep,
            jobs,
            json,
            write_support,
            check_support,
        } => {
            let processors = || std::thread::available_parallelism().map_or(1, usize::from);
            let report = runner::run(&Plan {
                only,
                cycles,
                keep,
                jobs: jobs.unwrap_or_else(processors),
                seed: 0,
            })?;
            if let Some(path) = json {
                let text = serde_json::to_string_pretty(&report)?;
                std::fs::write(&path, text).with_context(|| path.display().to_string())?;
            }
            println!();
            for (area, count) in report.by_area() {
                println!("{area:<16} {count}");
            }
            let total = report.total();
            println!("{total}");
            if let Some(path) = write_support {
                let table = support::table(&report);
                std::fs::write(&path, table).with_context(|| path.display().to_string())?;
            }
            if let Some(path) = check_support {
                let text = std::fs::read_to_string(&path);
                let text = text.with_context(|| path.display().to_string())?;
                let differences = support::differences(&text, &report);
                for line in &differences {
                    println!("{}: {line}", path.display());
                }
                if !differences.is_empty() {
                    println!("`cargo xtask support` writes it anew");
                    return Ok(ExitCode::FAILURE);
                }
            }
            return Ok(ExitCode::from(u8::from(total.failed > 0)));
        }
        What::Worker {
            home,
            unique,
            cycles,
            seed,
        } => runner::work(&WorkerPlan {
            home,
            unique,
            cycles,
            seed,
        })?,
        What::Random { seed, count, keep } => {
            let now = || rcr_tests::conformance::sys::clock(libc::CLOCK_REALTIME) as u64 >> 10;
            let first = seed.unwrap_or_else(now);
            let mut failed = 0;
            for n in 0..count {
                let seed = first.wrapping_add(n * 100);
                println!("seed {seed}");
                let report = runner::run(&Plan {
                    only: vec!["random/".into()],
                    cycles: 2,
                    keep,
                    jobs: 2,
                    seed,
                })?;
                failed += report.total().failed;
            }
            return Ok(ExitCode::from(u8::from(failed > 0)));
        }
        What::Mutate {
            images,
            seed,
            count,
        } => mutate::mutate(&images, seed, count)?,
        What::List => {
            for case in runner::all() {
                println!("{:<32} {}", case.name, case.about);
            }
        }
        What::Program { name, dir } => stage::perform(&name, &dir)?,
        What::Dump {
            pid,
            images,
            leave_running,
            pages_once,
            close_tcp,
            tcp_established,
            cgroup,
            parent,
        } => {
            let code = steps::dump(&DumpStep {
                tree: cgroup.map_or(Tree::Root(pid), Tree::Cgroup),
                images,
                leave_running,
                pages_once,
                tcp: match (close_tcp, tcp_established) {
                    (true, _) => TcpPolicy::Close,
                    (false, true) => TcpPolicy::Carry,
                    (false, false) => TcpPolicy::Refuse,
                },
                parent,
            })?;
            return Ok(ExitCode::from(code as u8));
        }
        What::PreDump {
            pid,
            images,
            cgroup,
            parent,
            pages_once,
        } => {
            let tree = cgroup.map_or(Tree::Root(pid), Tree::Cgroup);
            steps::pre_dump(&tree, &images, parent.as_deref(), pages_once)?;
        }
        What::Restore {
            images,
            cgroup_mount,
            lazy,
        } => steps::restore(&images, cgroup_mount.as_deref(), lazy)?,
    }
    Ok(ExitCode::SUCCESS)
}
