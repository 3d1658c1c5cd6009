//! The log as CRIU's users know it: seconds since the start, errors and
//! warnings with where they come from, one line each.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// From this level on lines begin with the time.
const WITH_TIME: u8 = 3;

static LEVEL: AtomicU8 = AtomicU8::new(2);
static FILE: Mutex<Option<File>> = Mutex::new(None);
static START: OnceLock<Instant> = OnceLock::new();

/// Sends everything that is logged to standard error, until [`to_file`].
pub fn start() {
    START.get_or_init(Instant::now);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Line)
        .with_ansi(false)
        .with_writer(Target)
        .with_filter(filter_fn(wanted));
    // A second call in one process changes nothing.
    let _ = tracing_subscriber::registry().with(lines).try_init();
}

/// How much is logged: 0 nothing, 1 errors, 2 warnings, 3 information, 4 all.
pub fn set_level(level: u8) {
    LEVEL.store(level, Ordering::Relaxed);
}

/// From now on a file takes the log.
pub fn to_file(path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    *FILE.lock().unwrap_or_else(|e| e.into_inner()) = Some(file);
    Ok(())
}

fn wanted(m: &Metadata<'_>) -> bool {
    let needed = match *m.level() {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        _ => 4,
    };
    LEVEL.load(Ordering::Relaxed) >= needed
}

#[derive(Debug, Clone, Copy)]
struct Target;

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *FILE.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(file) => file.write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Target {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

#[derive(Debug, Clone, Copy)]
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if LEVEL.load(Ordering::Relaxed) >= WITH_TIME {
            let since = START.get_or_init(Instant::now).elapsed();
            write!(
                out,
                "({:02}.{:06}) ",
                since.as_secs(),
                since.subsec_micros()
            )?;
        }
        let m = event.metadata();
        let kind = match *m.level() {
            Level::ERROR => Some("Error"),
            Level::WARN => Some("Warn "),
            _ => None,
        };
        if let Some(kind) = kind {
            let file = m.file().unwrap_or(m.target());
            write!(out, "{kind} ({file}:{}): ", m.line().unwrap_or(0))?;
        }
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
