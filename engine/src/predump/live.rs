//! Pages of a process that runs meanwhile.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{Pages, PreDumpError, ranges};
use crate::image::{ImageError, ImageSink, names};
use crate::memory::pagemap::PAGE;
use crate::memory::pages::{self, Left};

/// Read at once.
const CHUNK: u64 = 4 << 20;

/// Writes pages that are there now, and notes those that stay in the parent.
/// What has gone meanwhile is left out: it was unmapped, so whatever comes to
/// its place is no longer watched. Returns the bytes written.
pub(super) fn save(
    p: &Pages,
    fresh: &[Range<u64>],
    kept: &[Range<u64>],
    pages_id: u32,
    sink: &mut dyn ImageSink,
) -> Result<u64, PreDumpError> {
    let name = names::pages(pages_id);
    let len = ranges::bytes(fresh) as usize;
    let buf = sink
        .reserve(&name, len)
        .map_err(|source| ImageError::Io { name, source })?;
    let mut there = Vec::new();
    let mut at = 0;
    // process_vm_readv(2) would pin pages, and what is shared since a fork would
    // be copied for that. A process that has ended has nothing to read.
    if let Ok(mem) = File::open(format!("/proc/{}/mem", p.voice)) {
        for r in fresh {
            let mut start = r.start;
            while start < r.end {
                let chunk = start..(start + CHUNK).min(r.end);
                at = read(&mem, &chunk, buf, at, &mut there);
                start = chunk.end;
            }
        }
    }
    let spans: Vec<_> = there.iter().map(pages::span).collect();
    let left = Left { kept, far: &[] };
    pages::put_pagemap(sink, &names::pagemap(p.id), pages_id, &spans, left)?;
    Ok(at as u64)
}

/// Reads a range to `buf[at..]`; returns where the next one goes.
fn read(
    mem: &File,
    range: &Range<u64>,
    buf: &mut [u8],
    at: usize,
    there: &mut Vec<Range<u64>>,
) -> usize {
    let len = (range.end - range.start) as usize;
    if mem
        .read_exact_at(&mut buf[at..at + len], range.start)
        .is_ok()
    {
        ranges::push(there, range.clone());
        return at + len;
    }
    // Some of it has gone.
    let mut at = at;
    for page in range.clone().step_by(PAGE as usize) {
        let here = &mut buf[at..at + PAGE as usize];
        if mem.read_exact_at(here, page).is_ok() {
            ranges::push(there, page..page + PAGE);
            at += PAGE as usize;
        }
    }
    at
}
