//! Going on in the background.

use std::fs::File;

use anyhow::Context;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

use super::options::Options;
use super::places::Places;
use super::{Error, pidfile, restore};

/// Tells that a server listens, and goes to the background if asked to; `false`
/// for the process that stays in front and has nothing left to do.
pub fn stand(options: &Options, places: &Places) -> Result<bool, Error> {
    if options.detached {
        if !detach(options, places)? {
            return Ok(false);
        }
    } else if let Some(name) = &options.pidfile {
        pidfile::write(&places.in_work(name), std::process::id() as i32)?;
    }
    if let Some(fd) = options.status_fd {
        restore::ready(fd)?;
    }
    Ok(true)
}

/// Goes on in a child that belongs to no terminal; `false` for the parent,
/// which has nothing left to do.
fn detach(options: &Options, places: &Places) -> Result<bool, Error> {
    // SAFETY: this process has a single thread.
    match unsafe { fork() }.context("going to the background")? {
        ForkResult::Parent { child } => {
            if let Some(name) = &options.pidfile {
                pidfile::write(&places.in_work(name), child.as_raw())?;
            }
            Ok(false)
        }
        ForkResult::Child => {
            setsid()?;
            let null = File::options().read(true).write(true).open("/dev/null")?;
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            dup2_stderr(&null)?;
            Ok(true)
        }
    }
}
