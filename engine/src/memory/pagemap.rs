//! Which pages hold content of their own (`/proc/PID/pagemap`,
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::sys::pagemap::{self as sys, Query};
use crate::sys::process::Span;

use super::layout::TASK_SIZE;

/// Bytes of a page on x86-64.
pub const PAGE: u64 = 4096;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Set for pages of a file and of shared anonymous memory.
const FILE_OR_SHARED: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;
/// Nobody else maps the page.
const EXCLUSIVE: u64 = 1 << 56;
/// Frame number, or place in swap.
const PLACE: u64 = (1 << 55) - 1;
/// Entries read at once.
const WINDOW: u64 = 8192;
/// So many entries between two ranges are read as well rather than left out.
const GAP: u64 = 64;

/// What was found in an address space: ascending, also across mappings.
#[derive(Debug, Default)]
pub struct Found {
    /// Pages of the process's own: touched anonymous memory and
    /// copied-on-write pages of private file mappings, in RAM or in swap.
    pub own: Vec<Span>,
    /// Guard regions.
    pub guards: Vec<Span>,
}

/// An open pagemap.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the pagemap of a process.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Looks through an address space; only `ranges` (ascending) matter, the
    /// rest may be left out.
    pub fn find(&self, ranges: &[Range<u64>]) -> io::Result<Found> {
        let mut found = Found::default();
        for tell in [sys::GUARD, 0] {
            let query = Query {
                any_of: sys::PRESENT | sys::SWAPPED,
                none_of: sys::FILE | sys::ZERO,
                tell,
                ..Query::default()
            };
            let scanned = sys::scan(&self.0, (0, TASK_SIZE), query, |r| {
                let list = match r.categories & sys::GUARD {
                    0 => &mut found.own,
                    _ => &mut found.guards,
                };
                push(list, r.start, r.end);
            });
            if scanned.map_err(|e| io::Error::from(e.errno))? {
                return Ok(found);
            }
        }
        // A kernel before 6.7: entry by entry.
        let zero = zero_frame()?;
        self.entries(ranges, |addr, e| {
            if e & GUARD != 0 {
                push(&mut found.guards, addr, addr + PAGE);
            } else if e & (PRESENT | SWAPPED) != 0
                && e & FILE_OR_SHARED == 0
                && (e & PRESENT == 0 || Some(e & PLACE) != zero)
            {
                push(&mut found.own, addr, addr + PAGE);
            }
        })?;
        Ok(found)
    }

    /// The pages in `ranges` (ascending) that others may map too: their
    /// addresses, and a number that is the same wherever it is the same page.
    pub fn maybe_shared(
        &self,
        ranges: &[Range<u64>],
        mut found: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        self.entries(ranges, |addr, e| {
            let alone = e & PRESENT != 0 && e & EXCLUSIVE != 0;
            // Without the right to see them all places read as 0.
            let there = e & (PRESENT | SWAPPED) != 0 && e & FILE_OR_SHARED == 0;
            if !alone && there && e & PLACE != 0 {
                found(addr, e & (SWAPPED | PLACE));
            }
        })
    }

    /// Whether a page of `range` is in RAM.
    pub fn is_present(&self, range: Range<u64>) -> io::Result<bool> {
        let mut there = false;
        self.entries(std::slice::from_ref(&range), |_, e| {
            there |= e & PRESENT != 0;
        })?;
        Ok(there)
    }

    /// Reads the entries of `ranges`, neighbours with one call.
    fn entries(&self, ranges: &[Range<u64>], mut each: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut buf = vec![0u8; WINDOW as usize * 8];
        let mut window = 0..0;
        for (i, r) in ranges.iter().enumerate() {
            let mut at = r.start;
            while at < r.end {
                if !window.contains(&at) {
                    let mut end = r.end;
                    for next in &ranges[i + 1..] {
                        if next.start > end + GAP * PAGE || end > at + WINDOW * PAGE {
                            break;
                        }
                        end = next.end;
                    }
                    window = at..(at + WINDOW * PAGE).min(end);
                    let len = ((window.end - at) / PAGE * 8) as usize;
                    self.0.read_exact_at(&mut buf[..len], at / PAGE * 8)?;
                }
                let end = r.end.min(window.end);
                let from = ((at - window.start) / PAGE * 8) as usize;
                let len = ((end - at) / PAGE * 8) as usize;
                for e in buf[from..from + len].chunks_exact(8) {
                    each(at, u64::from_le_bytes(e.try_into().expect("8 bytes")));
                    at += PAGE;
                }
            }
        }
        Ok(())
    }
}

/// Adds a run, joined with the last one where they touch.
pub fn push(runs: &mut Vec<Span>, start: u64, end: u64) {
    match runs.last_mut() {
        Some(s) if s.start + s.len as u64 == start => s.len += (end - start) as usize,
        _ => runs.push(Span {
            start,
            len: (end - start) as usize,
        }),
    }
}

/// The frame of the kernel's page of zeros, if we may see it: what reading
/// untouched memory maps.
fn zero_frame() -> io::Result<Option<u64>> {
    let size = std::num::NonZeroUsize::new(PAGE as usize).expect("not zero");
    let fresh = crate::sys::map::Fresh::map(size)?;
    let at = fresh.read_first_byte();
    let page = at..at + PAGE;
    let mut frame = None;
    Pagemap::open(std::process::id() as i32)?.entries(std::slice::from_ref(&page), |_, e| {
        frame = (e & PRESENT != 0 && e & PLACE != 0).then_some(e & PLACE);
    })?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_only_what_was_touched() {
        let len = 64 * PAGE as usize;
        let mut map = vec![0u8; len + PAGE as usize];
        let base = (map.as_ptr() as u64).next_multiple_of(PAGE);
        let skew = (base - map.as_ptr() as u64) as usize;
        map[skew + 5 * PAGE as usize] = 1;
        let pm = Pagemap::open(std::process::id() as i32).unwrap();
        let range = base..base + len as u64;
        let found = pm.find(std::slice::from_ref(&range)).unwrap();
        let touched = base + 5 * PAGE;
        let has = |s: &Span| s.start <= touched && touched < s.start + s.len as u64;
        assert!(found.own.iter().any(has));
        let mut entries = 0;
        pm.entries(
            &[range.start..range.start + PAGE, touched..range.end],
            |_, _| entries += 1,
        )
        .unwrap();
        assert_eq!(entries, 1 + 59);
    }

    #[test]
    fn many_runs_ascend() {
        let pages = 20_000;
        let mut map = vec![0u8; (pages + 1) * PAGE as usize];
        let base = (map.as_ptr() as u64).next_multiple_of(PAGE);
        let skew = (base - map.as_ptr() as u64) as usize;
        for n in (0..pages).filter(|n| n % 3 != 0) {
            map[skew + n * PAGE as usize] = 1;
        }
        let range = base..base + pages as u64 * PAGE;
        let pm = Pagemap::open(std::process::id() as i32).unwrap();
        let found = pm.find(std::slice::from_ref(&range)).unwrap();
        for pair in found.own.windows(2) {
            assert!(
                pair[0].start + pair[0].len as u64 <= pair[1].start,
                "{pair:?}"
            );
        }
    }

    #[test]
    fn the_page_of_zeros_is_known() {
        assert!(zero_frame().unwrap().is_some(), "the tests run as root");
    }
}
