//! Which pages are to be saved, and which of them are common to several
//! processes: found before any are read.

use std::collections::BTreeMap;
use std::ops::Range;

use super::sharing::Sharing;
use super::{DumpError, Ready};
use crate::freeze::Frozen;
use crate::image::schema::VmaEntry;
use crate::memory::heritage::Owners;
use crate::memory::maps::Vma;
use crate::memory::{pages, vma};
use crate::predump::ranges;
use crate::restore::{WORTH_WAITING, can_wait};

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

/// Leaves pages of large private mappings where they are, but for those that
/// several processes have in common: they come into the world before others.
pub(super) fn leave(frozen: &Frozen, ready: &mut [Ready]) {
    let mut common: BTreeMap<i32, Vec<Range<u64>>> = BTreeMap::new();
    for (p, ready) in frozen.processes.iter().zip(&*ready) {
        for c in &ready.common {
            for pid in [p.info.pid, c.owner] {
                common.entry(pid).or_default().push(c.range());
            }
        }
    }
    for (p, ready) in frozen.processes.iter().zip(ready) {
        let common = common.get(&p.info.pid).map_or(&[][..], Vec::as_slice);
        let own = ready.runs.ranges();
        for e in outline(&ready.vmas).iter().filter(|e| can_wait(e)) {
            let all = e.start..e.end;
            let overlaps = |r: &Range<u64>| r.start < all.end && all.start < r.end;
            let pages = ranges::both(&own, std::slice::from_ref(&all));
            if ranges::bytes(&pages) >= WORTH_WAITING && !common.iter().any(overlaps) {
                ready.far.extend(pages);
            }
        }
    }
}

/// What a list of mappings tells without their files.
pub(super) fn outline(vmas: &[Vma]) -> Vec<VmaEntry> {
    let entry = |v: &Vma| Some(vma::save(v, vma::classify(v).ok()?, 0, None));
    vmas.iter().filter_map(entry).collect()
}
