//! The descriptor table of a process.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use super::RestoreError;
use super::process::Step;
use super::worlds::take;
use crate::image::schema::FdinfoEntry;
use crate::remote::{OpId, Program};

/// Descriptor flag in [`FdinfoEntry::flags`].
const CLOEXEC: u32 = 1;

impl Step<'_, '_> {
    /// Adds the calls that fill the table, which holds only our `pidfd` at
    /// number `pidfd_at`.
    pub(super) fn place(
        &mut self,
        p: &mut Program,
        pidfd: OpId,
        pidfd_at: i32,
        fdinfo: &[FdinfoEntry],
    ) -> Result<(), RestoreError> {
        let mut sorted: Vec<&FdinfoEntry> = fdinfo.iter().collect();
        sorted.sort_by_key(|e| e.fd);
        let mut used = BTreeSet::from([pidfd_at]);
        let mut lowest_free = 0;
        for e in sorted {
            let fd = self.files.open(e.id)?.as_raw_fd();
            let wanted = e.fd as i32;
            // The kernel gives the lowest free number, so it is known here.
            while used.contains(&lowest_free) {
                lowest_free += 1;
            }
            let given = lowest_free;
            let op = take(p, pidfd, fd);
            let cloexec = e.flags & CLOEXEC != 0;
            if given == wanted {
                // It comes with close-on-exec.
                if !cloexec {
                    let args = [wanted.into(), libc::F_SETFD.into(), 0.into()];
                    p.call(libc::SYS_fcntl, format!("set flags of fd {wanted}"), &args);
                }
            } else {
                let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
                let args = [op.into(), wanted.into(), flags.into()];
                p.call(libc::SYS_dup3, format!("place fd {wanted}"), &args);
                p.call(libc::SYS_close, "close the spare descriptor", &[op.into()]);
            }
            used.insert(wanted);
        }
        Ok(())
    }
}
