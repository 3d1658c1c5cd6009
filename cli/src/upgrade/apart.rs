//! The program outlives the session that called it: the transition ends every
//! session, and the services are frozen after that.
//!
//! It runs in a scope of its own, which no transition stops, as two processes.
//! The child does the work. The parent is what the caller waits for: it ends as
//! the child does, or with success once the jump is under way.

use std::io::{PipeReader, Read, Write, pipe};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use crate::sys;

/// Set for the program in its scope.
const MARK: &str = "RCR_UPGRADE_APART";

/// What the child tells when the jump is under way.
const UNDER_WAY: u8 = b'!';

/// The working process's way to let its caller go.
#[derive(Debug)]
pub struct Caller(Option<std::io::PipeWriter>);

/// Which of the two processes this is.
pub enum Side {
    /// The one that works.
    Worker(Caller),
    /// The one that is waited for, and how it ends.
    Waiting(ExitCode),
}

/// Goes into a scope, unless this is it already, and splits.
pub fn split() -> Result<Side> {
    if std::env::var_os(MARK).is_none() {
        let error = scope()?.exec();
        return Err(error).context("systemd-run could not be run");
    }
    let (reader, writer) = pipe().context("pipe")?;
    match sys::fork().context("fork")? {
        None => {
            drop(reader);
            Ok(Side::Worker(Caller(Some(writer))))
        }
        Some(child) => {
            drop(writer);
            wait(child, reader).map(Side::Waiting)
        }
    }
}

/// The program again, in a scope that nothing stops.
fn scope() -> Result<Command> {
    let program = std::env::current_exe().context("the program itself")?;
    let mut command = Command::new("systemd-run");
    command
        .args(["--scope", "--quiet", "--collect", "--slice=system.slice"])
        .arg(format!("--unit=rcr-upgrade-{}", std::process::id()))
        .args(["--property=DefaultDependencies=no", "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1");
    Ok(command)
}

fn wait(child: Pid, mut reader: PipeReader) -> Result<ExitCode> {
    let mut word = [0];
    if reader.read(&mut word).context("pipe")? == 1 {
        return Ok(ExitCode::SUCCESS);
    }
    match waitpid(child, None).context("waitpid")? {
        WaitStatus::Exited(_, code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        status => bail!("the working process ended: {status:?}"),
    }
}

impl Caller {
    /// Lets the caller go: the jump is under way. From here on nobody reads what
    /// is said but the kernel's log.
    pub fn let_go(&mut self) -> Result<()> {
        let Some(mut writer) = self.0.take() else {
            return Ok(());
        };
        setsid().context("setsid")?;
        sys::silence().context("/dev/null, /dev/kmsg")?;
        // A caller that has gone needs no word.
        let _ = writer.write_all(&[UNDER_WAY]);
        Ok(())
    }
}
