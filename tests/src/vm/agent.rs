//! The harness' end of the agent's lines.
//!
//! The guest runs two agents, each with a port of its own: one may sit in a
//! long command while the other still answers pings. QEMU lets one client at a
//! time onto a port; a lock file per port keeps processes apart.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::qmp::connect;
use super::{Boot, Crossing};
use crate::wire::{Bytes, Exit, Line, Reply, Request};

/// How many agents the guest runs.
pub const PORTS: usize = 2;

/// Time added to what a command may take for the agent to say so.
const GRACE: Duration = Duration::from_secs(20);

/// Both ports of one machine.
pub struct Agent {
    dir: PathBuf,
    port: Option<Port>,
}

struct Port {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Held, never read.
    _lock: Flock<File>,
}

impl Agent {
    pub(super) fn new(dir: &Path) -> Agent {
        Agent {
            dir: dir.to_owned(),
            port: None,
        }
    }

    /// Waits until the guest answers.
    pub(super) fn wait(&mut self, timeout: Duration, child: &mut Option<Child>) -> Result<Boot> {
        self.ping(timeout, child)
            .context("waiting for the guest's agent")
    }

    pub(super) fn ping(&mut self, timeout: Duration, child: &mut Option<Child>) -> Result<Boot> {
        match self.ask(Request::Ping, timeout, child)? {
            Reply::Pong { boot_id, kernel } => Ok(Boot {
                id: boot_id,
                kernel,
            }),
            other => bail!("the agent answered a ping with {other:?}"),
        }
    }

    pub(super) fn exec(
        &mut self,
        argv: Vec<String>,
        stdin: Vec<u8>,
        timeout: Duration,
        child: &mut Option<Child>,
    ) -> Result<Exit> {
        let timeout_ms = timeout.as_millis().try_into()?;
        let what = argv.join(" ");
        let request = Request::Exec {
            argv,
            stdin: Bytes(stdin),
            timeout_ms,
        };
        match self
            .ask(request, timeout + GRACE, child)
            .with_context(|| format!("`{what}`"))?
        {
            Reply::Exited(exit) => Ok(exit),
            other => bail!("the agent answered `{what}` with {other:?}"),
        }
    }

    pub(super) fn read_file(&mut self, path: &str, child: &mut Option<Child>) -> Result<Vec<u8>> {
        let request = Request::ReadFile {
            path: path.to_owned(),
        };
        match self.ask(request, GRACE, child)? {
            Reply::File { data } => Ok(data.0),
            Reply::Failed { message } => bail!("guest: {message}"),
            other => bail!("the agent answered with {other:?}"),
        }
    }

    pub(super) fn write_file(
        &mut self,
        path: &str,
        data: &[u8],
        mode: u32,
        child: &mut Option<Child>,
    ) -> Result<()> {
        let data = Bytes(data.to_vec());
        match self.ask(
            Request::WriteFile {
                path: path.to_owned(),
                data,
                mode,
            },
            GRACE,
            child,
        )? {
            Reply::Written => Ok(()),
            Reply::Failed { message } => bail!("guest: {message}"),
            other => bail!("the agent answered with {other:?}"),
        }
    }

    /// Runs a command on one port while the other is asked which boot answers.
    pub(super) fn exec_across(
        &mut self,
        argv: Vec<String>,
        boot_before: &str,
        timeout: Duration,
        child: &mut Option<Child>,
    ) -> Result<Crossing> {
        let deadline = Instant::now() + timeout;
        let mut watch = Agent::new(&self.dir);
        let port = self.port()?;
        let request = Request::Exec {
            argv,
            stdin: Bytes::default(),
            timeout_ms: timeout.as_millis().try_into()?,
        };
        let id = port.send(request)?;
        while Instant::now() < deadline {
            if let Some(reply) = port.receive(id, Duration::from_secs(1))? {
                return match reply {
                    Reply::Exited(exit) => Ok(Crossing::Returned(exit)),
                    other => bail!("the agent answered with {other:?}"),
                };
            }
            match watch.ping(Duration::from_secs(3), child) {
                Ok(boot) if boot.id != boot_before => return Ok(Crossing::Jumped(boot)),
                Err(error) if ended(child) => return Err(error),
                _ => {}
            }
        }
        bail!("neither a result nor a new boot in {timeout:?}")
    }

    fn ask(
        &mut self,
        request: Request,
        timeout: Duration,
        child: &mut Option<Child>,
    ) -> Result<Reply> {
        let deadline = Instant::now() + timeout;
        let port = self.port()?;
        let id = port.send(request)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest's agent did not answer in {timeout:?}");
            }
            match port.receive(id, left.min(Duration::from_secs(1))) {
                Ok(Some(Reply::Failed { message })) => bail!("guest: {message}"),
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) if ended(child) => bail!("QEMU has ended"),
                Ok(None) => {}
                Err(error) => {
                    self.port = None;
                    return Err(error);
                }
            }
        }
    }

    fn port(&mut self) -> Result<&mut Port> {
        let port = match self.port.take() {
            Some(port) => port,
            None => Port::open(&self.dir)?,
        };
        Ok(self.port.insert(port))
    }
}

impl Port {
    /// Opens a port that no process uses now, waiting for one if need be.
    fn open(dir: &Path) -> Result<Port> {
        loop {
            for number in 0..PORTS {
                let lock = File::create(dir.join(format!("agent{number}.lock")))?;
                let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
                    continue;
                };
                let stream = connect(&dir.join(format!("agent{number}.sock")))?;
                return Ok(Port {
                    stream,
                    buffer: Vec::new(),
                    _lock: lock,
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn send(&mut self, body: Request) -> Result<u64> {
        let id = RandomState::new().hash_one(Instant::now());
        let mut line = b"\n".to_vec();
        serde_json::to_writer(&mut line, &Line { id, body })?;
        line.push(b'\n');
        self.stream
            .write_all(&line)
            .context("writing to the agent's port")?;
        Ok(id)
    }

    /// The reply to `id`, or nothing if it does not come in `timeout`.
    fn receive(&mut self, id: u64, timeout: Duration) -> Result<Option<Reply>> {
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                match serde_json::from_slice::<Line<Reply>>(&line) {
                    Ok(line) if line.id == id => return Ok(Some(line.body)),
                    _ => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = vec![0; 1 << 16];
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("QEMU hung up"),
                Ok(count) => self.buffer.extend_from_slice(&bytes[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn ended(child: &mut Option<Child>) -> bool {
    child
        .as_mut()
        .is_some_and(|child| !matches!(child.try_wait(), Ok(None)))
}
