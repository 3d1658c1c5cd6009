//! Page content: pagemaps and pages images.
//!
//! A process's pages lie one after the other in `pages-N.img`, in the order of
//! its pagemap.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::image::schema::{PagemapEntry, PagemapHead, VmaEntry};
use crate::image::{ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, names};
use crate::sys::process::{Span, read_memory, write_memory};

use super::MemoryError;
use super::pagemap::{PAGE, Pagemap};
use super::vma::{has_own_pages, status};

/// `PE_PRESENT` of [`PagemapEntry::flags`].
const PRESENT: u32 = 1 << 2;

/// Runs of pages of one protection class.
#[derive(Debug, Default)]
pub struct Runs {
    /// The pages, ascending.
    pub spans: Vec<Span>,
    /// For each span whether the process itself may read it.
    readable: Vec<bool>,
}

impl Runs {
    /// Total length, bytes.
    pub fn bytes(&self) -> usize {
        self.spans.iter().map(|s| s.len).sum()
    }
}

/// The pages of a process that have to be saved.
pub fn find(pid: i32, vmas: &[VmaEntry]) -> Result<Runs, MemoryError> {
    let pagemap = Pagemap::open(pid).map_err(MemoryError::io(format!("pagemap of {pid}")))?;
    let mut runs = Runs::default();
    for e in vmas {
        let mut spans = Vec::new();
        if has_own_pages(e) {
            pagemap
                .own_pages(e.start, e.end, &mut spans)
                .map_err(MemoryError::io(format!("pagemap of {pid}")))?;
        } else if e.status & status::VDSO != 0 {
            spans.push(Span {
                start: e.start,
                len: (e.end - e.start) as usize,
            });
        }
        let readable = e.prot as i32 & libc::PROT_READ != 0;
        runs.readable
            .resize(runs.readable.len() + spans.len(), readable);
        runs.spans.append(&mut spans);
    }
    Ok(runs)
}

/// Writes `pagemap` and pages images; `read` fills a buffer with the content
/// of some of the spans.
fn put(
    sink: &mut dyn ImageSink,
    pagemap_name: &str,
    pages_id: u32,
    spans: &[Span],
    read: impl FnOnce(&mut [u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut w = ImageWriter::new(Kind::Pagemap);
    w.record(&PagemapHead { pages_id });
    for s in spans {
        w.record(&PagemapEntry {
            vaddr: s.start,
            compat_nr_pages: 0,
            flags: Some(PRESENT),
            nr_pages: Some(s.len as u64 / PAGE),
            ..PagemapEntry::default()
        });
    }
    crate::image::put_image(sink, pagemap_name, &w.finish())?;
    let len = spans.iter().map(|s| s.len).sum();
    let name = names::pages(pages_id);
    let buf = sink
        .reserve(&name, len)
        .map_err(|source| ImageError::Io { name, source })?;
    read(buf)
}

/// Saves the pages of a process in the image `name`.
pub fn save(
    pid: i32,
    name: &str,
    runs: &Runs,
    pages_id: u32,
    sink: &mut dyn ImageSink,
) -> Result<(), MemoryError> {
    put(sink, name, pages_id, &runs.spans, |mut buf| {
        let mut at = 0;
        while at < runs.spans.len() {
            let readable = runs.readable[at];
            let n = runs.readable[at..]
                .iter()
                .take_while(|&&r| r == readable)
                .count();
            let spans = &runs.spans[at..at + n];
            let (here, rest) = buf.split_at_mut(spans.iter().map(|s| s.len).sum());
            match readable {
                true => read_memory(pid, spans, here)?,
                false => read_forced(pid, spans, here)?,
            }
            buf = rest;
            at += n;
        }
        Ok(())
    })
}

/// Reads memory that the process itself may not: only `/proc/PID/mem` does.
fn read_forced(pid: i32, spans: &[Span], mut buf: &mut [u8]) -> Result<(), MemoryError> {
    let what = format!("/proc/{pid}/mem");
    let mem = File::open(&what).map_err(MemoryError::io(&what))?;
    for s in spans {
        let (here, rest) = buf.split_at_mut(s.len);
        mem.read_exact_at(here, s.start)
            .map_err(MemoryError::io(&what))?;
        buf = rest;
    }
    Ok(())
}

/// Saves the content of a shared memory object from an open file.
pub fn save_object(
    file: &File,
    spans: &[Span],
    shmid: u64,
    pages_id: u32,
    sink: &mut dyn ImageSink,
) -> Result<(), MemoryError> {
    put(
        sink,
        &names::pagemap_shmem(shmid),
        pages_id,
        spans,
        |mut buf| {
            for s in spans {
                let (here, rest) = buf.split_at_mut(s.len);
                read_to_end_or_full(file, here, s.start)
                    .map_err(MemoryError::io("reading shared memory"))?;
                buf = rest;
            }
            Ok(())
        },
    )
}

/// The last page of an object may reach beyond its end: zeros there.
fn read_to_end_or_full(file: &File, mut buf: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buf.is_empty() {
        let n = file.read_at(buf, at)?;
        if n == 0 {
            buf.fill(0);
            break;
        }
        buf = &mut buf[n..];
        at += n as u64;
    }
    Ok(())
}

/// Saved pages: where they go and their bytes.
#[derive(Debug)]
pub struct Saved<'a> {
    /// Runs in the order of the image.
    pub spans: Vec<Span>,
    /// Their content, one after the other.
    pub bytes: &'a [u8],
}

impl<'a> Saved<'a> {
    /// Reads a pagemap and finds its pages.
    pub fn load(source: &'a dyn ImageSource, pagemap_name: &str) -> Result<Self, MemoryError> {
        let Some(mut reader) = get_reader(source, Kind::Pagemap, pagemap_name)? else {
            return Ok(Self {
                spans: Vec::new(),
                bytes: &[],
            });
        };
        let bad = |what: &str| {
            let (name, what) = (pagemap_name.to_owned(), what.to_owned());
            MemoryError::Image(ImageError::Content { name, what })
        };
        let head: PagemapHead = reader.record()?.ok_or_else(|| bad("no head"))?;
        let mut spans = Vec::new();
        let mut total = 0u64;
        while let Some(e) = reader.record::<PagemapEntry>()? {
            if e.flags.unwrap_or(PRESENT) & PRESENT == 0 || e.in_parent == Some(true) {
                return Err(bad("pages of a parent image are not read yet"));
            }
            let pages = e.nr_pages.unwrap_or(u64::from(e.compat_nr_pages));
            let len = pages
                .checked_mul(PAGE)
                .ok_or_else(|| bad("a run is too long"))?;
            total = total
                .checked_add(len)
                .ok_or_else(|| bad("too many pages"))?;
            spans.push(Span {
                start: e.vaddr,
                len: len as usize,
            });
        }
        let name = names::pages(head.pages_id);
        let get = source.get(&name).map_err(|source| ImageError::Io {
            name: name.clone(),
            source,
        });
        let bytes = get?.unwrap_or(&[]);
        if (bytes.len() as u64) < total {
            return Err(bad(&format!(
                "{name} holds {} bytes of {total}",
                bytes.len()
            )));
        }
        Ok(Self { spans, bytes })
    }

    /// Splits off what lies in `from..to`, as (spans, bytes) pieces.
    pub fn within(&self, from: u64, to: u64) -> Vec<(Span, &'a [u8])> {
        let mut at = 0;
        let mut out = Vec::new();
        for s in &self.spans {
            let bytes = &self.bytes[at..at + s.len];
            at += s.len;
            if s.start >= from && s.start + s.len as u64 <= to {
                out.push((*s, bytes));
            }
        }
        out
    }

    /// Writes into a target whose mappings stand, all but those in `skip`.
    pub fn write_to(&self, pid: i32, skip: &[std::ops::Range<u64>]) -> Result<(), MemoryError> {
        let mut at = 0;
        let mut group: Vec<Span> = Vec::new();
        let mut group_at = 0;
        for s in &self.spans {
            let skipped = skip.iter().any(|r| r.contains(&s.start));
            if skipped {
                write_memory(pid, &group, &self.bytes[group_at..at])?;
                group.clear();
            } else {
                if group.is_empty() {
                    group_at = at;
                }
                group.push(*s);
            }
            at += s.len;
        }
        if !group.is_empty() {
            write_memory(pid, &group, &self.bytes[group_at..at])?;
        }
        Ok(())
    }
}
