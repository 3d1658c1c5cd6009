//! Kernel objects that several processes share (`CLONE_VM` and its kin).

use std::cmp::Ordering;

use crate::Refusal;
use crate::freeze::Frozen;
use crate::sys::SysError;
use crate::sys::process::{Shared, compare_object};

/// Sharing between processes that is not carried yet.
pub fn refusals(frozen: &Frozen) -> Result<Vec<Refusal>, SysError> {
    let mut out = Vec::new();
    let kinds = [
        (Shared::Vm, "address space (vfork or CLONE_VM)"),
        (Shared::Files, "descriptor table (CLONE_FILES)"),
        (Shared::Fs, "working directory (CLONE_FS)"),
        (Shared::Sighand, "signal dispositions (CLONE_SIGHAND)"),
    ];
    for (kind, what) in kinds {
        let mut live: Vec<_> = frozen
            .processes
            .iter()
            .filter(|p| !p.info.is_zombie())
            .collect();
        let mut failed = None;
        live.sort_by(|a, b| {
            compare_object(a.info.pid, b.info.pid, kind).unwrap_or_else(|e| {
                failed = Some(e);
                Ordering::Equal
            })
        });
        for pair in live.windows(2) {
            let (a, b) = (&pair[0].info, &pair[1].info);
            if compare_object(a.pid, b.pid, kind)? == Ordering::Equal {
                out.push(Refusal {
                    pid: b.pid,
                    comm: b.comm.clone(),
                    object: what.to_owned(),
                    reason: format!(
                        "it is shared with process {}, which is not carried yet",
                        a.pid
                    ),
                    advice: "try again when the program has finished starting its child".into(),
                });
            }
        }
        if let Some(e) = failed {
            return Err(e);
        }
    }
    Ok(out)
}
