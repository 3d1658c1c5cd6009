//! The point of no return.
//!
//! Success: systemd is on its way into the loaded kernel, and nothing runs any
//! more that the store holds. Failure: all run on as before.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rcr_systemd::systemctl;

use super::fault::{self, FailAt};
use super::sealed::Sealed;
use crate::exit::{Failure, OrExit};

/// Tells the stop of `rcr-pre-kexec.service` that the store is sealed.
pub const SEALED_MARK: &str = "/run/rcr/sealed";

/// Queues systemd's transition, then ends the services.
pub fn jump(sealed: Sealed, fail_at: Option<&FailAt>) -> Result<(), Failure> {
    mark().or_rolled_back()?;
    let queued = fault::point(fail_at, &FailAt::Jump)
        .and_then(|()| systemctl::enqueue_kexec().or_rolled_back());
    if let Err(failure) = queued {
        unmark();
        return Err(failure);
    }
    end_services(sealed);
    Ok(())
}

/// Ends the services under a transition that systemd has begun by itself.
pub fn leave(sealed: Sealed) -> Result<(), Failure> {
    mark().or_rolled_back()?;
    end_services(sealed);
    Ok(())
}

fn end_services(sealed: Sealed) {
    let Sealed {
        trees,
        silent,
        mut report,
        mut image,
        mut region,
        ..
    } = sealed;
    for tree in trees {
        tree.kill();
    }
    silent.keep();
    report.keep();
    image.keep();
    region.keep();
}

fn mark() -> Result<()> {
    let path = Path::new(SEALED_MARK);
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .context(SEALED_MARK)?;
    fs::write(path, "").context(SEALED_MARK)
}

fn unmark() {
    if let Err(e) = fs::remove_file(SEALED_MARK) {
        tracing::error!("{SEALED_MARK} stays behind: {e}");
    }
}
