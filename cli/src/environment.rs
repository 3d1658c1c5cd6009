//! What the machine must offer before anything is tried.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rcr_systemd::unit::CGROUP_ROOT;

use crate::upgrade::target::EARLY_PROGRAM;

/// What is run in the new kernel from its root filesystem.
const INSTALLED: [&str; 4] = [
    EARLY_PROGRAM,
    "/usr/lib/systemd/system-generators/rcr-generator",
    "/usr/lib/rcr/rcr-adopt",
    "/usr/lib/rcr/rcr-release",
];

/// Root, kexec, control groups, huge pages and the installed parts.
pub fn check() -> Result<()> {
    if !crate::signals::is_root() {
        bail!("this needs root: run it with sudo");
    }
    rcr_kexec::check()?;
    if !Path::new(CGROUP_ROOT).join("cgroup.controllers").exists() {
        bail!(
            "{CGROUP_ROOT} is not the unified control group hierarchy; boot with \
             systemd.unified_cgroup_hierarchy=1"
        );
    }
    if !Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        bail!("the kernel has no 2 MiB huge pages (CONFIG_HUGETLBFS), which hand memory over");
    }
    for path in INSTALLED {
        if !Path::new(path).exists() {
            bail!("{path} is missing; install the rcr package on this machine");
        }
    }
    Ok(())
}

/// `MemAvailable` in bytes.
pub fn memory_available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .context("/proc/meminfo has no MemAvailable")?;
    Ok(kib << 10)
}

/// `uname -r`.
pub fn running_release() -> Result<String> {
    Ok(nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned())
}

/// This boot's id.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).context(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_is_read() {
        assert!(super::memory_available().unwrap() > 0);
        assert!(!super::running_release().unwrap().is_empty());
        assert_eq!(super::boot_id().unwrap().len(), 36);
    }
}
