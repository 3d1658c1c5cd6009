//! Pages that are still to come.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::memory::pages::Piece;

/// Pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run<'a> {
    /// Their content.
    Here(&'a [u8]),
    /// They are still with the dumped process: its id, where they were, bytes.
    Far { id: i32, at: u64, len: u64 },
}

impl Run<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Here(bytes) => bytes.len() as u64,
            Self::Far { len, .. } => *len,
        }
    }

    /// The bytes from one to another.
    fn part(&self, range: Range<u64>) -> Self {
        match *self {
            Self::Here(bytes) => Self::Here(&bytes[range.start as usize..range.end as usize]),
            Self::Far { id, at, .. } => Self::Far {
                id,
                at: at + range.start,
                len: range.end - range.start,
            },
        }
    }
}

/// Content by address, as long as nobody has it yet.
#[derive(Debug, Default, Clone)]
pub struct Pending<'a> {
    /// Runs that do not overlap, by their first address.
    runs: BTreeMap<u64, Run<'a>>,
}

impl<'a> Pending<'a> {
    /// Adds pages.
    pub fn add(&mut self, piece: &Piece<'a>) {
        self.insert(piece.start, Run::Here(piece.bytes));
    }

    /// Adds pages of a process that are somewhere else.
    pub fn add_far(&mut self, id: i32, range: Range<u64>) {
        let (at, len) = (range.start, range.end.saturating_sub(range.start));
        self.insert(at, Run::Far { id, at, len });
    }

    fn insert(&mut self, start: u64, run: Run<'a>) {
        self.drop_within(&(start..start + run.len()));
        if run.len() > 0 {
            self.runs.insert(start, run);
        }
    }

    /// Whether everything is where it belongs.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The content from `at` on, at most `max` bytes.
    pub fn at(&self, at: u64, max: u64) -> Option<Run<'a>> {
        let (&start, run) = self.runs.range(..=at).next_back()?;
        let skip = at - start;
        let end = run.len().min(skip.saturating_add(max));
        (skip < end).then(|| run.part(skip..end))
    }

    /// The first content at or behind `at`, else the first of all; at most
    /// `max` bytes.
    pub fn next(&self, at: u64, max: u64) -> Option<(u64, Run<'a>)> {
        if let Some(run) = self.at(at, max) {
            return Some((at, run));
        }
        let behind = self.runs.range(at..).next();
        let (&start, run) = behind.or_else(|| self.runs.first_key_value())?;
        Some((start, run.part(0..run.len().min(max))))
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

    fn take_within(&mut self, range: &Range<u64>) -> Vec<(u64, Run<'a>)> {
        if range.is_empty() {
            return Vec::new();
        }
        let before = self.runs.range(..range.start).next_back();
        let first = before
            .filter(|(s, run)| *s + run.len() > range.start)
            .map_or(range.start, |(s, _)| *s);
        let touched: Vec<u64> = match first < range.end {
            true => self.runs.range(first..range.end).map(|(s, _)| *s).collect(),
            false => Vec::new(),
        };
        let mut taken = Vec::new();
        for start in touched {
            let Some(run) = self.runs.remove(&start) else {
                continue;
            };
            let end = start + run.len();
            let part = |r: Range<u64>| run.part(r.start - start..r.end - start);
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
        AddFar(u64, u64),
        Drop(u64, u64),
        Shift(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..48u64, 0..16usize).prop_map(|(a, n)| Step::Add(a, n)),
            (0..48u64, 0..16u64).prop_map(|(a, n)| Step::AddFar(a, n)),
            (0..60u64, 0..20u64).prop_map(|(a, n)| Step::Drop(a, a + n)),
            (0..40u64, 0..40u64, 0..20u64).prop_map(|(a, b, n)| Step::Shift(a, b, n)),
        ]
    }

    fn first(run: &Run<'_>) -> (bool, u64) {
        match run {
            Run::Here(bytes) => (true, bytes[0].into()),
            Run::Far { id: 7, at, .. } => (false, *at),
            Run::Far { id, .. } => panic!("pages of {id}"),
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map_of_bytes(steps in prop::collection::vec(step(), 0..40)) {
            let content: Vec<u8> = (0..=255).collect();
            let mut pending = Pending::default();
            // What is to be found at an address: a byte, or where it was.
            let mut model: [Option<(bool, u64)>; SPACE] = [None; SPACE];
            for (i, s) in steps.into_iter().enumerate() {
                match s {
                    Step::Add(at, n) => {
                        let bytes = &content[i..i + n];
                        pending.add(&Piece { start: at, bytes, owner: 0 });
                        for (k, b) in bytes.iter().enumerate() {
                            model[at as usize + k] = Some((true, u64::from(*b)));
                        }
                    }
                    Step::AddFar(at, n) => {
                        pending.add_far(7, at..at + n);
                        for k in at..at + n {
                            model[k as usize] = Some((false, k));
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
                prop_assert_eq!(pending.at(at, 1).map(|r| first(&r)), model[at as usize]);
            }
            prop_assert_eq!(pending.is_empty(), model.iter().all(Option::is_none));
            let mut left = pending.clone();
            while let Some((at, run)) = left.next(17, 5) {
                let range = at..at + run.len();
                left.drop_within(&range);
                for (k, n) in range.zip(0..) {
                    let one = first(&run.part(n..n + 1));
                    prop_assert_eq!(model[k as usize].take(), Some(one));
                }
            }
            prop_assert!(model.iter().all(Option::is_none));
        }
    }
}
