//! Pages that processes share since a fork stay shared.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags};

use super::memory::{stamp, stamped};
use crate::conformance::sys::{self, Map, PAGE};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "cow/parent-child",
        "pages a child has in common with its parent since the fork, and some it wrote to",
        parent_child,
    ),
    Case::new(
        "cow/brothers",
        "pages that brothers still share and their parent has overwritten",
        brothers,
    ),
    Case::new(
        "cow/generations",
        "pages shared by four generations",
        generations,
    ),
    Case::new(
        "cow/changed-layout",
        "a child that has cut, grown, protected and dropped parts of what it inherited",
        changed_layout,
    ),
    Case::new(
        "cow/private-file",
        "pages of a private file mapping written before the fork",
        private_file,
    ),
    Case::new(
        "cow/many",
        "forty children of one parent that share its memory",
        many,
    ),
    Case::new(
        "cow/libraries",
        "data of the program and its libraries, shared since the fork",
        libraries,
    ),
    Case::new(
        "cow/once",
        "pages in common, written to the images once",
        parent_child,
    )
    .with_pages_once(),
    Case::new(
        "cow/once-generations",
        "pages shared by four generations, written to the images once",
        generations,
    )
    .with_pages_once(),
    Case::new(
        "cow/once-brothers",
        "pages that only brothers share, written to the images once",
        brothers,
    )
    .with_pages_once(),
    Case::new(
        "cow/once-changed-layout",
        "a changed layout of what was inherited, written to the images once",
        changed_layout,
    )
    .with_pages_once(),
];

/// What stands in a process's pagemap for some pages: equal places are the
/// same page. 0 for pages of files and for none.
fn frames(pid: i32, addr: usize, pages: usize) -> Result<Vec<u64>> {
    const PLACE: u64 = (1 << 55) - 1;
    const FILE: u64 = 1 << 61;
    let mut bytes = vec![0; pages * 8];
    let map = File::open(format!("/proc/{pid}/pagemap"))?;
    map.read_exact_at(&mut bytes, (addr / PAGE * 8) as u64)
        .context("pagemap")?;
    let words = bytes.chunks_exact(8);
    let word = |c: &[u8]| u64::from_le_bytes(c.try_into().expect("8 bytes"));
    let place = |e: u64| if e & FILE == 0 { e & PLACE } else { 0 };
    Ok(words.map(|c| place(word(c))).collect())
}

/// Which of the pages two processes have in common.
fn common(a: i32, b: i32, addr: usize, pages: usize) -> Result<Vec<bool>> {
    let (a, b) = (frames(a, addr, pages)?, frames(b, addr, pages)?);
    Ok(a.iter().zip(&b).map(|(a, b)| *a != 0 && a == b).collect())
}

fn me() -> i32 {
    std::process::id() as i32
}

/// The child's own view of a mapping it has inherited.
fn inherited(addr: usize, len: usize) -> Map {
    let at = NonNull::new(addr as *mut u8).expect("a mapping");
    // SAFETY: inherited by fork; the frame that owns the parent's value is
    // never returned to in the child.
    unsafe { Map::from_raw(at, len) }
}

fn filled(pages: usize, seed: u64) -> Result<Map> {
    let mut map = Map::private(pages * PAGE)?;
    for p in 0..pages {
        stamp(&mut map, p, seed);
    }
    Ok(map)
}

fn parent_child(_: &Stage) -> Result<Check> {
    const PAGES: usize = 512;
    let mut map = filled(PAGES, 1)?;
    let (addr, len) = (map.addr(), map.len());
    let theirs = |p: usize| p % 50 == 7;
    let ours = |p: usize| p % 50 == 9;
    let member = Member::start("the child", move || {
        let mut map = inherited(addr, len);
        for p in (0..PAGES).filter(|&p| theirs(p)) {
            stamp(&mut map, p, 2);
        }
        Ok(Box::new(move |f: &mut Findings| {
            for p in 0..PAGES {
                let seed = if theirs(p) { 2 } else { 1 };
                f.that(format!("page {p}"), stamped(map.bytes(), p, seed));
            }
            Ok(())
        }) as Check)
    })?;
    for p in (0..PAGES).filter(|&p| ours(p)) {
        stamp(&mut map, p, 3);
    }
    Ok(Box::new(move |f| {
        for p in 0..PAGES {
            let seed = if ours(p) { 3 } else { 1 };
            f.that(format!("page {p}"), stamped(map.bytes(), p, seed));
        }
        for (p, is) in common(me(), member.pid, addr, PAGES)?.iter().enumerate() {
            f.same(&format!("page {p} in common"), &!(theirs(p) || ours(p)), is);
        }
        member.check(f)
    }))
}

fn brothers(_: &Stage) -> Result<Check> {
    const PAGES: usize = 64;
    let mut map = filled(PAGES, 1)?;
    let (addr, len) = (map.addr(), map.len());
    let start = |name: &str| {
        Member::start(name, move || {
            let map = inherited(addr, len);
            Ok(Box::new(move |f: &mut Findings| {
                for p in 0..PAGES {
                    f.that(format!("page {p}"), stamped(map.bytes(), p, 1));
                }
                Ok(())
            }) as Check)
        })
    };
    let (elder, younger) = (start("the elder")?, start("the younger")?);
    for p in 0..PAGES / 2 {
        stamp(&mut map, p, 2);
    }
    Ok(Box::new(move |f| {
        for p in 0..PAGES {
            let seed = if p < PAGES / 2 { 2 } else { 1 };
            f.that(format!("page {p}"), stamped(map.bytes(), p, seed));
        }
        let shared = common(elder.pid, younger.pid, addr, PAGES)?;
        f.same("in common among brothers", &vec![true; PAGES], &shared);
        let shared = common(me(), elder.pid, addr, PAGES)?;
        let wanted: Vec<bool> = (0..PAGES).map(|p| p >= PAGES / 2).collect();
        f.same("in common with the parent", &wanted, &shared);
        elder.check(f)?;
        younger.check(f)
    }))
}

fn generations(_: &Stage) -> Result<Check> {
    const PAGES: usize = 32;
    const DEPTH: usize = 4;
    /// Forks the next generation; each writes to one page.
    fn down(addr: usize, len: usize, depth: usize) -> Result<Member> {
        Member::start(&format!("generation {depth}"), move || {
            let mut map = inherited(addr, len);
            stamp(&mut map, depth, 1 + depth as u64);
            let next = match depth < DEPTH {
                true => Some(down(addr, len, depth + 1)?),
                false => None,
            };
            Ok(Box::new(move |f: &mut Findings| {
                for p in 0..PAGES {
                    let written = (1..=depth).contains(&p);
                    let seed = if written { 1 + p as u64 } else { 1 };
                    f.that(format!("page {p}"), stamped(map.bytes(), p, seed));
                }
                let Some(next) = &next else { return Ok(()) };
                for (p, is) in common(me(), next.pid, addr, PAGES)?.iter().enumerate() {
                    f.same(&format!("page {p} in common"), &(p != depth + 1), is);
                }
                next.check(f)
            }) as Check)
        })
    }
    let map = filled(PAGES, 1)?;
    let child = down(map.addr(), map.len(), 1)?;
    Ok(Box::new(move |f| {
        let shared = common(me(), child.pid, map.addr(), PAGES)?;
        let wanted: Vec<bool> = (0..PAGES).map(|p| p != 1).collect();
        f.same("in common", &wanted, &shared);
        f.that("content", stamped(map.bytes(), 1, 1));
        child.check(f)
    }))
}

fn changed_layout(_: &Stage) -> Result<Check> {
    const PAGES: usize = 40;
    let room = Map::anonymous(
        2 * PAGES * PAGE,
        ProtFlags::PROT_NONE,
        MapFlags::MAP_PRIVATE,
    )?;
    let addr = room.addr();
    drop(room);
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let at = std::num::NonZeroUsize::new(addr).context("null")?;
    let size = std::num::NonZeroUsize::new(PAGES * PAGE).context("null")?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
    // SAFETY: the place has just become free; NOREPLACE keeps others safe.
    let at = unsafe { nix::sys::mman::mmap_anonymous(Some(at), size, rw, flags) }?;
    // SAFETY: just made.
    let mut map = unsafe { Map::from_raw(at.cast(), PAGES * PAGE) };
    for p in 0..PAGES {
        stamp(&mut map, p, 1);
    }
    let member = Member::start("the child", move || {
        let page = move |n: usize| addr + n * PAGE;
        // Pages 0 to 4 go, 10 to 20 become read-only, 25 to 30 are dropped,
        // and the end grows by ten.
        drop(inherited(page(0), 5 * PAGE));
        inherited_part(page(10), 10, |m| Ok(m.protect(ProtFlags::PROT_READ)?))?;
        inherited_part(page(25), 5, |m| Ok(m.advise(libc::MADV_DONTNEED)?))?;
        let (old, new) = ((PAGES - 20) * PAGE, (PAGES - 10) * PAGE);
        let args = [page(20) as u64, old as u64, new as u64, 0, 0, 0];
        // SAFETY: in place, of a mapping that is this process's own.
        unsafe { sys::call(libc::SYS_mremap, args) }?;
        let mut all = std::mem::ManuallyDrop::new(inherited(page(0), (PAGES + 10) * PAGE));
        stamp(&mut all, PAGES + 3, 4);
        Ok(Box::new(move |f: &mut Findings| {
            for p in 5..PAGES + 10 {
                let bytes = all.bytes();
                let fine = match p {
                    25..30 => bytes[p * PAGE..][..PAGE].iter().all(|&b| b == 0),
                    _ if p == PAGES + 3 => stamped(bytes, p, 4),
                    _ if p >= PAGES => bytes[p * PAGE..][..PAGE].iter().all(|&b| b == 0),
                    _ => stamped(bytes, p, 1),
                };
                f.that(format!("page {p}"), fine);
            }
            let maps = std::fs::read_to_string("/proc/self/maps")?;
            let first = format!("{:x}-", page(0));
            f.that("what was cut off is back", !maps.contains(&first));
            inherited_part(page(25), 5, |m| Ok(m.advise(libc::MADV_DONTNEED)?))
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        for p in 0..PAGES {
            f.that(format!("page {p}"), stamped(map.bytes(), p, 1));
        }
        for (p, is) in common(me(), member.pid, addr, PAGES)?.iter().enumerate() {
            let wanted = p >= 5 && !(25..30).contains(&p);
            f.same(&format!("page {p} in common"), &wanted, is);
        }
        member.check(f)
    }))
}

/// Works on a part of memory that goes on to exist.
fn inherited_part(addr: usize, pages: usize, work: impl FnOnce(&Map) -> Result<()>) -> Result<()> {
    work(&std::mem::ManuallyDrop::new(inherited(addr, pages * PAGE)))
}

fn private_file(stage: &Stage) -> Result<Check> {
    const PAGES: usize = 16;
    let path = stage.path("mapped");
    std::fs::write(&path, vec![7; PAGES * PAGE])?;
    let file = File::open(&path)?;
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let size = std::num::NonZeroUsize::new(PAGES * PAGE).context("null")?;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let at = unsafe { nix::sys::mman::mmap(None, size, rw, MapFlags::MAP_PRIVATE, &file, 0) }?;
    // SAFETY: just made.
    let mut map = unsafe { Map::from_raw(at.cast(), PAGES * PAGE) };
    for p in 0..PAGES / 2 {
        stamp(&mut map, p, 1);
    }
    let (addr, len) = (map.addr(), map.len());
    let member = Member::start("the child", move || {
        let mut map = inherited(addr, len);
        stamp(&mut map, 0, 2);
        Ok(Box::new(move |f: &mut Findings| {
            f.that("page 0", stamped(map.bytes(), 0, 2));
            f.that("page 1", stamped(map.bytes(), 1, 1));
            f.same("the file's", &7, &map.bytes()[(PAGES - 1) * PAGE]);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        let shared = common(me(), member.pid, addr, PAGES / 2)?;
        let wanted: Vec<bool> = (0..PAGES / 2).map(|p| p != 0).collect();
        f.same("in common", &wanted, &shared);
        f.that("page 0", stamped(map.bytes(), 0, 1));
        member.check(f)
    }))
}

fn many(_: &Stage) -> Result<Check> {
    const PAGES: usize = 1024;
    let map = filled(PAGES, 1)?;
    let (addr, len) = (map.addr(), map.len());
    let mut members = Vec::new();
    for n in 0..40 {
        members.push(Member::start(&format!("child {n}"), move || {
            let mut map = inherited(addr, len);
            stamp(&mut map, n, 2);
            Ok(Box::new(move |f: &mut Findings| {
                f.that("its page", stamped(map.bytes(), n, 2));
                f.that("another page", stamped(map.bytes(), 100 + n, 1));
                Ok(())
            }) as Check)
        })?);
    }
    Ok(Box::new(move |f| {
        f.that("the parent's", stamped(map.bytes(), PAGES - 1, 1));
        for (n, m) in members.iter().enumerate() {
            let shared = common(me(), m.pid, addr, PAGES)?;
            let count = shared.iter().filter(|s| **s).count();
            f.same("pages in common", &(PAGES - 1), &count);
            f.same("its own page", &false, &shared[n]);
            m.check(f)?;
        }
        Ok(())
    }))
}

fn libraries(_: &Stage) -> Result<Check> {
    let child = Member::start("the child", || {
        Ok(Box::new(|_: &mut Findings| Ok(())) as Check)
    })?;
    let count = move || -> Result<usize> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let mut sum = 0;
        for line in maps.lines() {
            let data = line.contains(" rw-p ") || line.contains(" r--p ");
            if !data || !line.contains(" /") {
                continue;
            }
            let range = line.split(' ').next().context("maps")?;
            let (start, end) = range.split_once('-').context("maps")?;
            let start = usize::from_str_radix(start, 16)?;
            let pages = (usize::from_str_radix(end, 16)? - start) / PAGE;
            let shared = common(me(), child.pid, start, pages)?;
            sum += shared.iter().filter(|s| **s).count();
        }
        child.check(&mut Findings::default())?;
        Ok(sum)
    };
    let before = count()?;
    Ok(Box::new(move |f| {
        // Both go on, and write to some.
        let now = count()?;
        let fine = before > 0 && now * 4 >= before * 3;
        f.that(format!("in common: {before} pages, now {now}"), fine);
        Ok(())
    }))
}
