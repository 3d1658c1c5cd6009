//! Physical addresses of our own memory, by /proc/self/pagemap
//! (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;

use super::blocks::HUGE;

const PAGE: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const PFN_MASK: u64 = (1 << 55) - 1;

/// The physical address of each huge page of `memory`, which starts at one.
///
/// Needs CAP_SYS_ADMIN: without, the kernel shows frame number zero, which is an
/// error here.
pub(super) fn physical_addresses(memory: &[u8]) -> io::Result<Vec<u64>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let start = memory.as_ptr() as u64;
    let mut addresses = Vec::with_capacity(memory.len() / HUGE as usize);
    for offset in (0..memory.len()).step_by(HUGE as usize) {
        // Only pages that were touched through this mapping are in its page table.
        black_box(memory[offset]);
        let mut entry = [0u8; 8];
        pagemap.read_exact_at(&mut entry, (start + offset as u64) / PAGE * 8)?;
        let entry = u64::from_le_bytes(entry);
        let pfn = entry & PFN_MASK;
        if entry & PRESENT == 0 || pfn == 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the kernel does not show physical addresses (CAP_SYS_ADMIN is needed)",
            ));
        }
        addresses.push(pfn * PAGE);
    }
    Ok(addresses)
}
