//! `criu pre-dump`, `criu dedup`, and what a dump takes from images before it.

use std::path::PathBuf;

use anyhow::{Context, bail};
use rcr_engine::Tree;
use rcr_engine::freeze::Frozen;
use rcr_engine::image::{DirSink, DirSource, Kind, put_records};
use rcr_engine::predump::{self, Parent, PreDumpOptions, Tracking, keeper};

use super::dump::Unfinished;
use super::options::Options;
use super::page_server::{Sender, connect};
use super::places::Places;
use super::stats::{self, DumpTimes};
use super::{Error, unsupported};

/// The images before these, as `--prev-images-dir` names them.
pub struct Before {
    /// Relative to the directory of the new images, or absolute.
    pub path: PathBuf,
    source: DirSource,
}

impl Before {
    /// Opens them, if the options name any.
    pub fn open(options: &Options, places: &Places) -> Result<Option<Self>, Error> {
        let Some(path) = options.values("prev-images-dir").last() else {
            return Ok(None);
        };
        let full = places.images.join(&path);
        let source =
            DirSource::open(&full).with_context(|| format!("option --prev-images-dir {path}"))?;
        Ok(Some(Self {
            path: path.into(),
            source,
        }))
    }

    /// Processes that are tracked for their sake.
    pub fn tracked(&self) -> Result<Vec<i32>, Error> {
        Ok(predump::tracked(&self.source)?)
    }

    /// What of them can stay there. `None`: writes since are not known, so the
    /// new images have everything themselves.
    pub fn parent(&self) -> Result<Option<Parent<'_>>, Error> {
        let tracking = predump::take(&self.source)?;
        if tracking.is_none() {
            tracing::warn!("nobody has tracked writes since the images before: all is written");
        }
        Ok(tracking.map(|tracking| Parent {
            images: &self.source,
            tracking,
        }))
    }
}

/// Goes on tracking a tree that has been dumped and runs on: the images are to
/// be those before the next.
pub fn go_on(mut tracking: Tracking, frozen: &Frozen, sink: &mut DirSink) -> Result<(), Error> {
    tracking.start_over(frozen)?;
    let record = tracking.record(true)?;
    Ok(put_records(sink, Kind::RcrTasks, keeper::IMAGE, &[record])?)
}

/// Writes the memory of a tree that runs on.
pub fn pre_dump(options: &Options, places: &Places) -> Result<(), Error> {
    let done = write(options, places);
    match &done {
        Ok(()) => tracing::info!("Pre-dumping finished successfully"),
        Err(e) => {
            tracing::error!("{e:#}");
            tracing::error!("Pre-dumping FAILED.");
        }
    }
    done
}

fn write(options: &Options, places: &Places) -> Result<(), Error> {
    let pid = options.pid.context("option --tree PID is missing")?;
    unsupported::check(options)?;
    if !std::path::Path::new("/proc").join(pid.to_string()).exists() {
        bail!("there is no process {pid}");
    }
    let before = Before::open(options, places)?;
    let parent = before.as_ref().map(Before::parent).transpose()?.flatten();
    let unfinished = Unfinished::make(places)?;
    let mut sink = DirSink::create(unfinished.path()).context("images directory")?;
    if let (Some(before), Some(_)) = (&before, &parent) {
        sink.set_parent(&before.path)?;
    }
    let how = PreDumpOptions {
        keep: true,
        pages_once: false,
    };
    let tree = Tree::Root(pid);
    let (_, figures) = match options.has("page-server") {
        true => {
            let mut sender = Sender::new(connect(options)?, &mut sink, true);
            let done = predump::pre_dump(&tree, parent, &mut sender, how)?;
            sender.finish()?;
            done
        }
        false => predump::pre_dump(&tree, parent, &mut sink, how)?,
    };
    drop(sink);
    unfinished.finish(places)?;
    let times = DumpTimes {
        frozen: figures.frozen,
        ..DumpTimes::default()
    };
    stats::dump(
        &places.work,
        times,
        figures.page_bytes,
        options.display_stats,
    )
}

/// Gives back what later images have themselves.
pub fn dedup(options: &Options) -> Result<(), Error> {
    let places = Places::open(options)?;
    let freed = predump::dedup(&places.images)?;
    tracing::info!("{freed} bytes given back");
    Ok(())
}
