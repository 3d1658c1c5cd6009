//! Memory: content, holes, protections, advice, sharing.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::conformance::sys::{self, Map, PAGE};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "memory/private",
        "anonymous private memory: pattern and holes",
        private,
    ),
    Case::new(
        "memory/protections",
        "read-only and PROT_NONE memory with content, own code",
        protections,
    ),
    Case::new(
        "memory/private-file",
        "private file mapping with pages written to",
        private_file,
    ),
    Case::new(
        "memory/shared-file",
        "shared file mapping: writes reach the file",
        shared_file,
    ),
    Case::new(
        "memory/unlinked-file",
        "mapping of a file that has no name any more",
        unlinked_file,
    ),
    Case::new(
        "memory/shared",
        "shared anonymous memory between processes",
        shared,
    ),
    Case::new(
        "memory/advice",
        "madvise state, huge pages, locked memory",
        advice,
    ),
    Case::new("memory/grows-down", "stacks still grow", grows_down),
    Case::new("memory/heap", "the heap goes on where it ended", heap),
    Case::new("memory/names", "names of mappings", named),
    Case::new(
        "memory/places",
        "mappings at the ends of the address space",
        places,
    ),
    Case::new("memory/large", "64 MiB of content", large),
    Case::new("memory/cow", "pages shared after fork", copied_on_write),
];

/// A page's bytes that name it.
pub(super) fn stamp(map: &mut Map, page: usize, seed: u64) {
    let at = page * PAGE;
    for (i, b) in map.bytes_mut()[at..at + PAGE].chunks_mut(8).enumerate() {
        b.copy_from_slice(&value(page, i, seed).to_le_bytes());
    }
}

pub(super) fn value(page: usize, index: usize, seed: u64) -> u64 {
    let x = seed ^ ((page as u64) << 20) ^ index as u64;
    x.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
}

pub(super) fn stamped(bytes: &[u8], page: usize, seed: u64) -> bool {
    let at = page * PAGE;
    let words = bytes[at..at + PAGE].chunks(8).enumerate();
    words
        .into_iter()
        .all(|(i, b)| b == value(page, i, seed).to_le_bytes())
}

/// Which pages of a mapping are in RAM (mincore(2)).
pub(super) fn resident(map: &Map) -> Result<Vec<bool>> {
    let mut out = vec![0_u8; map.len() / PAGE];
    let args = [
        map.addr() as u64,
        map.len() as u64,
        out.as_mut_ptr() as u64,
        0,
        0,
        0,
    ];
    // SAFETY: the vector has a byte for each page of a mapping that is ours.
    unsafe { sys::call(libc::SYS_mincore, args) }?;
    Ok(out.iter().map(|b| b & 1 == 1).collect())
}

fn private(_: &Stage) -> Result<Check> {
    const PAGES: usize = 1000;
    let mut map = Map::private(PAGES * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    let filled = |p: usize| p.is_multiple_of(7) || (100..120).contains(&p);
    for p in (0..PAGES).filter(|&p| filled(p)) {
        stamp(&mut map, p, 1);
    }
    let mut seed = 1;
    Ok(Box::new(move |f| {
        for (p, there) in resident(&map)?.into_iter().enumerate() {
            f.that(format!("page {p}: in RAM {there}"), there == filled(p));
            if filled(p) {
                let fine = stamped(map.bytes(), p, seed);
                f.that(format!("page {p}: other content"), fine);
            }
        }
        seed += 1;
        for p in (0..PAGES).filter(|&p| filled(p)) {
            stamp(&mut map, p, seed);
        }
        Ok(())
    }))
}

fn protections(_: &Stage) -> Result<Check> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let make = |seed, prot| -> Result<Map> {
        let mut map = Map::private(3 * PAGE)?;
        stamp(&mut map, 1, seed);
        map.protect(prot)?;
        Ok(map)
    };
    let read_only = make(1, ProtFlags::PROT_READ)?;
    let none = make(2, ProtFlags::PROT_NONE)?;
    let mut code = Map::private(PAGE)?;
    // mov eax, 42; ret
    code.bytes_mut()[..6].copy_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
    code.protect(ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)?;
    Ok(Box::new(move |f| {
        f.that("read-only content", stamped(read_only.bytes(), 1, 1));
        none.protect(rw)?;
        f.that("content under PROT_NONE", stamped(none.bytes(), 1, 2));
        none.protect(ProtFlags::PROT_NONE)?;
        // SAFETY: the page holds a function of this prototype, executable.
        let function: extern "C" fn() -> i32 = unsafe { std::mem::transmute(code.addr()) };
        f.same("own code", &42, &function());
        Ok(())
    }))
}

/// A file of `pages` stamped pages.
fn stamped_file(stage: &Stage, name: &str, pages: usize) -> Result<File> {
    let mut map = Map::private(pages * PAGE)?;
    for p in 0..pages {
        stamp(&mut map, p, 9);
    }
    fs::write(stage.path(name), map.bytes())?;
    let options = File::options()
        .read(true)
        .write(true)
        .open(stage.path(name));
    Ok(options?)
}

fn map_file(file: &File, pages: usize, flags: MapFlags) -> Result<Map> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len = std::num::NonZeroUsize::new(pages * PAGE).expect("not empty");
    // SAFETY: a new mapping at a free place, owned by the value made here.
    Ok(unsafe {
        let at = nix::sys::mman::mmap(None, len, rw, flags, file, 0)?;
        Map::from_raw(at.cast(), pages * PAGE)
    })
}

fn private_file(stage: &Stage) -> Result<Check> {
    let file = stamped_file(stage, "mapped", 16)?;
    let mut map = map_file(&file, 16, MapFlags::MAP_PRIVATE)?;
    drop(file);
    stamp(&mut map, 3, 77);
    // Read, so that it is mapped, but still the file's.
    ensure!(stamped(map.bytes(), 5, 9), "the file is not as written");
    let path = stage.path("mapped");
    Ok(Box::new(move |f| {
        for p in 0..16 {
            let seed = if p == 3 { 77 } else { 9 };
            f.that(
                format!("page {p}: other content"),
                stamped(map.bytes(), p, seed),
            );
        }
        let on_disk = fs::read(&path)?;
        f.that("the file was written to", stamped(&on_disk, 3, 9));
        Ok(())
    }))
}

fn shared_file(stage: &Stage) -> Result<Check> {
    let file = stamped_file(stage, "mapped", 4)?;
    let mut map = map_file(&file, 4, MapFlags::MAP_SHARED)?;
    stamp(&mut map, 2, 5);
    let mut seed = 5;
    Ok(Box::new(move |f| {
        let mut there = vec![0; 4 * PAGE];
        file.read_exact_at(&mut there, 0)?;
        f.that("page in the file", stamped(&there, 2, seed));
        f.that("page in memory", stamped(map.bytes(), 2, seed));
        seed += 1;
        stamp(&mut map, 2, seed);
        file.read_exact_at(&mut there, 0)?;
        f.that("a new write reaches the file", stamped(&there, 2, seed));
        Ok(())
    }))
}

fn unlinked_file(stage: &Stage) -> Result<Check> {
    let file = stamped_file(stage, "gone", 8)?;
    let mut map = map_file(&file, 8, MapFlags::MAP_SHARED)?;
    fs::remove_file(stage.path("gone"))?;
    stamp(&mut map, 1, 3);
    Ok(Box::new(move |f| {
        let mut there = vec![0; 8 * PAGE];
        file.read_exact_at(&mut there, 0)?;
        for p in 0..8 {
            let seed = if p == 1 { 3 } else { 9 };
            f.that(format!("page {p} of the file"), stamped(&there, p, seed));
            f.that(format!("page {p} in memory"), stamped(map.bytes(), p, seed));
        }
        file.write_all_at(b"again", 0)?;
        f.same(
            "a write through the descriptor",
            b"again".as_slice(),
            &map.bytes()[..5],
        );
        file.write_all_at(&value(0, 0, 9).to_le_bytes(), 0)?;
        Ok(())
    }))
}

fn shared(_: &Stage) -> Result<Check> {
    let map = Map::forever(256 * PAGE)?;
    let pattern: Vec<u8> = (0..PAGE).map(|i| (i * 7) as u8).collect();
    let at = 9 * PAGE;
    // SAFETY: nobody else has this memory yet.
    unsafe {
        map.ptr()
            .add(at)
            .copy_from(std::ptr::NonNull::from(&pattern[0]), PAGE)
    };
    map.word(0).store(1, Ordering::SeqCst);
    let page_9 = move || map.bytes()[at..at + PAGE] == pattern;
    let theirs = page_9.clone();
    let member = Member::start("the other process", || {
        Ok(Box::new(move |f: &mut Findings| {
            f.that("page 9", theirs());
            let turn = map.word(0).load(Ordering::SeqCst);
            f.same(
                "the parent's word",
                &turn,
                &map.word(1).load(Ordering::SeqCst),
            );
            map.word(2).store(turn + 100, Ordering::SeqCst);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        let turn = map.word(0).load(Ordering::SeqCst);
        map.word(1).store(turn, Ordering::SeqCst);
        member.check(f)?;
        let word = map.word(2).load(Ordering::SeqCst);
        f.same("the child's word", &(turn + 100), &word);
        f.that("page 9", page_9());
        map.word(0).store(turn + 1, Ordering::SeqCst);
        Ok(())
    }))
}

fn advice(_: &Stage) -> Result<Check> {
    const HUGE: usize = 2 << 20;
    let advices = [
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_DONTFORK,
        libc::MADV_WIPEONFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
    ];
    let mut maps = Vec::new();
    for advice in advices {
        let mut map = Map::private(2 * HUGE)?;
        map.advise(advice)?;
        stamp(&mut map, 1, advice as u64);
        stamp(&mut map, 600, advice as u64);
        maps.push((advice, map));
    }
    let mut locked = Map::private(4 * PAGE)?;
    stamp(&mut locked, 2, 8);
    // SAFETY: mapped memory of our own.
    unsafe { nix::sys::mman::mlock(locked.ptr().cast(), locked.len()) }?;
    // The flags themselves are compared from outside, in smaps.
    Ok(Box::new(move |f| {
        for (advice, map) in &maps {
            for page in [1, 600] {
                let fine = stamped(map.bytes(), page, *advice as u64);
                f.that(format!("advice {advice}, page {page}: other content"), fine);
            }
        }
        f.that("locked content", stamped(locked.bytes(), 2, 8));
        f.same("locked pages in RAM", &vec![true; 4], &resident(&locked)?);
        Ok(())
    }))
}

fn grows_down(_: &Stage) -> Result<Check> {
    // Room for the stack to grow into, and the guard gap below it.
    const ROOM: usize = 8 << 20;
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let room = Map::anonymous(ROOM, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)?;
    let top = room.addr() + ROOM - PAGE;
    drop(room);
    let at = std::num::NonZeroUsize::new(top).expect("not null");
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_GROWSDOWN | MapFlags::MAP_FIXED_NOREPLACE;
    let size = std::num::NonZeroUsize::new(PAGE).expect("not null");
    // SAFETY: the place has just become free; NOREPLACE keeps others safe.
    let at = unsafe { nix::sys::mman::mmap_anonymous(Some(at), size, rw, flags) }?;
    let top = at.as_ptr() as usize;
    let mut depth = 0;
    Ok(Box::new(move |f| {
        for i in 0..64 {
            let page = top - (depth + i) * PAGE;
            // SAFETY: the mapping grows by a page when touched just below it;
            // the room below is free.
            unsafe { std::ptr::write_volatile(page as *mut u64, page as u64) };
        }
        depth += 63;
        for i in 0..depth {
            let page = top - i * PAGE;
            // SAFETY: written to above.
            let is = unsafe { std::ptr::read_volatile(page as *const u64) };
            f.same("a word of the grown mapping", &(page as u64), &is);
        }
        // The stack of this thread: 4 MiB of frames.
        f.same("sum over frames", &descend(1024), &(1024 * 1025 / 2));
        Ok(())
    }))
}

/// A frame of a page for every step.
#[inline(never)]
fn descend(n: u64) -> u64 {
    let mut frame = [0_u8; PAGE];
    std::hint::black_box(&mut frame);
    if n == 0 {
        return 0;
    }
    n + descend(n - 1)
}

fn heap(_: &Stage) -> Result<Check> {
    // SAFETY: asks for the current end.
    let brk = || unsafe { libc::sbrk(0) } as usize;
    let mut end = brk();
    let mut blocks: Vec<Vec<u8>> = (0..200).map(|i| vec![i as u8; 3000]).collect();
    end = end.max(brk());
    Ok(Box::new(move |f| {
        f.same("end of the heap", &end, &brk());
        let whole = |(i, b): (usize, &Vec<u8>)| b.iter().all(|&x| x == i as u8);
        f.that("blocks", blocks.iter().enumerate().all(whole));
        // SAFETY: grows the heap; malloc copes with that.
        let grown = unsafe { libc::sbrk(1 << 20) } as usize;
        f.same("where the heap grows", &end, &grown);
        // SAFETY: the bytes were just obtained.
        unsafe { std::ptr::write_bytes(grown as *mut u8, 7, 1 << 20) };
        blocks.rotate_left(0);
        end = brk();
        Ok(())
    }))
}

fn named(_: &Stage) -> Result<Check> {
    const PR_SET_VMA: i64 = 0x5356_4d41;
    let map = Map::private(5 * PAGE)?;
    let name = c"conformance";
    let args = [
        PR_SET_VMA as u64,
        0,
        map.addr() as u64,
        map.len() as u64,
        name.as_ptr() as u64,
        0,
    ];
    // SAFETY: the name outlives the call. Kernels without such names say EINVAL.
    let known = unsafe { sys::call(libc::SYS_prctl, args) }.is_ok();
    Ok(Box::new(move |f| {
        let maps = fs::read_to_string("/proc/self/maps")?;
        let start = format!("{:x}-", map.addr());
        let line = maps
            .lines()
            .find(|l| l.starts_with(&start))
            .unwrap_or_default();
        f.same("named", &known, &line.contains("[anon:conformance]"));
        Ok(())
    }))
}

fn places(_: &Stage) -> Result<Check> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let mut maps = Vec::new();
    for at in [
        0x1_0000_usize,
        0x7fff_0000,
        0x7fff_fff0_0000 & !0xfff,
        0x6000_0000_0000,
    ] {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
        let size = std::num::NonZeroUsize::new(2 * PAGE).expect("not null");
        let place = std::num::NonZeroUsize::new(at).expect("not null");
        // SAFETY: NOREPLACE keeps what is there.
        let Ok(p) = (unsafe { nix::sys::mman::mmap_anonymous(Some(place), size, rw, flags) })
        else {
            continue;
        };
        // SAFETY: just made.
        let mut map = unsafe { Map::from_raw(p.cast(), 2 * PAGE) };
        stamp(&mut map, 1, at as u64);
        maps.push((at, map));
    }
    ensure!(maps.len() >= 3, "only {} places are free", maps.len());
    // Halves of one mapping with different protections, moved apart.
    let whole = Map::private(8 * PAGE)?;
    Ok(Box::new(move |f| {
        for (at, map) in &maps {
            f.that(
                format!("content at {at:x}"),
                stamped(map.bytes(), 1, *at as u64),
            );
        }
        f.that(
            "untouched memory is zero",
            whole.bytes().iter().all(|&b| b == 0),
        );
        Ok(())
    }))
}

fn large(_: &Stage) -> Result<Check> {
    const PAGES: usize = (64 << 20) / PAGE;
    let mut map = Map::private(PAGES * PAGE)?;
    for p in 0..PAGES {
        stamp(&mut map, p, 6);
    }
    Ok(Box::new(move |f| {
        let bad = (0..PAGES).filter(|&p| !stamped(map.bytes(), p, 6)).count();
        f.same("pages with other content", &0, &bad);
        Ok(())
    }))
}

fn copied_on_write(stage: &Stage) -> Result<Check> {
    let mut map = Map::private(64 * PAGE)?;
    for p in 0..64 {
        stamp(&mut map, p, 1);
    }
    let at = (map.addr(), map.len());
    let member = Member::start("the child", move || {
        let place = std::ptr::NonNull::new(at.0 as *mut u8).expect("a mapping");
        // SAFETY: inherited; the frame that owns the parent's value is never returned to.
        let mut map = unsafe { Map::from_raw(place, at.1) };
        stamp(&mut map, 10, 2);
        Ok(Box::new(move |f: &mut Findings| {
            for p in 0..64 {
                let seed = if p == 10 { 2 } else { 1 };
                f.that(format!("page {p}"), stamped(map.bytes(), p, seed));
            }
            Ok(())
        }) as Check)
    })?;
    let mut note = File::create(stage.path("note"))?;
    note.write_all(b"x")?;
    Ok(Box::new(move |f| {
        for p in 0..64 {
            f.that(format!("page {p}"), stamped(map.bytes(), p, 1));
        }
        member.check(f)
    }))
}
