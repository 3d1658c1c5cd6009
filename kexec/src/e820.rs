//! Memory maps as firmware and boot loaders hand them to a kernel.

use std::ops::Range;

/// What a range of physical addresses is. Numbers: arch/x86/include/asm/e820/types.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ordinary memory.
    Ram,
    /// Not to be touched.
    Reserved,
    /// ACPI tables.
    AcpiTables,
    /// ACPI non-volatile storage.
    AcpiNvs,
    /// Broken memory.
    Unusable,
    /// Persistent memory.
    Pmem,
    /// Persistent memory by an older convention.
    LegacyPmem,
    /// Memory for a special purpose: dax devices, not the page allocator.
    SoftReserved,
}

impl Kind {
    /// The number in the table.
    pub fn number(self) -> u32 {
        match self {
            Kind::Ram => 1,
            Kind::Reserved => 2,
            Kind::AcpiTables => 3,
            Kind::AcpiNvs => 4,
            Kind::Unusable => 5,
            Kind::Pmem => 7,
            Kind::LegacyPmem => 12,
            Kind::SoftReserved => 0xefff_ffff,
        }
    }

    /// The kind with that name in `/sys/firmware/memmap/*/type`; reserved for names
    /// that we do not know.
    pub fn from_name(name: &str) -> Kind {
        match name {
            "System RAM" => Kind::Ram,
            "ACPI Tables" => Kind::AcpiTables,
            "ACPI Non-volatile Storage" => Kind::AcpiNvs,
            "Unusable memory" => Kind::Unusable,
            "Persistent Memory" => Kind::Pmem,
            "Persistent Memory (legacy)" => Kind::LegacyPmem,
            "Soft Reserved" => Kind::SoftReserved,
            _ => Kind::Reserved,
        }
    }
}

/// One entry of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The addresses.
    pub range: Range<u64>,
    /// What is there.
    pub kind: Kind,
}

/// Bytes of an entry in the table.
pub(crate) const ENTRY_LEN: usize = 20;

impl Entry {
    /// The entry as it lies in the table.
    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut out = [0; ENTRY_LEN];
        out[..8].copy_from_slice(&self.range.start.to_le_bytes());
        out[8..16].copy_from_slice(&(self.range.end - self.range.start).to_le_bytes());
        out[16..].copy_from_slice(&self.kind.number().to_le_bytes());
        out
    }
}

/// The map with every part of `ranges` that is `from` turned into `to`. The result
/// ascends, and neighbours of one kind are joined.
pub(crate) fn convert(map: &[Entry], ranges: &[Range<u64>], from: Kind, to: Kind) -> Vec<Entry> {
    let mut result = Vec::new();
    for entry in map {
        if entry.kind != from {
            result.push(entry.clone());
            continue;
        }
        let rest = subtract(std::slice::from_ref(&entry.range), ranges);
        let taken = subtract(std::slice::from_ref(&entry.range), &rest);
        result.extend(rest.into_iter().map(|range| Entry { range, kind: from }));
        result.extend(taken.into_iter().map(|range| Entry { range, kind: to }));
    }
    join(result)
}

/// The ranges of one kind.
pub(crate) fn of_kind(map: &[Entry], kind: Kind) -> Vec<Range<u64>> {
    map.iter()
        .filter(|entry| entry.kind == kind)
        .map(|entry| entry.range.clone())
        .collect()
}

/// `ranges` without `holes`, ascending if `ranges` do.
pub(crate) fn subtract(ranges: &[Range<u64>], holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes: Vec<&Range<u64>> = holes.iter().filter(|hole| !hole.is_empty()).collect();
    holes.sort_by_key(|hole| hole.start);
    let mut result = Vec::new();
    for range in ranges {
        let mut start = range.start;
        for hole in &holes {
            if hole.end <= start || hole.start >= range.end {
                continue;
            }
            if hole.start > start {
                result.push(start..hole.start);
            }
            start = hole.end;
        }
        if start < range.end {
            result.push(start..range.end);
        }
    }
    result
}

fn join(mut map: Vec<Entry>) -> Vec<Entry> {
    map.retain(|entry| !entry.range.is_empty());
    map.sort_by_key(|entry| entry.range.start);
    let mut result: Vec<Entry> = Vec::new();
    for entry in map {
        match result.last_mut() {
            Some(last) if last.kind == entry.kind && last.range.end == entry.range.start => {
                last.range.end = entry.range.end;
            }
            _ => result.push(entry),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ram(range: Range<u64>) -> Entry {
        Entry {
            range,
            kind: Kind::Ram,
        }
    }

    #[test]
    fn ranges_become_soft_reserved_and_ram_again() {
        let map = [
            ram(0..100),
            Entry {
                range: 100..200,
                kind: Kind::Reserved,
            },
            ram(200..1000),
        ];
        let soft = convert(&map, &[300..400, 400..500], Kind::Ram, Kind::SoftReserved);
        assert_eq!(soft.len(), 5);
        assert_eq!(
            soft[3],
            Entry {
                range: 300..500,
                kind: Kind::SoftReserved
            }
        );
        assert_eq!(
            convert(&soft, &[300..500], Kind::SoftReserved, Kind::Ram),
            map
        );
        // Only what is RAM can be taken.
        assert_eq!(
            convert(&map, &[120..150, 2000..3000], Kind::Ram, Kind::SoftReserved),
            map
        );
    }

    #[test]
    fn entries_lie_in_the_table_as_the_kernel_reads_them() {
        let bytes = Entry {
            range: 0x1000..0x3000,
            kind: Kind::SoftReserved,
        }
        .encode();
        assert_eq!(bytes[..8], 0x1000u64.to_le_bytes());
        assert_eq!(bytes[8..16], 0x2000u64.to_le_bytes());
        assert_eq!(bytes[16..], [0xff, 0xff, 0xff, 0xef]);
    }

    proptest! {
        #[test]
        fn subtraction_keeps_what_is_in_no_hole(
            ranges in proptest::collection::vec((0u64..64, 0u64..16), 0..5),
            holes in proptest::collection::vec((0u64..64, 0u64..16), 0..5),
        ) {
            let to_ranges = |v: Vec<(u64, u64)>| -> Vec<Range<u64>> {
                v.into_iter().map(|(start, len)| start..start + len).collect()
            };
            let (ranges, holes) = (to_ranges(ranges), to_ranges(holes));
            let left = subtract(&ranges, &holes);
            for point in 0u64..100 {
                let within = |v: &[Range<u64>]| v.iter().any(|r| r.contains(&point));
                prop_assert_eq!(within(&left), within(&ranges) && !within(&holes));
            }
        }
    }
}
