//! What is dumped and restored.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const REDIS_PORT: u16 = 7777;
/// Grows as long as a workload does its work.
const BEAT: &str = "/tmp/beat";

/// A program and how to see that it works.
pub struct Workload {
    pub name: &'static str,
    /// For sh.
    script: &'static str,
    works: fn(&Seen) -> Result<bool>,
}

/// What was seen when the program worked before the dump.
pub struct Seen {
    pid: i32,
    beat: u64,
}

pub const ALL: &[Workload] = &[
    Workload {
        name: "sleep",
        script: "exec sleep 1000",
        works: |seen| {
            let comm = fs::read_to_string(format!("/proc/{}/comm", seen.pid))?;
            Ok(comm.trim() == "sleep")
        },
    },
    Workload {
        name: "thread pool",
        script: "exec python3 -S -c '
import threading, time
beats = [0] * 8
def work(i):
    while True:
        beats[i] += 1
        if i == 0:
            with open(\"/tmp/beat\", \"a\") as f: f.write(str(min(beats)) + \"\\n\")
        time.sleep(0.02)
for i in range(8): threading.Thread(target=work, args=(i,)).start()
'",
        works: |seen| {
            let threads = fs::read_dir(format!("/proc/{}/task", seen.pid))?.count();
            Ok(threads == 9 && beats()? > seen.beat)
        },
    },
    Workload {
        name: "pipe pair",
        script: "exec python3 -S -c '
import os, time
there, back = os.pipe(), os.pipe()
if os.fork() == 0:
    while True: os.write(back[1], os.read(there[0], 1))
while True:
    os.write(there[1], b\"x\")
    assert os.read(back[0], 1) == b\"x\"
    with open(\"/tmp/beat\", \"a\") as f: f.write(\".\")
    time.sleep(0.02)
'",
        works: |seen| Ok(beats()? > seen.beat),
    },
    Workload {
        name: "shell pipeline",
        script: "while :; do echo beat; sleep 0.05; done | cat | cat >> /tmp/beat",
        works: |seen| Ok(beats()? > seen.beat),
    },
    Workload {
        name: "redis",
        script: "exec redis-server --port 7777 --save '' --appendonly no --dir /tmp",
        works: |seen| {
            let key = format!("k{}", seen.pid);
            // Set before the dump; there afterwards.
            let have = redis(&format!("GET {key}\r\n"))?;
            if seen.beat == 0 {
                redis(&format!("SET {key} carried\r\n"))?;
                return Ok(true);
            }
            Ok(have.contains("carried"))
        },
    },
];

fn beats() -> Result<u64> {
    match fs::metadata(BEAT) {
        Ok(m) => Ok(m.len()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e.into()),
    }
}

fn redis(request: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, REDIS_PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    stream.write_all(b"QUIT\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A workload that works.
pub struct Running(i32);

impl Running {
    /// The first process.
    pub fn pid(&self) -> i32 {
        self.0
    }

    /// Waits until it has been killed.
    pub fn is_gone(&self) -> Result<()> {
        match waitpid(Pid::from_raw(self.0), None)? {
            WaitStatus::Signaled(..) => {}
            other => bail!("it ended by itself: {other:?}"),
        }
        // The rest of the tree is ours to reap now.
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status.pid().is_some()
        ) {}
        Ok(())
    }
}

impl Workload {
    /// Starts it in a session of its own and waits until it works.
    pub fn start(&self) -> Result<Running> {
        if let Err(e) = fs::remove_file(BEAT)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(e.into());
        }
        let mut command = Command::new("/bin/sh");
        command.args(["-c", self.script]).current_dir("/tmp");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null());
        // SAFETY: setsid is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        let pid = command.spawn()?.id() as i32;
        self.wait(&Seen { pid, beat: 0 })?;
        Ok(Running(pid))
    }

    /// Waits until it is seen to work on.
    pub fn goes_on(&self, pid: i32) -> Result<()> {
        let beat = beats()?.max(1);
        self.wait(&Seen { pid, beat })
    }

    fn wait(&self, seen: &Seen) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut last = None;
        while Instant::now() < end {
            match (self.works)(seen) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(e) => last = Some(e),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        match last {
            Some(e) => Err(e).context("it does not work"),
            None => bail!("it does not work"),
        }
    }
}
