//! `criu restore`.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rcr_engine::image::DirSource;
use rcr_engine::restore::{RestoreOptions, WORTH_WAITING, restore};

use super::options::Options;
use super::places::Places;
use super::script::{Notify, Scripts};
use super::{Error, cpuinfo, external, join, lazy_pages, pidfile, stats, unsupported};

/// A shell's exit code for a program ended by signal N is this plus N.
const SIGNALLED: i32 = 128;

/// Restores, and unless detached waits for the root process and ends as it does.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    let places = Places::open(options)?;
    // What went wrong is in the log by then.
    let Ok(root) = tree(options, &places, &mut Scripts::new(options, &places)) else {
        return Ok(ExitCode::FAILURE);
    };
    if options.detached {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        let code = match waitpid(Pid::from_raw(root), None)? {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => SIGNALLED + signal as i32,
            _ => continue,
        };
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
    }
}

/// Brings a tree back; returns its root process.
pub fn tree(options: &Options, places: &Places, notify: &mut dyn Notify) -> Result<i32, Error> {
    let done = restore_tree(options, places, notify);
    match &done {
        Ok(_) => tracing::info!("Restore finished successfully. Tasks resumed."),
        Err(e) => {
            tracing::error!("{e:#}");
            tracing::error!("Restoring FAILED.");
        }
    }
    done
}

fn restore_tree(options: &Options, places: &Places, notify: &mut dyn Notify) -> Result<i32, Error> {
    unsupported::check(options)?;
    if options.sibling && !options.detached {
        bail!("option --restore-sibling needs --restore-detached");
    }
    let start = Instant::now();
    let source =
        DirSource::open(&places.images).with_context(|| places.images.display().to_string())?;
    if let Some(mode) = options.cpu_cap.as_deref().filter(|&c| c != "none") {
        cpuinfo::compare(places, Some(mode))?;
    }
    notify.stage("pre-restore", None)?;
    let joined = join::enter(options, &source)?;
    let lazy = options.has("lazy-pages");
    let pager = match lazy {
        true => lazy_pages::find(places)?,
        false => None,
    };
    let how = RestoreOptions {
        lazy: lazy.then_some(WORTH_WAITING),
        pager,
        sibling: options.sibling,
        nets: external::inherited_nets(options)?,
        pipes: external::inherited_pipes(options)?,
        host_as_it_is: true,
        veths: options
            .values("external")
            .filter_map(|v| external::veth(&v))
            .chain(
                options
                    .values("veth-pair")
                    .filter_map(|v| external::veth_pair(&v)),
            )
            .collect(),
        root: options.values("root").last().map(Into::into),
        external_mounts: external::mounts(options)
            .into_iter()
            .map(|(name, source)| (name, source.into()))
            .collect(),
        ..RestoreOptions::default()
    };
    let restored = restore(&source, &how)?;
    // Scripts run where we came from.
    drop(joined);
    let pids = restored.pids();
    let root = *pids.first().context("the images hold no process")?;
    // All of it stands, nothing has run: dropping it takes it away again.
    let root_told = Some(root);
    notify.stage("setup-namespaces", root_told)?;
    notify.stage("post-setup-namespaces", root_told)?;
    if let Some(name) = &options.pidfile {
        pidfile::write(&places.in_work(name), root)?;
    }
    let stands = (|| {
        notify.stage("post-restore", root_told)?;
        notify.stage("pre-resume", root_told)
    })();
    if let Err(e) = stands {
        if let Some(name) = &options.pidfile {
            let _ = std::fs::remove_file(places.in_work(name));
        }
        return Err(e);
    }
    if options.leave_stopped {
        for &pid in &pids {
            kill(Pid::from_raw(pid), Signal::SIGSTOP).context("stop")?;
        }
    }
    let joined = join::enter(options, &source)?;
    restored.resume()?;
    drop(joined);
    if let Err(e) = notify.stage("post-resume", root_told) {
        tracing::warn!("{e:#}");
    }
    stats::restore(&places.work, start.elapsed(), options.display_stats)?;
    if let Some(fd) = options.status_fd {
        ready(fd)?;
    }
    Ok(root)
}

/// Tells whoever holds the other end that all is done: one NUL, then the end.
pub fn ready(fd: i32) -> Result<(), Error> {
    if fd <= 2 || !std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        bail!("option --status-fd: {fd} is no descriptor for it");
    }
    // SAFETY: the number was given to us to use and close, it is open, and
    // nothing else here knows it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&[0]).context("status descriptor")
}
