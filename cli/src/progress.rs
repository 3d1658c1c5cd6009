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
        }
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
            let start = if self.live { "\r" } else { "" };
            tell(&format!("{start}{}: {text}: {ms} ms\n", self.program));
        }
    }

    /// A line beside the stages.
    pub fn note(&mut self, text: &str) {
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

/// Writes to standard error. A terminal that has gone must not stop an upgrade.
fn tell(text: &str) {
    let mut stderr = std::io::stderr();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}
