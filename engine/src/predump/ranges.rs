//! Sets of addresses: ascending ranges that do not touch.

use std::ops::Range;

/// Adds a range at the end, joined with the last one where they touch.
pub fn push(set: &mut Vec<Range<u64>>, r: Range<u64>) {
    if r.is_empty() {
        return;
    }
    match set.last_mut() {
        Some(last) if last.end >= r.start => last.end = last.end.max(r.end),
        _ => set.push(r),
    }
}

/// What is in both.
pub fn both(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut a, mut b) = (a, b);
    let mut out = Vec::new();
    while let ([x, ..], [y, ..]) = (a, b) {
        push(&mut out, x.start.max(y.start)..x.end.min(y.end));
        if x.end <= y.end {
            a = &a[1..];
        } else {
            b = &b[1..];
        }
    }
    out
}

/// What is in the first and not in the second.
pub fn without(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    let mut rest = b;
    for x in a {
        let mut at = x.start;
        while let [y, more @ ..] = rest {
            if y.start >= x.end {
                break;
            }
            if y.start > at {
                push(&mut out, at..y.start);
            }
            at = at.max(y.end);
            if y.end > x.end {
                break;
            }
            rest = more;
        }
        push(&mut out, at.min(x.end)..x.end);
    }
    out
}

/// What is in one of them.
pub fn join(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = [a, b].concat();
    all.sort_unstable_by_key(|r| r.start);
    let mut out = Vec::new();
    all.into_iter().for_each(|r| push(&mut out, r));
    out
}

/// Number of addresses.
pub fn bytes(set: &[Range<u64>]) -> u64 {
    set.iter().map(|r| r.end - r.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(bits: &[bool]) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        for (i, _) in bits.iter().enumerate().filter(|(_, b)| **b) {
            push(&mut out, i as u64..i as u64 + 1);
        }
        out
    }

    proptest! {
        #[test]
        fn they_are_sets(pairs in proptest::collection::vec((any::<bool>(), any::<bool>()), 0..64)) {
            let (a, b): (Vec<bool>, Vec<bool>) = pairs.iter().copied().unzip();
            let of = |f: fn(bool, bool) -> bool| {
                set(&pairs.iter().map(|&(x, y)| f(x, y)).collect::<Vec<_>>())
            };
            let (a, b) = (set(&a), set(&b));
            prop_assert_eq!(both(&a, &b), of(|x, y| x && y));
            prop_assert_eq!(without(&a, &b), of(|x, y| x && !y));
            prop_assert_eq!(join(&a, &b), of(|x, y| x || y));
            prop_assert_eq!(bytes(&a), pairs.iter().filter(|p| p.0).count() as u64);
        }
    }
}
