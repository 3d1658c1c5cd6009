//! A request's options in the form of the command line's.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::schema::Opts;
use crate::criu::Error;
use crate::criu::config;
use crate::criu::options::{Command, Options};

/// How a mode of `--manage-cgroups` is numbered.
const CGROUP_MODES: [&str; 7] = ["ignore", "none", "props", "soft", "full", "strict", "soft"];

/// Options of a request by `client`, whose descriptors it numbers.
pub fn options(command: Command, opts: &Opts, client: i32) -> Result<Options, Error> {
    let mut o = config::with_defaults(&[])?;
    o.command = command;
    let of_client = |fd: i32| -> Result<PathBuf, Error> {
        let link = format!("/proc/{client}/fd/{fd}");
        Ok(std::fs::canonicalize(Path::new(&link))?)
    };
    o.images_dir = match &opts.images_dir {
        Some(dir) => Some(dir.into()),
        None if opts.images_dir_fd >= 0 => Some(of_client(opts.images_dir_fd)?),
        None => bail!("no directory for the images"),
    };
    if let Some(fd) = opts.work_dir_fd.filter(|&fd| fd >= 0) {
        o.work_dir = Some(of_client(fd)?);
    }
    let log = opts.log_file.as_deref().unwrap_or("criu.log");
    if log.contains('/') {
        bail!("log file {log:?}: directories are not allowed");
    }
    o.log_file = Some(log.into());
    if let Some(level) = opts.log_level {
        o.verbosity = level.clamp(0, 9) as u8;
    }
    o.pid = Some(opts.pid.unwrap_or(client));
    let set = |flag: &mut bool, given: Option<bool>| *flag = given.unwrap_or(*flag);
    set(&mut o.leave_running, opts.leave_running);
    set(&mut o.leave_stopped, opts.leave_stopped);
    set(&mut o.ext_unix_sk, opts.ext_unix_sk);
    set(&mut o.tcp_established, opts.tcp_established);
    set(&mut o.tcp_close, opts.tcp_close);
    set(&mut o.skip_in_flight, opts.tcp_skip_in_flight);
    set(&mut o.display_stats, opts.display_stats);
    set(&mut o.sibling, opts.rst_sibling);
    if let Some(bits) = opts.cpu_cap {
        let names = ["fpu", "cpu", "ins"];
        let asked = (0..).zip(names).filter(|(bit, _)| bits >> bit & 1 == 1);
        let asked: Vec<&str> = asked.map(|(_, name)| name).collect();
        let none = asked.is_empty().then(|| "none".to_owned());
        o.cpu_cap = Some(none.unwrap_or_else(|| asked.join(",")));
    }
    if let Some(ps) = &opts.ps {
        o.address = ps.address.as_ref().map(Into::into);
        let port = ps.port.unwrap_or(0);
        o.port = u16::try_from(port).ok().filter(|&p| p > 0);
        o.page_socket = ps.fd;
    }
    o.ghost_limit = opts.ghost_limit.map(u64::from).or(o.ghost_limit);
    o.timeout = opts.timeout.or(o.timeout);
    o.status_fd = opts.status_fd.or(o.status_fd);
    // The client is told when the tree runs; it waits for it by itself.
    o.detached = true;
    named(opts, &mut o);
    // Engines name one whether it is there or not.
    if let Some(file) = opts.config_file.as_deref().map(Path::new)
        && file.exists()
    {
        config::apply(file, &mut o)?;
    }
    Ok(o)
}

/// What only [`crate::criu::unsupported`] looks at, under its long name.
fn named(opts: &Opts, o: &mut Options) {
    let mut name = |name: &str, value: String| {
        o.named.push((name.to_owned(), Some(value.into())));
    };
    let flags = [
        ("shell-job", opts.shell_job),
        ("auto-dedup", opts.auto_dedup),
        ("track-mem", opts.track_mem),
        ("lazy-pages", opts.lazy_pages),
        ("orphan-pts-master", opts.orphan_pts_master),
        ("tls", opts.tls),
        ("stream", opts.stream),
    ];
    for (flag, _) in flags.iter().filter(|(_, on)| *on == Some(true)) {
        name(flag, String::new());
    }
    if opts.ps.is_some() {
        name("page-server", String::new());
    }
    if let Some(root) = &opts.root {
        name("root", root.clone());
    }
    if let Some(parent) = &opts.parent_img {
        name("prev-images-dir", parent.clone());
    }
    for e in &opts.external {
        name("external", e.clone());
    }
    for m in &opts.ext_mnt {
        name("external", format!("mnt[{}]:{}", m.key, m.val));
    }
    for i in &opts.inherit_fd {
        name("inherit-fd", format!("fd[{}]:{}", i.fd, i.key));
    }
    for j in &opts.join_ns {
        let extra = j.extra_opt.as_ref().map(|e| format!(",{e}"));
        let extra = extra.unwrap_or_default();
        name("join-ns", format!("{}:{}{extra}", j.ns, j.ns_file));
    }
    for m in &opts.skip_mnt {
        name("skip-mnt", m.clone());
    }
    for f in &opts.enable_fs {
        name("enable-fs", f.clone());
    }
    if let Some(mask) = opts.empty_ns.filter(|&m| m != 0) {
        name("empty-ns", format!("{mask:#x}"));
    }
    if let Some(profile) = &opts.lsm_profile {
        name("lsm-profile", profile.clone());
    }
    if let Some(context) = &opts.lsm_mount_context {
        name("lsm-mount-context", context.clone());
    }
    for r in &opts.cg_root {
        let controller = r.ctrl.as_deref().map(|c| format!("{c}:"));
        name(
            "cgroup-root",
            format!("{}{}", controller.unwrap_or_default(), r.path),
        );
    }
    let mode = opts
        .manage_cgroups_mode
        .or(opts.manage_cgroups.filter(|&on| on).map(|_| 3));
    if let Some(mode) = mode {
        let mode = CGROUP_MODES.get(mode as usize).copied().unwrap_or("soft");
        name("manage-cgroups", mode.to_owned());
    }
    match opts.network_lock {
        Some(1) => name("network-lock", "iptables".into()),
        Some(2) => name("network-lock", "nftables".into()),
        Some(3) => name("network-lock", "skip".into()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_a_command_line_does() {
        let me = std::process::id() as i32;
        let opts = Opts {
            images_dir: Some("/tmp".into()),
            pid: Some(42),
            leave_running: Some(true),
            log_level: Some(4),
            external: vec!["mnt[/a]:b".into()],
            manage_cgroups_mode: Some(0),
            ..Opts::default()
        };
        let o = options(Command::Dump, &opts, me).unwrap();
        assert_eq!((o.pid, o.verbosity), (Some(42), 4));
        assert!(o.leave_running && o.has("external") && o.has("manage-cgroups"));
        let log = Opts {
            log_file: Some("a/b".into()),
            ..opts
        };
        assert!(options(Command::Dump, &log, me).is_err());
        assert!(options(Command::Dump, &Opts::default(), me).is_err());
    }
}
