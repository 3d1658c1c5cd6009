//! `cargo xtask bench`: how fast rcr is beside CRIU.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use rcr_tests::blackout::Machines;
use rcr_tests::row::Row;
use rcr_tests::vm::qemu::Accel;
use serde_json::Value;

use crate::host::{as_root, run as run_command};
use crate::{artifacts, image, peer, root, vm_dir};

/// The table in the document stands between these lines.
const BEGIN: &str = "<!-- table: cargo xtask bench --write -->";
const END: &str = "<!-- end of the table -->";

/// Stands for the rows that need machines.
const BLACKOUT: &str = "blackout";

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only rows whose name contains this; `blackout`: only what needs machines.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Also writes the rows to this file, for programs.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each side does each work; the median counts.
    #[arg(long, default_value_t = 7, value_name = "N")]
    samples: usize,
    /// Also puts the rows into docs/PERFORMANCE.md.
    #[arg(long, conflicts_with = "only")]
    write: bool,
}

/// Measures both programs in one run, in turns, in a Debian root of the peer.
///
/// # Errors
/// When something cannot be built or made, or our side fails.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let (beside_peer, on_machines) = match arguments.only.as_deref() {
        None => (true, true),
        Some(only) if only.starts_with(BLACKOUT) => (false, true),
        Some(_) => (true, false),
    };
    let kept = vm_dir().with_file_name("bench.json");
    let json = arguments.json.as_ref().unwrap_or(&kept);
    let mut rows = Vec::new();
    if beside_peer {
        rows = contest(arguments, json)?;
    }
    if on_machines {
        blackout(arguments.samples, &mut rows)?;
    }
    fs::write(json, serde_json::to_string_pretty(&rows)? + "\n")
        .with_context(|| json.display().to_string())?;
    if arguments.write {
        write_table(&rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What needs machines.
fn blackout(samples: usize, rows: &mut Vec<Value>) -> Result<()> {
    let image = image::prepare()?;
    let payload = artifacts::product()?;
    let machines = Machines {
        image: &image,
        accel: Accel::detect(image.newest())?,
        payload: &payload,
        dir: &vm_dir().join("run"),
    };
    println!("machines: {}\n{}", machines.accel.name(), Row::head());
    let mut failed = None;
    machines.rows(samples, &mut |row| {
        println!("{}", row.line());
        match serde_json::to_value(&row) {
            Ok(row) => rows.push(row),
            Err(e) => failed = Some(e),
        }
    })?;
    failed.map_or(Ok(()), |e| Err(e.into()))
}

/// What is measured in a root of the peer.
fn contest(arguments: &Arguments, json: &Path) -> Result<Vec<Value>> {
    let debian = peer::prepare()?;
    let built = artifacts::build_fast(&["rcr-cli", "rcr-tests"], &["rcr", "rcr-bench"])?;
    let mut command = as_root("env");
    command
        .arg(&built[1])
        .arg("run")
        .arg("--ours")
        .arg(&built[0]);
    command.arg("--root").arg(&debian).arg("--json").arg(json);
    command.args(["--samples", &arguments.samples.to_string()]);
    if let Some(only) = &arguments.only {
        command.args(["--only", only]);
    }
    run_command(&mut command)?;
    Ok(serde_json::from_str(&fs::read_to_string(json)?)?)
}

fn write_table(rows: &[Value]) -> Result<()> {
    let path = root().join("docs/PERFORMANCE.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (before, rest) = text.split_once(BEGIN).context("no place for the table")?;
    let (_, after) = rest.split_once(END).context("no end of the table")?;
    let text = format!("{before}{BEGIN}\n{}{END}{after}", table(rows));
    Ok(fs::write(&path, text)?)
}

fn table(rows: &[Value]) -> String {
    let mut out = String::from(
        "| work | rcr | criu | unit | ratio | bar | met | |\n|---|--:|--:|---|--:|--:|---|---|\n",
    );
    for row in rows {
        let number = |key: &str, digits| {
            row[key]
                .as_f64()
                .map_or("–".into(), |v| format!("{v:.digits$}"))
        };
        let text = |key: &str| row[key].as_str().unwrap_or_default();
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            text("name"),
            number("ours", 1),
            number("peer", 1),
            text("unit"),
            number("ratio", 2),
            row["bar"],
            if row["met"] == true { "yes" } else { "**no**" },
            text("note"),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_peer_has_no_ratio() {
        let row = serde_json::json!({"name": "dump x", "ours": 1.25, "peer": null, "unit": "ms",
            "ratio": null, "bar": 2.0, "met": true, "note": "the peer fails"});
        let text = table(&[row]);
        let line = text.lines().last().unwrap_or_default();
        assert_eq!(
            line,
            "| dump x | 1.2 | – | ms | – | 2.0 | yes | the peer fails |"
        );
    }
}
