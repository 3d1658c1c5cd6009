//! The harness' hand inside the guest: answers requests on a virtio-serial
//! port, one at a time. `rcr-agent /dev/virtio-ports/NAME`.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rcr_tests::wire::{Bytes, Exit, Line, Reply, Request};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: rcr-agent PORT")?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {path}"))?;
    let mut writer = port.try_clone()?;
    let mut reader = BufReader::new(port);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            // Nobody is connected on the host's side.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        let Ok(request) = serde_json::from_slice::<Line<Request>>(&line) else {
            continue;
        };
        let body = answer(request.body).unwrap_or_else(|error| Reply::Failed {
            message: format!("{error:#}"),
        });
        let mut reply = serde_json::to_vec(&Line {
            id: request.id,
            body,
        })?;
        reply.push(b'\n');
        writer.write_all(&reply)?;
    }
}

fn answer(request: Request) -> Result<Reply> {
    Ok(match request {
        Request::Ping => Reply::Pong {
            boot_id: read_trimmed("/proc/sys/kernel/random/boot_id")?,
            kernel: read_trimmed("/proc/sys/kernel/osrelease")?,
        },
        Request::Exec {
            argv,
            stdin,
            timeout_ms,
        } => Reply::Exited(exec(&argv, &stdin.0, Duration::from_millis(timeout_ms))?),
        Request::ReadFile { path } => Reply::File {
            data: Bytes(fs::read(&path).with_context(|| path)?),
        },
        Request::WriteFile { path, data, mode } => {
            write_file(&path, &data.0, mode).with_context(|| path)?;
            Reply::Written
        }
    })
}

fn read_trimmed(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path)
        .with_context(|| path.to_owned())?
        .trim()
        .to_owned())
}

fn write_file(path: &str, data: &[u8], mode: u32) -> Result<()> {
    // A running program's file cannot be opened for writing, but its name can
    // be given to a new file.
    let temporary = format!("{path}.new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)?;
    file.write_all(data)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    fs::rename(&temporary, path)?;
    Ok(())
}

/// Runs a program to its end. Its output goes to memory files, not pipes: a
/// daemon it leaves behind may keep them open without holding us up.
fn exec(argv: &[String], stdin: &[u8], timeout: Duration) -> Result<Exit> {
    let Some((program, arguments)) = argv.split_first() else {
        bail!("no program given")
    };
    let mut input = memory_file("stdin")?;
    input.write_all(stdin)?;
    input.seek(SeekFrom::Start(0))?;
    let mut output = memory_file("stdout")?;
    let mut errors = memory_file("stderr")?;
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .env("HOME", "/root")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(errors.try_clone()?))
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let start = Instant::now();
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !timed_out && start.elapsed() > timeout {
            timed_out = true;
            killpg(Pid::from_raw(child.id().try_into()?), Signal::SIGKILL)?;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ok(Exit {
        code: status.code(),
        signal: status.signal(),
        timed_out,
        stdout: content(&mut output)?,
        stderr: content(&mut errors)?,
    })
}

fn memory_file(name: &str) -> Result<File> {
    let fd: OwnedFd = memfd_create(name, MFdFlags::MFD_CLOEXEC)?;
    Ok(File::from(fd))
}

fn content(file: &mut File) -> Result<Bytes> {
    let mut bytes = Vec::new();
    // The child shares the offset, so it has to be set back.
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(Bytes(bytes))
}
