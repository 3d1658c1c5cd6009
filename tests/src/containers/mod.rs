//! Containers of runc and podman, on this host: checkpointed and restored by
//! these, which take our program for `criu`.

mod bundle;
mod journeys;
mod podman;
mod runc;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use bundle::{Bundle, Life};
use runc::Runc;

pub use podman::{AS_RUNTIME, as_runtime};

/// The journey of podman's container.
const OF_PODMAN: &str = "a container of podman";

/// Runs all of it; returns how many failed.
///
/// Where runc cannot start any container, none can be restored: that is said,
/// and nothing is run.
pub fn run(rcr: &Path, only: Option<&str>) -> Result<usize> {
    let dir = Directory::make()?;
    if let Err(e) = starts(rcr, &dir.0.join("probe"))? {
        println!("SKIP containers: runc cannot start one on this machine: {e:#}");
        return Ok(0);
    }
    let mut failed = 0;
    for (n, journey) in journeys::ALL.iter().enumerate() {
        if only.is_some_and(|part| !journey.name.contains(part)) {
            continue;
        }
        let place = dir.0.join(n.to_string());
        match journey.run(rcr, &place) {
            Ok(()) => println!("PASS {}", journey.name),
            Err(e) => {
                println!("FAIL {}\n{e:#}", journey.name);
                failed += 1;
            }
        }
    }
    if only.is_some_and(|part| !OF_PODMAN.contains(part)) {
        return Ok(failed);
    }
    if let Err(e) = podman::starts(rcr, &dir.0.join("podman-probe"))? {
        println!("SKIP {OF_PODMAN}: it can start none on this machine: {e:#}");
        return Ok(failed);
    }
    match podman::journey(rcr, &dir.0.join("podman")) {
        Ok(()) => println!("PASS {OF_PODMAN}"),
        Err(e) => {
            println!("FAIL {OF_PODMAN}\n{e:#}");
            failed += 1;
        }
    }
    Ok(failed)
}

/// Whether runc can run anything here.
fn starts(rcr: &Path, place: &Path) -> Result<Result<()>> {
    let bundle = Bundle::make(place, &Life::new("exit 0"))?;
    bundle.works_alone()?;
    Ok(Runc::new(rcr, &bundle)?.run_to_the_end())
}

/// A directory, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn make() -> Result<Self> {
        let name = format!("rcr-containers-{}", std::process::id());
        let path = std::env::temp_dir().canonicalize()?.join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {e}", self.0.display());
        }
    }
}
