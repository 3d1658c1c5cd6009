//! Address ranges that are free in several layouts at once.

use std::ops::Range;

/// End of the user part of the address space (47 bits, less a guard page).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// Below this nothing of ours is put: legacy low mappings, small executables.
const LOWEST: u64 = 1 << 32;
/// Room kept free below stacks and above heaps, which grow.
const GROWTH: u64 = 1 << 30;

/// A range of `len` bytes that none of `taken` comes near, at or above a
/// start derived from `seed` (so that it is not the same in every process).
pub fn find_gap(taken: &[Range<u64>], len: u64, seed: u64) -> Option<u64> {
    let mut taken: Vec<_> = taken
        .iter()
        .map(|r| r.start.saturating_sub(GROWTH)..r.end.saturating_add(GROWTH).min(TASK_SIZE))
        .collect();
    taken.sort_by_key(|r| r.start);
    let from = LOWEST + (seed % (TASK_SIZE / 2 - LOWEST)) / 4096 * 4096;
    first_fit(&taken, len, from).or_else(|| first_fit(&taken, len, LOWEST))
}

fn first_fit(taken: &[Range<u64>], len: u64, from: u64) -> Option<u64> {
    let mut at = from;
    for r in taken {
        if r.start >= at + len {
            break;
        }
        at = at.max(r.end);
    }
    (at + len <= TASK_SIZE - GROWTH).then_some(at)
}

/// What has to be unmapped so that only `keep` is left.
pub fn all_but(keep: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut keep = keep.to_vec();
    keep.sort_by_key(|r| r.start);
    let mut out = Vec::new();
    let mut at = 0;
    for k in keep {
        if k.start > at {
            out.push(at..k.start);
        }
        at = at.max(k.end);
    }
    if at < TASK_SIZE {
        out.push(at..TASK_SIZE);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_gap_is_free(starts in proptest::collection::vec(0u64..0x7fff_0000, 0..40), seed: u64) {
            let taken: Vec<_> =
                starts.iter().map(|s| s * 65536..(s * 65536 + (1 << 20)).min(TASK_SIZE)).collect();
            if let Some(at) = find_gap(&taken, 1 << 20, seed) {
                prop_assert!(taken.iter().all(|r| r.end <= at || r.start >= at + (1 << 20)));
                prop_assert_eq!(at % 4096, 0);
            }
        }
    }

    #[test]
    fn the_rest_is_everything_else() {
        let keep = [0x2000..0x3000, 0x5000..0x6000];
        let rest = [0..0x2000, 0x3000..0x5000, 0x6000..TASK_SIZE];
        assert_eq!(all_but(&keep), rest);
    }
}
