//! `rcr-cross`: our images and CRIU's, each read by the other. Started by
//! `cargo xtask test` with a Debian root that has CRIU in it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Dumps by one program, restores by the other.
#[derive(Parser)]
struct Arguments {
    /// Debian root directory with CRIU, crit, python3 and redis-server.
    #[arg(long)]
    root: PathBuf,
    /// Our program.
    #[arg(long)]
    rcr: PathBuf,
    /// Only tests with this in their names.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let root = arguments.root.canonicalize()?;
    let code =
        rcr_tests::cross::enter(&root, &arguments.rcr, None, || match rcr_tests::cross::run(
            arguments.only.as_deref(),
        ) {
            Ok(failed) if failed.is_empty() => 0,
            Ok(failed) => {
                println!("{} failed", failed.len());
                1
            }
            Err(e) => {
                eprintln!("{e:#}");
                1
            }
        })?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
