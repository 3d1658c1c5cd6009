//! Where in memory something fits.

use std::ops::Range;

use crate::e820::subtract;

const PAGE: u64 = 4096;

/// Memory that segments may take.
#[derive(Debug, Clone)]
pub(crate) struct Free {
    ranges: Vec<Range<u64>>,
}

impl Free {
    /// All whole pages of `ram` outside `avoid`.
    pub fn new(ram: &[Range<u64>], avoid: &[Range<u64>]) -> Free {
        let mut ranges: Vec<Range<u64>> = subtract(ram, avoid)
            .into_iter()
            .map(|range| range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE)
            .filter(|range| range.start < range.end)
            .collect();
        ranges.sort_by_key(|range| range.start);
        Free { ranges }
    }

    /// Takes the lowest aligned place of `len` bytes that lies within `bounds`.
    pub fn take_lowest(&mut self, len: u64, align: u64, bounds: Range<u64>) -> Option<u64> {
        let at = self.clipped(&bounds).find_map(|range| {
            let at = range.start.checked_next_multiple_of(align)?;
            (at.checked_add(len)? <= range.end).then_some(at)
        })?;
        self.take(at, len);
        Some(at)
    }

    /// Takes the highest aligned place of `len` bytes that lies within `bounds`.
    pub fn take_highest(&mut self, len: u64, align: u64, bounds: Range<u64>) -> Option<u64> {
        let places = self.clipped(&bounds).filter_map(|range| {
            let at = range.end.checked_sub(len)? / align * align;
            (at >= range.start).then_some(at)
        });
        let at = places.max()?;
        self.take(at, len);
        Some(at)
    }

    fn clipped(&self, bounds: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.ranges
            .iter()
            .map(|range| range.start.max(bounds.start)..range.end.min(bounds.end))
            .filter(|range| range.start < range.end)
    }

    fn take(&mut self, at: u64, len: u64) {
        let taken = at..(at + len).next_multiple_of(PAGE);
        self.ranges = subtract(&self.ranges, std::slice::from_ref(&taken));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_aligned_and_taken_once() {
        let mut free = Free::new(
            &[0x800..0x9f00, 0x10_0000..0x80_0000],
            &[0x20_0000..0x30_0000],
        );
        assert_eq!(free.take_lowest(0x1000, 0x1000, 0..u64::MAX), Some(0x1000));
        assert_eq!(
            free.take_lowest(0x10_0000, 0x20_0000, 0..u64::MAX),
            Some(0x40_0000)
        );
        assert_eq!(
            free.take_highest(0x1800, 0x1000, 0..u64::MAX),
            Some(0x7f_e000)
        );
        assert_eq!(free.take_highest(0x1000, 0x1000, 0..0x9000), Some(0x8000));
        assert_eq!(free.take_lowest(0x100_0000, 0x1000, 0..u64::MAX), None);
    }

    proptest! {
        #[test]
        fn nothing_overlaps(
            ram in proptest::collection::vec((0u64..2000, 1u64..300), 1..5),
            avoid in proptest::collection::vec((0u64..2000, 1u64..50), 0..5),
            asks in proptest::collection::vec((1u64..0x20_000, 12u32..17, any::<bool>()), 0..10),
        ) {
            let pages = |v: &[(u64, u64)]| -> Vec<Range<u64>> {
                v.iter().map(|(start, len)| start * PAGE..(start + len) * PAGE).collect()
            };
            // One stretch of RAM after the other, as in a map.
            let mut start = 0;
            let ram: Vec<Range<u64>> = ram.iter().map(|(gap, len)| {
                let range = (start + gap) * PAGE..(start + gap + len) * PAGE;
                start += gap + len;
                range
            }).collect();
            let avoid = pages(&avoid);
            let mut free = Free::new(&ram, &avoid);
            let mut taken: Vec<Range<u64>> = Vec::new();
            for (len, shift, low) in asks {
                let align = 1 << shift;
                let at = if low {
                    free.take_lowest(len, align, 0..u64::MAX)
                } else {
                    free.take_highest(len, align, 0..u64::MAX)
                };
                if let Some(at) = at {
                    prop_assert_eq!(at % align, 0);
                    let place = at..at + len;
                    prop_assert!(ram.iter().any(|r| r.start <= place.start && place.end <= r.end));
                    for other in avoid.iter().chain(&taken) {
                        prop_assert!(place.end <= other.start || other.end <= place.start);
                    }
                    taken.push(place);
                }
            }
        }
    }
}
