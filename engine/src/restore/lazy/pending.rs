//! Pages that are still to come.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::memory::pages::Piece;

/// Content by address, as long as nobody has it yet.
#[derive(Debug, Default, Clone)]
pub struct Pending<'a> {
    /// Runs that do not overlap, by their first address.
    runs: BTreeMap<u64, &'a [u8]>,
}

impl<'a> Pending<'a> {
    /// Adds pages.
    pub fn add(&mut self, piece: &Piece<'a>) {
        self.drop_within(&(piece.start..piece.end()));
        if !piece.bytes.is_empty() {
            self.runs.insert(piece.start, piece.bytes);
        }
    }

    /// Whether everything is where it belongs.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The content from `at` on, at most `max` bytes.
    pub fn at(&self, at: u64, max: u64) -> Option<&'a [u8]> {
        let (&start, bytes) = self.runs.range(..=at).next_back()?;
        let skip = usize::try_from(at - start).ok()?;
        let rest = bytes.get(skip..).filter(|r| !r.is_empty())?;
        Some(&rest[..rest.len().min(max as usize)])
    }

    /// The first content at or behind `at`, else the first of all; at most
    /// `max` bytes.
    pub fn next(&self, at: u64, max: u64) -> Option<(u64, &'a [u8])> {
        if let Some(bytes) = self.at(at, max) {
            return Some((at, bytes));
        }
        let behind = self.runs.range(at..).next();
        let (&start, bytes) = behind.or_else(|| self.runs.first_key_value())?;
        Some((start, &bytes[..bytes.len().min(max as usize)]))
    }

    /// Forgets what lies in a range.
    pub fn drop_within(&mut self, range: &Range<u64>) {
        self.take_within(range);
    }

    /// What lies in `from..from + len` belongs to `to` on from now on, and
    /// nothing else does there.
    pub fn shift(&mut self, from: u64, to: u64, len: u64) {
        let taken = self.take_within(&(from..from.saturating_add(len)));
        self.drop_within(&(to..to.saturating_add(len)));
        let moved = taken.into_iter().map(|(at, b)| (at - from + to, b));
        self.runs.extend(moved);
    }

    fn take_within(&mut self, range: &Range<u64>) -> Vec<(u64, &'a [u8])> {
        if range.is_empty() {
            return Vec::new();
        }
        let before = self.runs.range(..range.start).next_back();
        let first = before
            .filter(|(s, b)| *s + b.len() as u64 > range.start)
            .map_or(range.start, |(s, _)| *s);
        let touched: Vec<u64> = match first < range.end {
            true => self.runs.range(first..range.end).map(|(s, _)| *s).collect(),
            false => Vec::new(),
        };
        let mut taken = Vec::new();
        for start in touched {
            let bytes = self.runs.remove(&start).unwrap_or_default();
            let end = start + bytes.len() as u64;
            let part = |r: Range<u64>| &bytes[(r.start - start) as usize..(r.end - start) as usize];
            if start < range.start {
                self.runs.insert(start, part(start..range.start));
            }
            if range.end < end {
                self.runs.insert(range.end, part(range.end..end));
            }
            let inside = start.max(range.start)..end.min(range.end);
            taken.push((inside.start, part(inside)));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPACE: usize = 64;

    #[derive(Debug, Clone)]
    enum Step {
        Add(u64, usize),
        Drop(u64, u64),
        Shift(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..48u64, 0..16usize).prop_map(|(a, n)| Step::Add(a, n)),
            (0..60u64, 0..20u64).prop_map(|(a, n)| Step::Drop(a, a + n)),
            (0..40u64, 0..40u64, 0..20u64).prop_map(|(a, b, n)| Step::Shift(a, b, n)),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map_of_bytes(steps in prop::collection::vec(step(), 0..40)) {
            let content: Vec<u8> = (0..=255).collect();
            let mut pending = Pending::default();
            let mut model = [None; SPACE];
            for (i, s) in steps.into_iter().enumerate() {
                match s {
                    Step::Add(at, n) => {
                        let bytes = &content[i..i + n];
                        pending.add(&Piece { start: at, bytes, owner: 0 });
                        for (k, b) in bytes.iter().enumerate() {
                            model[at as usize + k] = Some(*b);
                        }
                    }
                    Step::Drop(from, to) => {
                        pending.drop_within(&(from..to));
                        let to = (to as usize).min(SPACE);
                        model[(from as usize).min(to)..to].fill(None);
                    }
                    Step::Shift(from, to, n) => {
                        pending.shift(from, to, n);
                        let (from, to, n) = (from as usize, to as usize, n as usize);
                        let moved: Vec<_> = model[from..from + n].to_vec();
                        model[from..from + n].fill(None);
                        model[to..to + n].copy_from_slice(&moved);
                    }
                }
            }
            for at in 0..SPACE as u64 {
                prop_assert_eq!(pending.at(at, 1).map(|b| b[0]), model[at as usize]);
            }
            prop_assert_eq!(pending.is_empty(), model.iter().all(Option::is_none));
            let mut left = pending.clone();
            while let Some((at, bytes)) = left.next(17, 5) {
                let range = at..at + bytes.len() as u64;
                left.drop_within(&range);
                for (k, b) in range.zip(bytes) {
                    prop_assert_eq!(model[k as usize].take(), Some(*b));
                }
            }
            prop_assert!(model.iter().all(Option::is_none));
        }
    }
}
