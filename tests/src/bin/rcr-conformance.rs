//! Conformance programs of the engine, on this host, as root.
//! `rcr-conformance run [--only AREA/NAME] [--cycles N]`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use rcr_engine::Tree;
use rcr_engine::file::TcpPolicy;
use rcr_tests::conformance::programs::ALL;
use rcr_tests::conformance::runner::{self, Plan};
use rcr_tests::conformance::steps::{self, DumpStep};
use rcr_tests::conformance::{stage, sys};

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
        /// Only those whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// Dumps and restores in a row in the last mode.
        #[arg(long, default_value_t = 2)]
        cycles: u32,
        /// Leave the directories of programs that failed.
        #[arg(long)]
        keep: bool,
    },
    /// List the programs.
    List,
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
        close_tcp: bool,
        #[arg(long)]
        cgroup: Option<PathBuf>,
    },
    /// Restore a tree.
    #[command(hide = true)]
    Restore {
        images: PathBuf,
        #[arg(long)]
        cgroup_mount: Option<PathBuf>,
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
        What::Run { only, cycles, keep } => {
            let failed = runner::run(&Plan { only, cycles, keep })?;
            return Ok(ExitCode::from(u8::from(failed > 0)));
        }
        What::List => {
            for case in ALL.iter().flat_map(|area| area.iter()) {
                println!("{:<32} {}", case.name, case.about);
            }
        }
        What::Program { name, dir } => stage::perform(&name, &dir)?,
        What::Dump {
            pid,
            images,
            leave_running,
            close_tcp,
            cgroup,
        } => {
            let code = steps::dump(&DumpStep {
                tree: cgroup.map_or(Tree::Root(pid), Tree::Cgroup),
                images,
                leave_running,
                tcp: if close_tcp {
                    TcpPolicy::Close
                } else {
                    TcpPolicy::Refuse
                },
            })?;
            return Ok(ExitCode::from(code as u8));
        }
        What::Restore {
            images,
            cgroup_mount,
        } => steps::restore(&images, cgroup_mount.as_deref())?,
    }
    Ok(ExitCode::SUCCESS)
}
