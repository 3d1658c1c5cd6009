//! `cargo xtask test`.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcr_tests::scenarios::{self, Bench};
use rcr_tests::vm::console::Console;
use rcr_tests::vm::qemu::Accel;

use crate::{artifacts, containers, host, image, peer, root, vm_dir};

/// What to run.
#[derive(clap::Args)]
pub struct Arguments {
    /// Also the scenarios that take long.
    #[arg(long)]
    slow: bool,
    /// Leaves out the machines.
    #[arg(long, conflicts_with_all = ["vm_only", "scenario"])]
    no_vm: bool,
    /// Leaves out everything but the machines.
    #[arg(long)]
    vm_only: bool,
    /// Only scenarios with this in their names, and nothing but machines.
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// Only the dumps and restores across rcr and CRIU with this in their names
    /// ("" for all), and nothing else.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vm_only", "scenario", "no_vm"])]
    cross: Option<String>,
    /// Only the containers with this in their names ("" for all), and nothing
    /// else.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vm_only", "scenario", "no_vm", "cross"])]
    containers: Option<String>,
    /// Lists the scenarios and runs nothing.
    #[arg(long)]
    list: bool,
}

/// Runs it all, prints a line each and a closing line, and fails if anything
/// did.
///
/// # Errors
/// When a step cannot be run at all.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        for scenario in scenarios::all() {
            let slow = if scenario.slow { " (slow)" } else { "" };
            println!("{:<26} {}{slow}", scenario.name, scenario.shows);
        }
        return Ok(ExitCode::SUCCESS);
    }
    host::install_missing()?;
    let mut tally = Tally::default();
    if let Some(only) = &arguments.cross {
        cross_step(Some(only), &mut tally);
    } else if let Some(only) = &arguments.containers {
        containers_step(Some(only), &mut tally);
    } else if !arguments.vm_only && arguments.scenario.is_none() {
        host_steps(&mut tally);
        cross_step(None, &mut tally);
        containers_step(None, &mut tally);
    }
    let alone = arguments.cross.is_some() || arguments.containers.is_some();
    if !arguments.no_vm && !alone {
        machine_steps(arguments, &mut tally)?;
    }
    println!("\n{} passed, {} failed", tally.passed, tally.failed.len());
    for name in &tally.failed {
        println!("  failed: {name}");
    }
    Ok(if tally.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: Vec<String>,
}

impl Tally {
    fn count(&mut self, name: &str, result: Result<()>, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("PASS {name:<40} {seconds:>7.1} s");
            }
            Err(error) => {
                self.failed.push(name.to_owned());
                println!("FAIL {name:<40} {seconds:>7.1} s\n{error:#}");
            }
        }
    }
}

fn host_steps(tally: &mut Tally) {
    let runner: &[&str] = if cargo(&["nextest", "--version"], true).is_ok() {
        &["nextest", "run"]
    } else {
        &["test"]
    };
    let steps: [(&str, Vec<&str>); 4] = [
        ("format", vec!["fmt", "--all", "--check"]),
        (
            "lints",
            vec![
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
        (
            "unit and engine tests",
            [runner, &["--workspace", "--no-fail-fast"]].concat(),
        ),
        (
            "conformance",
            [CONFORMANCE, &["--check-support", SUPPORT]].concat(),
        ),
    ];
    for (name, arguments) in steps {
        println!("\n== {name}: cargo {}", arguments.join(" "));
        let start = Instant::now();
        let result = cargo(&arguments, false);
        tally.count(name, result, start.elapsed());
    }
}

/// Runs the conformance programs.
const CONFORMANCE: &[&str] = &[
    "run",
    "--quiet",
    "--package",
    "rcr-tests",
    "--bin",
    "rcr-conformance",
    "--",
    "run",
];

/// The table of what they showed.
const SUPPORT: &str = "docs/SUPPORT.md";

/// Runs the conformance programs and writes the table anew.
///
/// # Errors
/// When a program failed.
pub fn support() -> Result<ExitCode> {
    std::fs::create_dir_all(root().join("docs"))?;
    cargo(
        &[CONFORMANCE, &["--write-support", SUPPORT]].concat(),
        false,
    )?;
    Ok(ExitCode::SUCCESS)
}

fn cross_step(only: Option<&str>, tally: &mut Tally) {
    println!("\n== across rcr and CRIU");
    let start = Instant::now();
    let result = peer::test(only);
    tally.count("across rcr and CRIU", result, start.elapsed());
}

fn containers_step(only: Option<&str>, tally: &mut Tally) {
    println!("\n== containers");
    let start = Instant::now();
    let result = containers::test(only);
    tally.count("containers", result, start.elapsed());
}

fn cargo(arguments: &[&str], silent: bool) -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(arguments);
    if silent {
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
    }
    let status = command.status()?;
    if !status.success() {
        bail!("cargo {} failed: {status}", arguments[0]);
    }
    Ok(())
}

fn machine_steps(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    let wanted: Vec<_> = scenarios::all()
        .into_iter()
        .filter(|scenario| match &arguments.scenario {
            Some(part) => scenario.name.contains(part.as_str()),
            None => arguments.slow || !scenario.slow,
        })
        .collect();
    if wanted.is_empty() {
        bail!("no scenario has that name; see --list");
    }
    println!("\n== machines");
    let image = image::prepare()?;
    let payload = artifacts::product()?;
    let accel = Accel::detect(image.oldest())?;
    let dir = vm_dir().join("run");
    let bench = Bench {
        image: &image,
        accel,
        payload: &payload,
        dir: &dir,
        scenario: "",
    };
    for scenario in wanted {
        println!("-- {}: {}", scenario.name, scenario.shows);
        let (mut result, elapsed) = scenario.run(&bench);
        if accel == Accel::Tcg && has_lost_timers(&dir.join(scenario.name)) {
            result = result.context(
                "the guest's kernel says that a processor's timers have stopped, which \
                 happens to emulated machines on a busy host: is something else running?",
            );
        }
        tally.count(scenario.name, result, elapsed);
    }
    Ok(())
}

/// Whether the kernel of an emulated machine found a processor whose timers do
/// not fire any more: now and then QEMU loses them on a busy host.
fn has_lost_timers(machine: &Path) -> bool {
    let console = Console::new(machine.join("console.log"));
    console
        .all()
        .contains("Possible timer handling issue on cpu=")
}
