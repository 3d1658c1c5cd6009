//! Which pages of a mapping hold content of their own (`/proc/PID/pagemap`,
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::sys::process::Span;

/// Bytes of a page on x86-64.
pub const PAGE: u64 = 4096;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Set for pages of a file and of shared anonymous memory.
const FILE_OR_SHARED: u64 = 1 << 61;

/// An open pagemap.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the pagemap of a process.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Runs of pages in `start..end` that are the process's own: touched
    /// anonymous memory and copied-on-write pages of private file mappings, in
    /// RAM or in swap.
    pub fn own_pages(&self, start: u64, end: u64, runs: &mut Vec<Span>) -> io::Result<()> {
        let mut buf = vec![0u8; 64 << 10];
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE).min(buf.len() as u64 / 8) as usize;
            let bytes = &mut buf[..pages * 8];
            self.0.read_exact_at(bytes, at / PAGE * 8)?;
            for (i, e) in bytes.chunks_exact(8).enumerate() {
                let e = u64::from_le_bytes(e.try_into().expect("8 bytes"));
                if e & (PRESENT | SWAPPED) == 0 || e & FILE_OR_SHARED != 0 {
                    continue;
                }
                let addr = at + i as u64 * PAGE;
                match runs.last_mut() {
                    Some(s) if s.start + s.len as u64 == addr => s.len += PAGE as usize,
                    _ => runs.push(Span {
                        start: addr,
                        len: PAGE as usize,
                    }),
                }
            }
            at += pages as u64 * PAGE;
        }
        Ok(())
    }
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
        let mut runs = Vec::new();
        let pm = Pagemap::open(std::process::id() as i32).unwrap();
        pm.own_pages(base, base + len as u64, &mut runs).unwrap();
        assert!(
            runs.iter()
                .any(|s| s.start <= base + 5 * PAGE && base + 5 * PAGE < s.start + s.len as u64)
        );
    }
}
