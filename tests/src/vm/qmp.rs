//! QEMU's machine protocol, as far as we use it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection on which the capabilities are negotiated.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects, waiting a little for QEMU to open its socket.
    ///
    /// # Errors
    /// When nobody listens or the greeting is not QEMU's.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let writer = connect(path)?;
        let mut qmp = Qmp {
            reader: BufReader::new(writer.try_clone()?),
            writer,
        };
        qmp.read()?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and returns what it returned.
    ///
    /// # Errors
    /// When QEMU reports one, or hangs up.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": name, "arguments": arguments }).to_string();
        writeln!(self.writer, "{line}")?;
        loop {
            let mut message = self.read().with_context(|| format!("waiting for {name}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {name}: {error}");
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Runs a command of the human monitor; what it prints is its error.
    ///
    /// # Errors
    /// When it prints anything.
    pub fn monitor(&mut self, line: &str) -> Result<()> {
        let said = self.command("human-monitor-command", json!({ "command-line": line }))?;
        match said.as_str() {
            Some("") => Ok(()),
            _ => bail!("QEMU's monitor said to `{line}`: {said}"),
        }
    }

    /// Ends QEMU.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn quit(&mut self) -> Result<()> {
        self.command("quit", json!({})).map(drop)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU hung up");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// Connects to a socket of QEMU's that may not be there yet. The address of a
/// socket is short, the path of a checkout may be long: it goes by way of the
/// open folder.
pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    let folder = File::open(path.parent().context("a socket is in a folder")?)?;
    let name = path.file_name().context("a socket has a name")?;
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    let start = Instant::now();
    loop {
        match UnixStream::connect(&short) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > Duration::from_secs(10) => {
                return Err(error).with_context(|| format!("connecting to {}", path.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
