//! Which pages are to be saved, and which of them are common to several
//! processes: found before any are read.

use super::sharing::Sharing;
use super::{DumpError, Ready};
use crate::freeze::Frozen;
use crate::image::schema::VmaEntry;
use crate::memory::heritage::Owners;
use crate::memory::maps::Vma;
use crate::memory::{pages, vma};

/// Looks at the page tables of all processes.
pub(super) fn find(
    frozen: &Frozen,
    sharing: &Sharing,
    ready: &mut [Ready],
) -> Result<(), DumpError> {
    let mut owners = Owners::default();
    let several = frozen.processes.iter().filter(|p| !p.info.is_zombie());
    let several = several.count() > 1;
    for (p, ready) in frozen.processes.iter().zip(ready) {
        if p.info.is_zombie() || !sharing.owns_memory(p.info.pid) {
            continue;
        }
        let voice = p.info.voice();
        ready.runs = pages::find(voice, &outline(&ready.vmas))?;
        if several {
            ready.common = owners.look(p.info.pid, voice, &mut ready.runs)?;
        }
    }
    Ok(())
}

/// What a list of mappings tells without their files.
pub(super) fn outline(vmas: &[Vma]) -> Vec<VmaEntry> {
    let entry = |v: &Vma| Some(vma::save(v, vma::classify(v).ok()?, 0, None));
    vmas.iter().filter_map(entry).collect()
}
