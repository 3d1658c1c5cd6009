//! `PAGEMAP_SCAN` (linux/fs.h, Linux 6.7): pages of a process by kind, found
//! by the kernel's walk of the page tables.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{SysError, SysResult};

/// The mapping is watched by a userfaultfd that lets writes pass by themselves
/// (`UFFD_FEATURE_WP_ASYNC`).
pub const WATCHED: u64 = 1 << 0;
/// The page was written to since it was last protected.
pub const WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared anonymous memory.
pub const FILE: u64 = 1 << 2;
/// The page is in RAM.
pub const PRESENT: u64 = 1 << 3;
/// The page is in swap, or a marker stands in its place.
pub const SWAPPED: u64 = 1 << 4;
/// It is the kernel's page of zeros.
pub const ZERO: u64 = 1 << 5;
/// The place is part of a guard region (`MADV_GUARD_INSTALL`; Linux 6.15).
pub const GUARD: u64 = 1 << 8;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// `PM_SCAN_WP_MATCHING`: protect what was found, in the same step.
const PROTECT: u64 = 1 << 0;
/// Regions asked for at once.
const REGIONS: usize = 2048;

/// `struct pm_scan_arg`.
#[derive(Debug, Default)]
#[repr(C)]
struct Arg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: pages of one kind in a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// What was asked to be told of them.
    pub categories: u64,
}

/// What to look for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Kinds of which a page has all.
    pub all_of: u64,
    /// Kinds of which a page has at least one.
    pub any_of: u64,
    /// Kinds of which it has none.
    pub none_of: u64,
    /// Kinds to tell of it; pages that differ in them are separate regions.
    pub tell: u64,
    /// Also forget that the found pages were written to; those in mappings that
    /// are not [`WATCHED`] are left out.
    pub protect: bool,
}

/// Calls `found` for every region in `start..end`, ascending. `false`: this
/// kernel does not know the call or a kind.
pub fn scan(
    pagemap: &File,
    (start, end): (u64, u64),
    query: Query,
    mut found: impl FnMut(Region),
) -> SysResult<bool> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut at = start;
    while at < end {
        let mut arg = Arg {
            size: size_of::<Arg>() as u64,
            flags: if query.protect { PROTECT } else { 0 },
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: query.none_of,
            category_mask: query.none_of | query.all_of,
            category_anyof_mask: query.any_of,
            return_mask: query.tell,
            ..Arg::default()
        };
        // SAFETY: `arg` has the layout the call expects and carries its size;
        // `vec` is a live buffer of `vec_len` regions.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if n < 0 {
            return match Errno::last() {
                Errno::ENOTTY | Errno::EINVAL => Ok(false),
                e => Err(SysError::new("ioctl(PAGEMAP_SCAN)", format!("{at:#x}"), e)),
            };
        }
        regions[..n as usize].iter().copied().for_each(&mut found);
        // Not `walk_end`: after a walk that filled the kernel's own buffer on
        // its way it tells of that, though it went on to the end.
        let full = n as usize == REGIONS;
        match regions[..n as usize].last().filter(|_| full) {
            Some(last) => at = last.end,
            None => break,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_each_of_many_regions_once() {
        const PAGE: usize = 4096;
        const PAGES: usize = 20_000;
        let mut memory = vec![0_u8; (PAGES + 1) * PAGE];
        let base = (memory.as_ptr() as usize).next_multiple_of(PAGE);
        let skew = base - memory.as_ptr() as usize;
        for page in (0..PAGES).step_by(2) {
            memory[skew + page * PAGE] = 1;
        }
        let file = File::open("/proc/self/pagemap").unwrap();
        let range = (base as u64, (base + PAGES * PAGE) as u64);
        let query = Query {
            any_of: PRESENT | SWAPPED,
            none_of: FILE | ZERO,
            ..Query::default()
        };
        let mut end = 0;
        let mut count = 0;
        let known = scan(&file, range, query, |r| {
            assert!(r.start >= end && r.start < r.end, "{r:x?} after {end:x}");
            end = r.end;
            count += (r.end - r.start) as usize / PAGE;
        });
        if known.unwrap() {
            assert!(count >= PAGES / 2, "{count}");
        }
    }
}
