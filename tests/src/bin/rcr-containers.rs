//! `rcr-containers`: containers of Debian's engines, checkpointed and restored
//! through our front. Started by `cargo xtask test`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Checkpoint and restore of containers.
#[derive(Parser)]
struct Arguments {
    /// Our program.
    #[arg(long)]
    rcr: PathBuf,
    /// Only tests with this in their names.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let rcr = arguments.rcr.canonicalize()?;
    let failed = rcr_tests::containers::run(&rcr, arguments.only.as_deref())?;
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
