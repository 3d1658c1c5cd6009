//! Our dumps and those of Debian's newest CRIU, each restored by the other, in
//! a Debian root of their own.

mod direction;
mod generations;
mod reader;
mod rpc;
mod workload;
mod world;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use direction::Direction;
pub use world::enter;

/// Where our program is in the root.
pub const OURS: &str = "/run/rcr/criu";
/// CRIU itself.
pub const THEIRS: &str = "/usr/sbin/criu";

/// Runs all of it inside of the root; returns what failed.
pub fn run(only: Option<&str>) -> Result<Vec<String>> {
    let mut failed = Vec::new();
    let mut count = |name: String, result: Result<()>| match result {
        Ok(()) => println!("PASS {name}"),
        Err(e) => {
            println!("FAIL {name}\n{e:#}");
            failed.push(name);
        }
    };
    for workload in workload::ALL {
        for direction in [Direction::TheyDump, Direction::WeDump] {
            let name = format!("{} {}", workload.name, direction.shows());
            if only.is_some_and(|part| !name.contains(part)) {
                continue;
            }
            let dir = PathBuf::from("/tmp").join(name.replace(' ', "-"));
            std::fs::create_dir(&dir)?;
            count(name, journey(workload, direction, &dir));
            world::end_all();
            if direction == Direction::WeDump {
                let name = format!("{} read by crit", workload.name);
                count(name, reader::read_all(&dir));
            }
        }
    }
    for workload in &workload::ALL[..2] {
        let name = format!("{} by RPC", workload.name);
        if only.is_some_and(|part| !name.contains(part)) {
            continue;
        }
        let dir = PathBuf::from("/tmp").join(name.replace(' ', "-"));
        std::fs::create_dir(&dir)?;
        count(name, rpc::journey(workload, &dir));
        world::end_all();
    }
    for workload in &workload::ALL[1..3] {
        for (who, program) in generations::RESTORERS {
            let name = format!("{} in generations to {who}", workload.name);
            if only.is_some_and(|part| !name.contains(part)) {
                continue;
            }
            let dir = PathBuf::from("/tmp").join(name.replace(' ', "-"));
            std::fs::create_dir(&dir)?;
            count(name, generations::journey(workload, program, &dir));
            world::end_all();
        }
    }
    Ok(failed)
}

fn journey(workload: &workload::Workload, direction: Direction, dir: &Path) -> Result<()> {
    let (from, to) = match direction {
        Direction::WeDump => (OURS, THEIRS),
        Direction::TheyDump => (THEIRS, OURS),
    };
    let running = workload.start().context("starting")?;
    direction::command(from, dir, "dump", &["--tree", &running.pid().to_string()])?;
    running.is_gone()?;
    direction::command(to, dir, "restore", &["--restore-detached"])?;
    workload.goes_on(running.pid()).context("after the restore")
}
