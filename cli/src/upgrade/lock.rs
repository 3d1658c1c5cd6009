//! One upgrade at a time.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

const LOCK_FILE: &str = "/run/rcr/lock";

/// Held while an upgrade is prepared; the kernel releases it with the process.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its lock alone")] Flock<File>);

impl Lock {
    /// Takes it, or says that another upgrade has it.
    pub fn take() -> Result<Self> {
        if !crate::signals::is_root() {
            bail!("this needs root: run it with sudo");
        }
        match Self::attempt()? {
            Some(lock) => Ok(lock),
            None => bail!("another rcr-upgrade is running"),
        }
    }

    /// Whether another upgrade has it.
    pub fn is_held() -> Result<bool> {
        Ok(Self::attempt()?.is_none())
    }

    fn attempt() -> Result<Option<Self>> {
        let path = Path::new(LOCK_FILE);
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .context(LOCK_FILE)?;
        let file = File::create(path).context(LOCK_FILE)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Lock(lock))),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(e).context(LOCK_FILE),
        }
    }
}
