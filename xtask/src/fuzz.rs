//! `cargo xtask fuzz`: the targets of `fuzz/`, built and run one by one.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::root;

/// What to run.
#[derive(clap::Args)]
pub struct Arguments {
    /// One target; all of them unless given.
    target: Option<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Coverage that libFuzzer goes by, as a stable compiler makes it with its
/// unstable options allowed. No sanitizer: those need a nightly one.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
     -Cdebug-assertions";

const BUILT: &str = "target/x86_64-unknown-linux-gnu/release";

/// Builds and runs them; fails if one crashed, hung, or took too much memory.
///
/// # Errors
/// When they cannot be built, or there is no such target.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let dir = root().join("fuzz");
    let targets: Vec<String> = targets(&dir)?
        .into_iter()
        .filter(|name| {
            arguments
                .target
                .as_ref()
                .is_none_or(|wanted| wanted == name)
        })
        .collect();
    if targets.is_empty() {
        bail!("no such target; fuzz/fuzz_targets has them all");
    }
    let status = Command::new(env!("CARGO"))
        .current_dir(&dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", RUSTFLAGS)
        .args(["build", "--release"])
        .status()?;
    if !status.success() {
        bail!("the fuzz targets cannot be built: {status}");
    }
    let mut failed = Vec::new();
    for target in targets {
        println!("\n== {target}: {} s", arguments.seconds);
        if !fuzz(&dir, &target, arguments.seconds)? {
            failed.push(target);
        }
    }
    for target in &failed {
        println!("failed: {target}; what it read is in fuzz/artifacts/{target}");
    }
    Ok(match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn targets(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir.join("fuzz_targets"))? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|n| n.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Whether a target ran to its end. The corpus is kept from run to run.
fn fuzz(dir: &Path, target: &str, seconds: u32) -> Result<bool> {
    let program = dir.join(BUILT).join(target);
    let corpus = dir.join("corpus").join(target);
    let artifacts = dir.join("artifacts").join(target);
    for d in [&corpus, &artifacts] {
        std::fs::create_dir_all(d).with_context(|| d.display().to_string())?;
    }
    let seeded = Command::new(&program)
        .env("RCR_FUZZ_SEEDS", &corpus)
        .status()?;
    if !seeded.success() {
        bail!("{target} has not written its seeds: {seeded}");
    }
    let status = Command::new(&program)
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-rss_limit_mb=1024", "-malloc_limit_mb=256", "-timeout=10"])
        .args(["-verbosity=0", "-print_final_stats=1"])
        .status()?;
    Ok(status.success())
}
