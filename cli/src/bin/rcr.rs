//! `rcr`: tags, checks, status, and trees without kexec.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rcr_cli::exit::{EXIT_HELP, Failure, OrExit};
use rcr_cli::tree::{self, DumpMode};
use rcr_cli::{status, tagging};
use rcr_engine::file::TcpPolicy;

/// Carries services across kernel upgrades, and checkpoints process trees.
#[derive(Debug, Parser)]
#[command(name = "rcr", version, after_help = EXIT_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tag services: they cross the next upgrade
    Tag {
        /// Unit names; `.service` may be left out
        #[arg(required = true, value_name = "UNIT")]
        units: Vec<String>,
    },
    /// Untag services
    Untag {
        /// Unit names
        #[arg(required = true, value_name = "UNIT")]
        units: Vec<String>,
    },
    /// Show the tagged services
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say whether a running service can be carried, and if not, everything that stands in the way
    Check {
        /// Unit name
        unit: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what became of the last upgrade
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a process and its descendants into image files
    Dump {
        /// The process
        #[arg(short = 't', long = "tree", value_name = "PID")]
        pid: i32,
        /// Directory for the images; made if missing
        #[arg(short = 'D', long = "images-dir", value_name = "DIR")]
        directory: PathBuf,
        /// Let the tree run on afterwards instead of killing it
        #[arg(long)]
        leave_running: bool,
        /// Bring established TCP connections back as closed by the peer instead of refusing
        #[arg(long)]
        close_connections: bool,
        /// Let established TCP connections go on after the restore; until then their packets
        /// are kept away
        #[arg(long, conflicts_with = "close_connections")]
        tcp_established: bool,
        /// With --tcp-established: lose connections that wait to be accepted instead of refusing
        #[arg(long, requires = "tcp_established")]
        skip_in_flight: bool,
        /// The tree is a job of a shell: the terminal of whoever restores takes the place of its own
        #[arg(long)]
        shell_job: bool,
    },
    /// Bring a dumped tree back under its old process ids
    Restore {
        /// Directory with the images
        #[arg(short = 'D', long = "images-dir", value_name = "DIR")]
        directory: PathBuf,
        /// Return at once instead of waiting for its first process
        #[arg(long)]
        detach: bool,
        /// Let it run before all of its memory is filled; the rest comes as it is touched, and meanwhile
        #[arg(long)]
        lazy: bool,
    },
    /// Raise the PID allocator (run at boot)
    #[command(hide = true)]
    LiftPids,
}

/// The arguments of CRIU's command line, if that is what we are called for: as
/// `criu`, or as `rcr criu`.
fn criu_arguments() -> Option<Vec<std::ffi::OsString>> {
    let mut arguments = std::env::args_os();
    let program = PathBuf::from(arguments.next()?);
    let rest: Vec<_> = arguments.collect();
    match rest.first() {
        _ if program.file_name().is_some_and(|n| n == "criu") => Some(rest),
        Some(first) if first == "criu" => Some(rest[1..].to_vec()),
        _ => None,
    }
}

fn main() -> ExitCode {
    if let Some(arguments) = criu_arguments() {
        return rcr_cli::criu::main(arguments);
    }
    rcr_cli::log_to_stderr();
    if let Err(e) = rcr_cli::sys::end_with_reader() {
        tracing::debug!("SIGPIPE stays ignored: {e}");
    }
    let json = |command: &Command| {
        matches!(
            command,
            Command::List { json: true } | Command::Status { json: true }
        )
    };
    let command = Arguments::parse().command;
    let done = |result: Result<(), Failure>| result.map(|()| ExitCode::SUCCESS);
    let result = match &command {
        Command::Tag { units } => done(tagging::tag(units)),
        Command::Untag { units } => done(tagging::untag(units)),
        Command::List { json } => done(tagging::list(*json)),
        Command::Check { unit, json } => done(tree::check(unit, *json)),
        Command::Status { json } => done(status::status(*json)),
        Command::Dump {
            pid,
            directory,
            leave_running,
            close_connections,
            tcp_established,
            skip_in_flight,
            shell_job,
        } => {
            let mode = DumpMode {
                leave_running: *leave_running,
                tcp: match (close_connections, tcp_established) {
                    (true, _) => TcpPolicy::Close,
                    (false, true) => TcpPolicy::Carry,
                    (false, false) => TcpPolicy::Refuse,
                },
                skip_in_flight: *skip_in_flight,
                shell_job: *shell_job,
            };
            done(tree::dump(*pid, directory, mode))
        }
        Command::Restore {
            directory,
            detach,
            lazy,
        } => tree::restore(directory, *detach, *lazy),
        Command::LiftPids => done(rcr_systemd::pids::lift().or_environment()),
    };
    result.unwrap_or_else(|failure| {
        failure.print("rcr", json(&command));
        failure.code()
    })
}
