//! Memory blocks of the running kernel
//! (Documentation/admin-guide/mm/memory-hotplug.rst).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::region_error::{Context, RegionError};
use super::sysfs;

const MEMORY_DIR: &str = "/sys/devices/system/memory";
/// How often a block that is going offline is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Bytes of a memory block.
pub(super) fn block_bytes() -> Result<u64, RegionError> {
    sysfs::read_hex(&Path::new(MEMORY_DIR).join("block_size_bytes"))
}

/// Start addresses of all memory blocks, ascending.
pub(super) fn block_starts() -> Result<Vec<u64>, RegionError> {
    let block_len = block_bytes()?;
    let entries = fs::read_dir(MEMORY_DIR).doing(|| format!("listing {MEMORY_DIR}"))?;
    let mut starts = Vec::new();
    for entry in entries {
        let name = entry.doing(|| format!("listing {MEMORY_DIR}"))?.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_prefix("memory")?.parse::<u64>().ok());
        starts.extend(number.map(|number| number * block_len));
    }
    starts.sort_unstable();
    Ok(starts)
}

/// Whether the block exists and is online.
pub(super) fn is_online(start: u64) -> Result<bool, RegionError> {
    let path = block_file(start, "state")?;
    match fs::exists(&path).doing(|| format!("looking for {}", path.display()))? {
        true => Ok(sysfs::read(&path)? == "online"),
        false => Ok(false),
    }
}

/// Whether the block lies in ZONE_MOVABLE, out of which pinning moves pages.
pub(super) fn is_movable(start: u64) -> Result<bool, RegionError> {
    Ok(sysfs::read(&block_file(start, "valid_zones")?)? == "Movable")
}

/// Brings a block online: `online`, `online_kernel` or `online_movable`.
pub(super) fn bring_online(start: u64, how: &str) -> Result<(), RegionError> {
    sysfs::write(&block_file(start, "state")?, how)
}

/// Takes a block offline, moving what is in it elsewhere; false where the kernel
/// says no or `limit` passes.
pub(super) fn take_offline(start: u64, limit: Duration) -> Result<bool, RegionError> {
    // The kernel tries for as long as no signal comes, so something that can be
    // killed has to do the writing.
    let mut writer = Command::new("/bin/sh")
        .args(["-c", "echo offline >\"$0\""])
        .arg(block_file(start, "state")?)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .doing(|| "starting /bin/sh".to_owned())?;
    let ended = wait(&mut writer, limit).doing(|| "waiting for /bin/sh".to_owned())?;
    if !ended {
        tracing::debug!(start, "memory block did not go offline in time");
    }
    Ok(!is_online(start)?)
}

/// Waits for the child's end, killing it after `limit`.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<bool> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(POLL);
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}

/// Blocks that were made movable for a region; they become kernel memory again
/// with this value.
#[derive(Debug)]
pub(super) struct MovableBlocks {
    starts: Vec<u64>,
    limit: Duration,
}

impl MovableBlocks {
    /// None yet; `limit` bounds each attempt to take one offline.
    pub fn new(limit: Duration) -> MovableBlocks {
        MovableBlocks {
            starts: Vec::new(),
            limit,
        }
    }

    /// Takes up to `wanted` of `candidates` offline and brings them back movable,
    /// hence empty of what cannot be moved. Says how many.
    pub fn convert(&mut self, candidates: &[u64], wanted: u64) -> Result<u64, RegionError> {
        let mut offline = Vec::new();
        let mut result = Ok(());
        for &start in candidates {
            if offline.len() as u64 == wanted {
                break;
            }
            match take_offline(start, self.limit) {
                Ok(true) => offline.push(start),
                Ok(false) => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let converted = offline.len() as u64;
        for start in offline {
            match bring_online(start, "online_movable") {
                Ok(()) => self.starts.push(start),
                Err(error) => {
                    bring_online(start, "online")?;
                    result = result.and(Err(error));
                }
            }
        }
        result.map(|()| converted)
    }

    /// Leaves the blocks movable.
    pub fn keep(&mut self) {
        self.starts.clear();
    }
}

impl Drop for MovableBlocks {
    fn drop(&mut self) {
        for &start in &self.starts {
            let back = take_offline(start, self.limit).and_then(|offline| match offline {
                true => {
                    bring_online(start, "online_kernel").or_else(|_| bring_online(start, "online"))
                }
                false => Ok(()),
            });
            if let Err(error) = back {
                tracing::warn!(%error, start, "a memory block did not become what it was");
            }
        }
    }
}

fn block_file(start: u64, name: &str) -> Result<PathBuf, RegionError> {
    let number = start / block_bytes()?;
    Ok(Path::new(MEMORY_DIR)
        .join(format!("memory{number}"))
        .join(name))
}
