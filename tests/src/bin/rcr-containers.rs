//! `rcr-containers`: containers of Debian's engines, checkpointed and restored
//! through our front. Started by `cargo xtask test`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use rcr_tests::containers;

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
    let mut given = std::env::args().skip(1);
    if given.next().as_deref() == Some(containers::AS_RUNTIME) {
        let given: Vec<String> = given.collect();
        return containers::as_runtime(&given).map(|()| ExitCode::SUCCESS);
    }
    let arguments = Arguments::parse();
    let rcr = arguments.rcr.canonicalize()?;
    let failed = containers::run(&rcr, arguments.only.as_deref())?;
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
