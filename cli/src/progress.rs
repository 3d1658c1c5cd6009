//! Live lines on standard error: what is being done, how long it took.

use std::io::{IsTerminal, Write};

use rcr_systemd::handover::{Side, StageClock, StageTime};

/// Tells of the stages and times them.
#[derive(Debug)]
pub struct Progress {
    program: &'static str,
    clock: StageClock,
    live: bool,
    running: Option<String>,
    to_kernel: bool,
}

impl Progress {
    /// Starts with nothing running.
    pub fn new(program: &'static str) -> Self {
        let live = std::io::stderr().is_terminal();
        Progress {
            program,
            clock: StageClock::start(Side::Old),
            live,
            running: None,
            to_kernel: false,
        }
    }

    /// From now on lines go to the kernel's log: nobody else listens any more.
    pub fn tell_the_kernel(&mut self) {
        self.live = false;
        self.to_kernel = true;
    }

    /// A stage begins. On a terminal its line stays open until it ends.
    pub fn begin(&mut self, text: &str) {
        self.running = Some(text.to_owned());
        if self.live {
            tell(&format!("{}: {text} …", self.program));
        }
    }

    /// The running stage ends, named `name` in reports.
    pub fn end(&mut self, name: &str) {
        self.clock.lap(name);
        let ms = self.clock.stages().last().map_or(0, |stage| stage.ms);
        if let Some(text) = self.running.take() {
            if self.to_kernel {
                return tell_kernel(&format!("{text}: {ms} ms"));
            }
            let start = if self.live { "\r" } else { "" };
            tell(&format!("{start}{}: {text}: {ms} ms\n", self.program));
        }
    }

    /// A line beside the stages.
    pub fn note(&mut self, text: &str) {
        if self.to_kernel {
            return tell_kernel(text);
        }
        if self.live && self.running.is_some() {
            tell("\n");
        }
        tell(&format!("{}: {text}\n", self.program));
    }

    /// Ends an open line after a failure.
    pub fn broken(&mut self) {
        if self.running.take().is_some() && self.live {
            tell("\n");
        }
    }

    /// Whose lines these are.
    pub fn program(&self) -> &'static str {
        self.program
    }

    /// The stages that ended so far.
    pub fn stages(&self) -> &[StageTime] {
        self.clock.stages()
    }
}

/// Writes a line to the kernel's log (kmsg, priority info).
pub fn tell_kernel(text: &str) {
    let line = format!("<6>rcr: {}\n", text.replace('\n', "; "));
    let written = std::fs::File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if let Err(e) = written {
        tracing::warn!("/dev/kmsg: {e}");
    }
}

/// Writes to standard error. A terminal that has gone must not stop an upgrade.
fn tell(text: &str) {
    let mut stderr = std::io::stderr();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}
