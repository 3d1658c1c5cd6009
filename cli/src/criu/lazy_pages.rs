//! `criu lazy-pages`: fills the memory of processes that `restore --lazy-pages`
//! has let run before it was there.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use rcr_engine::image::DirSource;
use rcr_engine::restore::{PageOrigin, serve};

use super::options::Options;
use super::page_server::Asker;
use super::places::Places;
use super::{Error, daemon};

/// In the work directory: where restorers come.
const SOCKET: &str = "lazy-pages.socket";

/// Serves one restore.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    let places = Places::open(options)?;
    let source =
        DirSource::open(&places.images).with_context(|| places.images.display().to_string())?;
    let origin = options
        .has("page-server")
        .then(|| Asker::new(options))
        .transpose()?;
    let path = socket(&places);
    let told = || path.display().to_string();
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(told),
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(told)?;
    if !daemon::stand(options, &places)? {
        return Ok(ExitCode::SUCCESS);
    }
    let done = fill(&listener, &path, &source, origin);
    if let Err(e) = &done {
        tracing::error!("{e:#}");
    }
    Ok(done.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}

fn fill(
    listener: &UnixListener,
    path: &std::path::Path,
    source: &DirSource,
    mut origin: Option<Asker>,
) -> Result<(), Error> {
    let accepted = listener.accept().context("waiting for a restore");
    // Nobody else is served.
    std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    let (stream, _) = accepted?;
    let asked = origin.as_mut().map(|o| o as &mut dyn PageOrigin);
    let whole = serve(stream, source, asked)?;
    anyhow::ensure!(whole, "the restore was given up");
    if let Some(origin) = origin {
        origin.close()?;
    }
    tracing::info!("all memory is filled");
    Ok(())
}

fn socket(places: &Places) -> PathBuf {
    places.work.join(SOCKET)
}

/// Connects to one that serves here; `None` if there is none.
pub fn find(places: &Places) -> Result<Option<UnixStream>, Error> {
    let path = socket(places);
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Some(stream)),
        Err(e) => match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
            _ => Err(e).with_context(|| path.display().to_string()),
        },
    }
}
