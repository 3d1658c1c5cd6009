//! `rcr-upgrade`: see `rcr_cli::upgrade`.

use std::process::ExitCode;

use clap::Parser;
use rcr_cli::progress::Progress;
use rcr_cli::upgrade::{self, options::Options};

fn main() -> ExitCode {
    rcr_cli::log_to_stderr();
    let options = Options::parse();
    let mut progress = Progress::new("rcr-upgrade");
    match upgrade::run(&options, &mut progress) {
        Ok(ended) => {
            ended.print(options.json);
            ended.code()
        }
        Err(failure) => {
            progress.broken();
            upgrade::record_failure(&options, &progress, &failure);
            failure.print(progress.program(), options.json);
            failure.code()
        }
    }
}
