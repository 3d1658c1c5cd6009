//! `criu dump`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcr_engine::Tree;
use rcr_engine::dump::{self, DumpOptions};
use rcr_engine::file::{FilePolicy, TcpPolicy, UnixPolicy};
use rcr_engine::freeze::{freeze, freeze_within};
use rcr_engine::image::{DirSink, DirSource, ImageSink};
use rcr_engine::namespace::{self, NsIds, NsKind};
use rcr_engine::predump;

use super::generation::Before;
use super::options::Options;
use super::page_server::{Sender, connect, give_pages, listen};
use super::places::Places;
use super::script::Notify;
use super::stats::{self, DumpTimes};
use super::{Error, cgroups, cpuinfo, external, generation, restore, unsupported};

/// Below the images' directory: where they are until they are whole.
const UNFINISHED: &str = ".unfinished";
/// The largest removed file that is carried unless told otherwise, bytes.
const GHOST_LIMIT: u64 = 1 << 20;

/// Writes the images of a tree. After failure the tree runs on, and images of
/// an earlier dump are as they were.
pub fn run(options: &Options, places: &Places, notify: &mut dyn Notify) -> Result<(), Error> {
    let done = dump_tree(options, places, notify);
    match &done {
        Ok(()) => tracing::info!("Dumping finished successfully"),
        Err(e) => {
            tracing::error!("{e:#}");
            tracing::error!("Dumping FAILED.");
        }
    }
    done
}

fn dump_tree(options: &Options, places: &Places, notify: &mut dyn Notify) -> Result<(), Error> {
    let pid = options.pid.context("option --tree PID is missing")?;
    unsupported::check(options)?;
    if !Path::new("/proc").join(pid.to_string()).exists() {
        bail!("there is no process {pid}");
    }
    if options.has("lazy-pages") && (options.leave_running || options.leave_stopped) {
        bail!("option --lazy-pages: the tree cannot be left, it goes on where its pages go");
    }
    if options.has("lazy-pages") && options.has("prev-images-dir") {
        bail!("option --lazy-pages goes without --prev-images-dir");
    }
    let mut how = dump_options(options);
    how.mounts.external = external::mounts(options)
        .into_iter()
        .map(|(place, name)| (place.into(), name))
        .collect();
    if options.has("root") && has_own_mounts(pid)? {
        how.mounts.root = namespace::root_shown(Pid::from_raw(pid))?;
    }
    let before = Before::open(options, places)?;
    if let Some(before) = &before {
        how.tracked = before.tracked()?.into_iter().collect();
    }
    let tree = Tree::Root(pid);
    notify.stage("pre-dump", Some(pid))?;
    let refusals = dump::check(&tree, &how).with_context(|| format!("process {pid}"))?;
    for refusal in &refusals {
        tracing::error!("{refusal}");
    }
    cgroups::check(options, &tree)?;
    if !refusals.is_empty() {
        bail!("{} things cannot be carried", refusals.len());
    }
    let parent = before.as_ref().map(Before::parent).transpose()?.flatten();
    let unfinished = Unfinished::make(places)?;
    let mut sink = DirSink::create(unfinished.path()).context("images directory")?;
    if let (Some(before), Some(_)) = (&before, &parent) {
        sink.set_parent(&before.path)?;
    }
    let start = Instant::now();
    let lazy = options
        .has("lazy-pages")
        .then(|| listen(options))
        .transpose()?;
    // Then address and port are those where we listen.
    let asked = options.has("page-server") && lazy.is_none();
    let server = asked.then(|| connect(options)).transpose()?;
    let frozen = match options.timeout.filter(|&s| s > 0) {
        Some(seconds) => freeze_within(&tree, Duration::from_secs(seconds.into()))?,
        None => freeze(&tree)?,
    };
    let stood = Instant::now();
    tracing::debug!("{} processes stand", frozen.processes.len());
    let write = |sink: &mut dyn ImageSink| match &parent {
        Some(parent) => dump::dump_onto(&frozen, sink, &how, parent),
        None => dump::dump(&frozen, sink, &how),
    };
    let figures = match server {
        Some(server) => {
            let mut sender = Sender::new(server, &mut sink, false);
            let figures = write(&mut sender)?;
            sender.finish()?;
            figures
        }
        None => write(&mut sink)?,
    };
    if options.has("track-mem") && options.leave_running {
        let tracking = parent.map(|p| p.tracking).unwrap_or_default();
        generation::go_on(tracking, &frozen, &mut sink)?;
    }
    drop(sink);
    unfinished.finish(places)?;
    if options.cpu_cap.as_deref().is_some_and(|c| c != "none") {
        cpuinfo::write(places)?;
    }
    if options.has("auto-dedup") {
        predump::dedup(&places.images)?;
    }
    if let Some(listener) = lazy {
        if let Some(fd) = options.status_fd {
            restore::ready(fd)?;
        }
        give_pages(&listener, &figures.pids)?;
    }
    notify.stage("post-dump", Some(pid))?;
    let pids: Vec<i32> = frozen.processes.iter().map(|p| p.info.pid).collect();
    if options.leave_stopped {
        for &pid in &pids {
            // It has not run, so it is there.
            kill(Pid::from_raw(pid), Signal::SIGSTOP).context("stop")?;
        }
        frozen.thaw();
    } else if options.leave_running {
        frozen.thaw();
    } else {
        frozen.kill();
    }
    let times = DumpTimes {
        freezing: stood - start,
        frozen: stood.elapsed(),
    };
    stats::dump(
        &places.work,
        times,
        figures.page_bytes,
        options.display_stats,
    )
}

fn has_own_mounts(pid: i32) -> Result<bool, Error> {
    let theirs = NsIds::of(Pid::from_raw(pid))?;
    Ok(!theirs.same(&NsIds::own()?, NsKind::Mnt))
}

fn dump_options(options: &Options) -> DumpOptions {
    let tcp = if options.tcp_close {
        TcpPolicy::Close
    } else if options.tcp_established {
        TcpPolicy::Carry
    } else {
        TcpPolicy::Refuse
    };
    let unix = match options.ext_unix_sk {
        true => UnixPolicy::Close,
        false => UnixPolicy::Refuse,
    };
    DumpOptions {
        files: FilePolicy {
            tcp,
            unix,
            skip_in_flight: options.skip_in_flight,
            shell_job: options.has("shell-job"),
            // Container engines ask for it: they hold the other ends.
            stdio_outside: options.has("orphan-pts-master"),
            ghost_bytes_max: options.ghost_limit.unwrap_or(GHOST_LIMIT),
            ..FilePolicy::frozen()
        },
        lazy: options.has("lazy-pages"),
        empty_net: options.has("empty-ns"),
        external_nets: options
            .values("external")
            .filter_map(|v| external::net(&v))
            .collect(),
        ..DumpOptions::default()
    }
}

/// A directory of images that may not become whole; gone when dropped.
pub struct Unfinished(PathBuf);

impl Unfinished {
    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes what an earlier run may have left away.
    pub fn make(places: &Places) -> Result<Self, Error> {
        let dir = places.images.join(UNFINISHED);
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context(dir.display().to_string())
            }
            _ => Ok(Self(dir)),
        }
    }

    /// Puts the images in the place of those of an earlier dump.
    pub fn finish(&self, places: &Places) -> Result<(), Error> {
        let told = || places.images.display().to_string();
        for entry in fs::read_dir(&places.images).with_context(told)? {
            let entry = entry?;
            let name = entry.file_name();
            // `cpuinfo dump` is a command of its own.
            let image = name
                .to_str()
                .is_some_and(|n| n.ends_with(".img") && n != cpuinfo::IMAGE);
            let kind = entry.file_type()?;
            let parent = name == DirSource::PARENT && kind.is_symlink();
            if image && kind.is_file() || parent {
                fs::remove_file(entry.path()).with_context(told)?;
            }
        }
        for entry in fs::read_dir(&self.0).with_context(told)? {
            let entry = entry?;
            fs::rename(entry.path(), places.images.join(entry.file_name())).with_context(told)?;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {e}", self.0.display());
        }
    }
}
