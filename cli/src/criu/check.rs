//! `criu check`: whether this kernel has what is needed.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;

use super::Error;
use super::options::Options;

/// A feature by CRIU's name: how it is found here. `None`: it is known, and
/// not offered.
type Probe = Option<fn() -> bool>;

const FEATURES: &[(&str, Probe)] = &[
    ("aio_remap", Some(always)),
    ("timerfd", Some(|| proc("timers"))),
    ("tun", Some(|| Path::new("/dev/net/tun").exists())),
    ("userns", Some(|| ns("user"))),
    ("cgroupns", Some(|| ns("cgroup"))),
    ("timens", Some(|| ns("time"))),
    ("fdinfo_lock", Some(always)),
    ("seccomp_suspend", Some(always)),
    ("seccomp_filters", Some(always)),
    ("loginuid", Some(|| proc("loginuid"))),
    ("kcmp", Some(|| proc("map_files"))),
    ("clone3_set_tid", Some(|| since(5, 5))),
    ("openat2", Some(|| since(5, 6))),
    ("pidfd_store", Some(|| since(5, 6))),
    ("ptrace_get_rseq_conf", Some(|| since(5, 13))),
    ("get_rseq_conf", Some(|| since(5, 13))),
    ("membarrier_get_registrations", Some(|| since(6, 3))),
    ("pagemap_scan", Some(|| since(6, 7))),
    // Writes are noted by an asynchronous userfaultfd.
    ("mem_dirty_track", Some(|| since(6, 7))),
    ("timer_cr_ids", Some(|| since(6, 15))),
    ("can_map_vdso", Some(always)),
    ("tcp_half_closed", Some(always)),
    ("sk_unix_file", Some(always)),
    ("network_lock_nftables", Some(always)),
    ("autofs", None),
    ("compat_cr", None),
    ("uffd", Some(|| Path::new("/dev/userfaultfd").exists())),
    (
        "uffd-noncoop",
        Some(|| Path::new("/dev/userfaultfd").exists()),
    ),
    ("sk_ns", None),
    ("net_diag_raw", None),
    ("nsid", None),
    ("link_nsid", None),
    ("external_net_ns", None),
    ("newifindex", None),
    ("nftables", None),
    ("has_ipt_legacy", None),
    ("network_lock_iptables", None),
    ("memfd_hugetlb", None),
    ("move_mount_set_group", None),
    ("overlayfs_maps", None),
    ("ipv6_freebind", None),
    ("breakpoints", None),
    ("pagemap_scan_guard_pages", None),
];

fn always() -> bool {
    true
}

fn proc(name: &str) -> bool {
    Path::new("/proc/self").join(name).exists()
}

fn ns(name: &str) -> bool {
    Path::new("/proc/self/ns").join(name).exists()
}

/// Whether the kernel is of this release or a later one.
fn since(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok());
    let have = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    have >= (major, minor)
}

/// Whether a feature is offered on this kernel; `None`: nobody knows it.
pub fn feature(name: &str) -> Option<bool> {
    let (_, probe) = FEATURES.iter().find(|(have, _)| *have == name)?;
    Some(probe.is_some_and(|probe| probe()))
}

/// What every run needs and this machine lacks.
pub fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !crate::signals::is_root() {
        missing.push("root's privileges");
    }
    for (name, what) in [
        ("clone3_set_tid", "clone3(2) with a chosen id (Linux 5.5)"),
        (
            "ptrace_get_rseq_conf",
            "PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13)",
        ),
        ("kcmp", "/proc/PID/map_files"),
    ] {
        if feature(name) != Some(true) {
            missing.push(what);
        }
    }
    missing
}

/// Prints what is found.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    if options.features.iter().any(|f| f == "list") {
        let names: Vec<&str> = FEATURES.iter().map(|(name, _)| *name).collect();
        println!("{}", names.join(" "));
        return Ok(ExitCode::SUCCESS);
    }
    let mut good = true;
    for name in &options.features {
        match feature(name) {
            Some(true) => {}
            Some(false) => {
                tracing::warn!("feature {name} is not there");
                good = false;
            }
            None => bail!("unknown feature: {name}"),
        }
    }
    if options.features.is_empty() {
        for what in missing() {
            tracing::error!("missing: {what}");
            good = false;
        }
    }
    if good {
        println!("Looks good.");
        return Ok(ExitCode::SUCCESS);
    }
    println!("Does not look good.");
    Ok(ExitCode::FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_by_name() {
        assert_eq!(feature("timens"), Some(ns("time")));
        assert_eq!(feature("compat_cr"), Some(false));
        assert_eq!(feature("nonsense"), None);
        assert!(since(4, 0) && !since(400, 0));
    }
}
