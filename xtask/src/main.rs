//! The commands of this repository; `cargo xtask --help` lists them.

mod artifacts;
mod bench;
mod containers;
mod demo;
mod dev_vm;
mod fuzz;
mod host;
mod image;
mod mirror;
mod peer;
mod services;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, shows and tests rcr.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Upgrades the kernel under a live Redis and nginx and shows what became
    /// of them.
    Demo {
        /// Also writes the table to this file, for programs.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Everything that must hold: format, lints, tests here and on machines.
    Test(test::Arguments),
    /// Runs the conformance programs and writes docs/SUPPORT.md from what they
    /// showed.
    Support,
    /// Upgrades under the services that people run, with clients that hold
    /// connections, and writes docs/SERVICES.md from what they showed.
    Services(services::Arguments),
    /// Feeds damaged and made-up bytes to everything that reads bytes somebody
    /// else wrote.
    Fuzz(fuzz::Arguments),
    /// Measures dump and restore beside CRIU's, both in one run.
    Bench(bench::Arguments),
    /// Makes the virtual machine's image and nothing else.
    Image,
    /// Machines to work with by hand: started, driven and ended one by one.
    Vm {
        #[command(subcommand)]
        action: dev_vm::Action,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Demo { json } => demo::run(json.as_deref()),
        Task::Test(arguments) => test::run(&arguments),
        Task::Support => test::support(),
        Task::Services(arguments) => services::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Image => {
            let image = image::prepare()?;
            println!("{}", image.dir.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Vm { action } => dev_vm::run(action).map(|()| ExitCode::SUCCESS),
    }
}

/// The repository's root.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// Where everything about virtual machines is kept.
fn vm_dir() -> PathBuf {
    root().join("target/vm")
}
