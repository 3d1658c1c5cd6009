//! Page content: pagemaps and pages images.
//!
//! A process's pages lie one after the other in `pages-N.img`, in the order of
//! its pagemap.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::image::schema::{PagemapEntry, PagemapHead, VmaEntry};
use crate::image::{
    GENERATIONS_MAX, ImageError, ImageSink, ImageSource, ImageWriter, Kind, PARENT_PREFIX,
    get_reader, names,
};
use crate::predump::ranges;
use crate::sys::process::Span;

use super::MemoryError;
use super::pagemap::{PAGE, Pagemap};
use super::parallel;
use super::vma::{has_own_pages, is_special, status};

/// `PE_PRESENT` of [`PagemapEntry::flags`].
pub const PRESENT: u32 = 1 << 2;
/// `PE_LAZY` of [`PagemapEntry::flags`]. Without `PE_PRESENT` the pages are
/// still with the dumped process.
pub const LAZY: u32 = 1 << 1;
/// `PE_PARENT` of [`PagemapEntry::flags`].
pub const PARENT: u32 = 1 << 0;

/// Pages that have to be saved.
#[derive(Debug, Default)]
pub struct Runs {
    /// The pages, ascending.
    pub spans: Vec<Span>,
    /// For each span whether the process itself may read it.
    readable: Vec<bool>,
    /// Pages among them that others may map too, ascending. The usual way of
    /// reading pins pages, for which the kernel gives the process a copy of
    /// its own.
    pub with_care: Vec<Span>,
    /// Guard regions (`MADV_GUARD_INSTALL`), ascending.
    pub guards: Vec<Span>,
}

impl Runs {
    /// Pages of addresses (ascending), of which nothing else is known.
    pub fn of(addresses: &[Range<u64>]) -> Self {
        Self {
            spans: addresses.iter().map(span).collect(),
            readable: vec![true; addresses.len()],
            ..Self::default()
        }
    }

    /// Total length, bytes.
    pub fn bytes(&self) -> usize {
        self.spans.iter().map(|s| s.len).sum()
    }

    /// The spans, cut so that each is read in one way: by `/proc/PID/mem` or not.
    fn parts(&self) -> Vec<(Span, bool)> {
        let mut out = Vec::with_capacity(self.spans.len());
        let mut care = self.with_care.as_slice();
        for (s, &readable) in self.spans.iter().zip(&self.readable) {
            let (mut at, end) = (s.start, s.start + s.len as u64);
            while at < end {
                while care.first().is_some_and(|c| c.start + c.len as u64 <= at) {
                    care = &care[1..];
                }
                let (to, forced) = match care.first() {
                    Some(c) if c.start <= at => (c.start + c.len as u64, true),
                    Some(c) => (c.start, false),
                    None => (end, false),
                };
                let to = to.min(end);
                let part = Span {
                    start: at,
                    len: (to - at) as usize,
                };
                out.push((part, forced || !readable));
                at = to;
            }
        }
        out
    }

    /// The pages as address ranges.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let range = |s: &Span| s.start..s.start + s.len as u64;
        self.spans.iter().map(range).collect()
    }

    /// The pages that are not in `left_out` (ascending).
    pub fn without(&self, left_out: &[Range<u64>]) -> Self {
        let mut rest = Self {
            with_care: self.with_care.clone(),
            guards: self.guards.clone(),
            ..Self::default()
        };
        for (s, &readable) in self.spans.iter().zip(&self.readable) {
            let all = s.start..s.start + s.len as u64;
            for r in ranges::without(std::slice::from_ref(&all), left_out) {
                rest.spans.push(span(&r));
                rest.readable.push(readable);
            }
        }
        rest
    }
}

/// A range of addresses as a span.
pub(crate) fn span(r: &Range<u64>) -> Span {
    Span {
        start: r.start,
        len: (r.end - r.start) as usize,
    }
}

/// The pages of a process that have to be saved. `vmas` are ascending.
pub fn find(pid: i32, vmas: &[VmaEntry]) -> Result<Runs, MemoryError> {
    let failed = || MemoryError::io(format!("pagemap of {pid}"));
    let own = |e: &&VmaEntry| has_own_pages(e);
    let wanted: Vec<_> = vmas.iter().filter(own).map(|e| e.start..e.end).collect();
    let pagemap = Pagemap::open(pid).map_err(failed())?;
    let found = pagemap.find(&wanted).map_err(failed())?;
    let mut runs = Runs::default();
    let mut pages = found.own.as_slice();
    let mut guards = found.guards.as_slice();
    for e in vmas {
        let before = runs.spans.len();
        if has_own_pages(e) {
            clip(&mut pages, e.start..e.end, &mut runs.spans);
        } else if e.status & (status::VDSO | status::AIO_RING) != 0 {
            runs.spans.push(Span {
                start: e.start,
                len: (e.end - e.start) as usize,
            });
        }
        if !is_special(e) {
            clip(&mut guards, e.start..e.end, &mut runs.guards);
        }
        let readable = e.prot as i32 & libc::PROT_READ != 0;
        let added = runs.spans.len() - before;
        runs.readable.resize(runs.readable.len() + added, readable);
    }
    Ok(runs)
}

/// Takes what lies in `range` from the front of ascending spans.
fn clip(spans: &mut &[Span], range: Range<u64>, out: &mut Vec<Span>) {
    while let Some(s) = spans.first() {
        let (from, to) = (
            s.start.max(range.start),
            (s.start + s.len as u64).min(range.end),
        );
        if from < to {
            out.push(Span {
                start: from,
                len: (to - from) as usize,
            });
        }
        if s.start + s.len as u64 > range.end {
            break;
        }
        *spans = &spans[1..];
    }
}

/// Writes `pagemap` and pages images; `read` fills a buffer with the content
/// of the spans.
fn put(
    sink: &mut dyn ImageSink,
    pagemap_name: &str,
    pages_id: u32,
    spans: &[Span],
    left: Left<'_>,
    read: impl FnOnce(&mut [u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    put_pagemap(sink, pagemap_name, pages_id, spans, left)?;
    let len = spans.iter().map(|s| s.len).sum();
    let name = names::pages(pages_id);
    let buf = sink
        .reserve(&name, len)
        .map_err(|source| ImageError::Io { name, source })?;
    read(buf)
}

/// Pages that are not written, ascending.
#[derive(Debug, Clone, Copy, Default)]
pub struct Left<'a> {
    /// They are in the parent images.
    pub kept: &'a [Range<u64>],
    /// They stay with the process until they are asked for.
    pub far: &'a [Range<u64>],
}

/// Writes a pagemap: pages that lie in the pages image (ascending), and others.
pub(crate) fn put_pagemap(
    sink: &mut dyn ImageSink,
    name: &str,
    pages_id: u32,
    spans: &[Span],
    left: Left<'_>,
) -> Result<(), MemoryError> {
    let mut w = ImageWriter::new(Kind::Pagemap);
    w.record(&PagemapHead { pages_id });
    let own = spans.iter().map(|s| (*s, PRESENT));
    let old = left.kept.iter().map(|r| (span(r), PARENT));
    let far = left.far.iter().map(|r| (span(r), LAZY));
    let mut all: Vec<_> = own.chain(old).chain(far).collect();
    // Spans that touch stay apart: they may differ in what may read them.
    all.sort_by_key(|(s, _)| s.start);
    for (s, flags) in all {
        w.record(&PagemapEntry {
            vaddr: s.start,
            compat_nr_pages: 0,
            flags: Some(flags),
            nr_pages: Some(s.len as u64 / PAGE),
            ..PagemapEntry::default()
        });
    }
    Ok(crate::image::put_image(sink, name, &w.finish())?)
}

/// Saves the pages of a process in the image `name`, but for those in `left`.
pub fn save(
    pid: i32,
    name: &str,
    runs: &Runs,
    left: Left<'_>,
    pages_id: u32,
    sink: &mut dyn ImageSink,
) -> Result<(), MemoryError> {
    put(sink, name, pages_id, &runs.spans, left, |mut buf| {
        let what = format!("/proc/{pid}/mem");
        let mut mem = None;
        let mut plain = Vec::new();
        for (span, forced) in runs.parts() {
            if forced {
                buf = read_plain(pid, &mut plain, buf)?;
                let (here, rest) = buf.split_at_mut(span.len);
                // Only this way reads what the process itself may not.
                let mem = match &mem {
                    Some(m) => m,
                    None => mem.insert(File::open(&what).map_err(MemoryError::io(&what))?),
                };
                mem.read_exact_at(here, span.start)
                    .map_err(MemoryError::io(&what))?;
                buf = rest;
            } else {
                plain.push(span);
            }
        }
        read_plain(pid, &mut plain, buf)?;
        Ok(())
    })
}

/// Reads and forgets `spans`; gives the rest of the buffer.
fn read_plain<'b>(
    pid: i32,
    spans: &mut Vec<Span>,
    buf: &'b mut [u8],
) -> Result<&'b mut [u8], MemoryError> {
    let (here, rest) = buf.split_at_mut(spans.iter().map(|s| s.len).sum());
    parallel::read(pid, spans, here)?;
    spans.clear();
    Ok(rest)
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
        Left::default(),
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

/// The pages that a pagemap lists, ascending, wherever they are: with a page
/// server they are on another machine.
pub fn listed(
    source: &dyn ImageSource,
    pagemap_name: &str,
) -> Result<Vec<Range<u64>>, MemoryError> {
    list(source, pagemap_name, |_| true)
}

/// The pages of a pagemap that are still with the dumped process, ascending.
pub fn far(source: &dyn ImageSource, pagemap_name: &str) -> Result<Vec<Range<u64>>, MemoryError> {
    let far = |flags: Option<u32>| flags.is_some_and(|f| f & (PRESENT | LAZY | PARENT) == LAZY);
    list(source, pagemap_name, far)
}

fn list(
    source: &dyn ImageSource,
    pagemap_name: &str,
    wanted: impl Fn(Option<u32>) -> bool,
) -> Result<Vec<Range<u64>>, MemoryError> {
    let Some(mut reader) = get_reader(source, Kind::Pagemap, pagemap_name)? else {
        return Ok(Vec::new());
    };
    let bad = |what: &str| {
        let (name, what) = (pagemap_name.to_owned(), what.to_owned());
        MemoryError::Image(ImageError::Content { name, what })
    };
    let _: PagemapHead = reader.record()?.ok_or_else(|| bad("no head"))?;
    let (mut out, mut last) = (Vec::new(), 0);
    while let Some(e) = reader.record::<PagemapEntry>()? {
        let pages = e.nr_pages.unwrap_or(u64::from(e.compat_nr_pages));
        let end = pages.checked_mul(PAGE).and_then(|n| n.checked_add(e.vaddr));
        let end = end.filter(|_| last <= e.vaddr);
        last = end.ok_or_else(|| bad("the runs do not ascend"))?;
        if wanted(e.flags) {
            out.push(e.vaddr..last);
        }
    }
    Ok(out)
}

/// Saved pages in a row: where they go and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The first address.
    pub start: u64,
    /// Their content.
    pub bytes: &'a [u8],
    /// Whose they are: the process in which they were first found (see
    /// [`super::heritage`]); 0 for objects.
    pub owner: i32,
}

impl<'a> Piece<'a> {
    /// The address after the last.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The part in `from..to`, if any.
    pub fn clip(&self, from: u64, to: u64) -> Option<Piece<'a>> {
        let (from, to) = (self.start.max(from), self.end().min(to));
        let at = |a: u64| (a - self.start) as usize;
        (from < to).then(|| Piece {
            start: from,
            bytes: &self.bytes[at(from)..at(to)],
            owner: self.owner,
        })
    }
}

/// All saved pages of a process or an object.
#[derive(Debug, Default, Clone)]
pub struct Saved<'a> {
    /// Ascending.
    pub pieces: Vec<Piece<'a>>,
}

impl<'a> Saved<'a> {
    /// Reads a pagemap and finds its pages, in its own images or in those of its
    /// parents.
    pub fn load(source: &'a dyn ImageSource, pagemap_name: &str) -> Result<Self, MemoryError> {
        Ok(Self::load_partly(source, pagemap_name, &[])?.0)
    }

    /// [`Self::load`] of a pagemap that names pages which are in the images of
    /// other processes: those in `apart` (ascending). They are only listed.
    pub fn load_partly(
        source: &'a dyn ImageSource,
        pagemap_name: &str,
        apart: &[Range<u64>],
    ) -> Result<(Self, Vec<Span>), MemoryError> {
        let Some(mut reader) = get_reader(source, Kind::Pagemap, pagemap_name)? else {
            return Ok(Default::default());
        };
        let bad = |what: &str| {
            let (name, what) = (pagemap_name.to_owned(), what.to_owned());
            MemoryError::Image(ImageError::Content { name, what })
        };
        let head: PagemapHead = reader.record()?.ok_or_else(|| bad("no head"))?;
        let place = pagemap_name.rfind('/').map_or(0, |at| at + 1);
        let name = format!("{}{}", &pagemap_name[..place], names::pages(head.pages_id));
        let get = source.get(&name).map_err(|source| ImageError::Io {
            name: name.clone(),
            source,
        });
        let mut bytes = get?.unwrap_or(&[]);
        let mut parent = None;
        let mut elsewhere = Vec::new();
        let mut last = 0;
        let mut pieces: Vec<Piece<'a>> = Vec::new();
        while let Some(e) = reader.record::<PagemapEntry>()? {
            let pages = e.nr_pages.unwrap_or(u64::from(e.compat_nr_pages));
            let len = pages.checked_mul(PAGE);
            let len = len.ok_or_else(|| bad("a run is too long"))?;
            let end = e.vaddr.checked_add(len);
            let end = end.filter(|_| last <= e.vaddr);
            let end = end.ok_or_else(|| bad("the runs do not ascend"))?;
            last = end;
            let flags = match (e.flags, e.in_parent) {
                (Some(flags), _) => flags,
                (None, Some(true)) => PARENT,
                (None, _) => PRESENT,
            };
            if flags & PARENT != 0 {
                let all = e.vaddr..end;
                let all = std::slice::from_ref(&all);
                elsewhere.extend(ranges::both(all, apart).iter().map(span));
                let older = ranges::without(all, apart);
                if parent.is_none() && !older.is_empty() {
                    parent = Some(Self::load_parent(source, pagemap_name)?);
                }
                let before = pieces.len();
                let parent = parent.iter();
                let there =
                    parent.flat_map(|p| older.iter().flat_map(|r| p.within(r.start, r.end)));
                pieces.extend(there);
                let found: u64 = pieces[before..].iter().map(|p| p.bytes.len() as u64).sum();
                if found != ranges::bytes(&older) {
                    return Err(bad("a page is not in the parent images"));
                }
                continue;
            }
            if flags & (PRESENT | LAZY) == LAZY {
                continue;
            }
            if flags & PRESENT == 0 {
                return Err(bad("pages that are nowhere"));
            }
            let Some((here, rest)) = bytes.split_at_checked(len as usize) else {
                return Err(bad(&format!("{name} ends too early")));
            };
            bytes = rest;
            pieces.push(Piece {
                start: e.vaddr,
                bytes: here,
                owner: 0,
            });
        }
        Ok((Self { pieces }, elsewhere))
    }

    fn load_parent(source: &'a dyn ImageSource, name: &str) -> Result<Self, MemoryError> {
        if name.matches('/').count() >= GENERATIONS_MAX {
            let (name, what) = (name.to_owned(), "too many parents".to_owned());
            return Err(ImageError::Content { name, what }.into());
        }
        Self::load(source, &format!("{PARENT_PREFIX}{name}"))
    }

    /// The pieces that lie in `from..to`, cut at its ends.
    pub fn within(&self, from: u64, to: u64) -> impl Iterator<Item = Piece<'a>> + '_ {
        let first = self.pieces.partition_point(|p| p.end() <= from);
        let rest = self.pieces[first..].iter();
        rest.map_while(move |p| p.clip(from, to))
    }

    /// Whether there is anything in `from..to`.
    pub fn any_within(&self, from: u64, to: u64) -> bool {
        self.within(from, to).next().is_some()
    }

    /// Bytes of content.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.bytes.len() as u64).sum()
    }
}

/// Writes pages into a target whose mappings stand and are writable.
pub fn write(pid: i32, pieces: &[Piece<'_>]) -> Result<(), MemoryError> {
    let parts: Vec<(u64, &[u8])> = pieces.iter().map(|p| (p.start, p.bytes)).collect();
    Ok(parallel::write(pid, &parts)?)
}
