//! CRIU's command line and RPC in front of our engine: criu(8).
//!
//! ```text
//! criu COMMAND options ─► Options ─┐
//! config files         ─► Options ─┼─► dump, restore, check, … ─► log, exit code
//! swrk: criu_req       ─► Options ─┘        │
//!                                           └─► scripts, notifications
//! ```
//! What an option asks for and the engine cannot do is refused by name before
//! anything is touched.

mod cgroups;
mod check;
mod config;
mod cpuinfo;
mod daemon;
mod dump;
mod external;
mod generation;
mod join;
mod lazy_pages;
mod log;
mod options;
mod page_server;
mod pidfile;
mod places;
mod restore;
mod rpc;
mod script;
mod stats;
mod unsupported;

use std::ffi::OsString;
use std::process::ExitCode;

use options::{Command, Options};

/// The version of CRIU whose behaviour is offered; container engines compare it.
const VERSION: (i32, i32) = (4, 2);

/// Why a command failed; its text is for the log.
type Error = anyhow::Error;

/// Runs a command; `arguments` are those after the program's name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    log::start();
    let parsed = config::with_defaults(&arguments);
    let options = match parsed {
        Ok(options) => options,
        Err(e) => {
            eprintln!("Error: {e:#}");
            return ExitCode::FAILURE;
        }
    };
    match run(&options) {
        Ok(code) => code,
        Err(e) => {
            log::set_level(options.verbosity.max(1));
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, Error> {
    log::set_level(options.verbosity);
    match &options.command {
        Command::Version => {
            let (major, minor) = VERSION;
            println!("Version: {major}.{minor}");
            println!("Engine: rcr {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Help => {
            print!("{}", options::HELP);
            Ok(ExitCode::SUCCESS)
        }
        Command::Check => check::run(options),
        Command::Dump => {
            let places = places::Places::open(options)?;
            let scripts = &mut script::Scripts::new(options, &places);
            // What went wrong is in the log by then.
            let done = dump::run(options, &places, scripts);
            Ok(done.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
        }
        Command::PreDump => {
            let done = generation::pre_dump(options, &places::Places::open(options)?);
            Ok(done.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
        }
        Command::Dedup => generation::dedup(options).map(|()| ExitCode::SUCCESS),
        Command::Restore => restore::run(options),
        Command::CpuinfoDump => cpuinfo::dump(options).map(|()| ExitCode::SUCCESS),
        Command::CpuinfoCheck => cpuinfo::check(options).map(|()| ExitCode::SUCCESS),
        Command::Swrk(fd) => rpc::swrk(*fd).map(|()| ExitCode::SUCCESS),
        Command::Service => rpc::service(options).map(|()| ExitCode::SUCCESS),
        Command::PageServer => page_server::run(options),
        Command::LazyPages => lazy_pages::run(options),
        Command::Other(name) => {
            anyhow::bail!("the command {name} is not offered: images are written and read whole")
        }
    }
}
