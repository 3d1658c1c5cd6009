//! A client program of this host, driven through pipes: a line in, lines out.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, anyhow};

use super::client::PATIENCE;

/// A running client.
pub struct Piped {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Piped {
    /// Starts a program.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(command: &mut Command) -> Result<Piped> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("{command:?}"))?;
        let stdin = child.stdin.take().context("a pipe to it")?;
        let stdout = child.stdout.take().context("a pipe from it")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Piped {
            child,
            stdin,
            lines,
        })
    }

    /// Gives it a line.
    ///
    /// # Errors
    /// When it has ended.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.stdin.write_all(line.as_bytes())?;
        self.stdin.write_all(b"\n")?;
        Ok(self.stdin.flush()?)
    }

    /// Its next line.
    ///
    /// # Errors
    /// When it has ended, or none comes.
    pub fn hear(&mut self) -> Result<String> {
        let line = self.lines.recv_timeout(PATIENCE);
        line.map_err(|e| anyhow!("the client program: {e}"))
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
