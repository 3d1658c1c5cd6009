//! Mappings of every kind and with every flag.

use std::fs::{self, File};
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags};

use super::memory::{resident, stamp, stamped};
use crate::conformance::case::Unavailable;
use crate::conformance::sys::{self, Map, PAGE};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "mappings/guard",
        "guard regions inside of a mapping (MADV_GUARD_INSTALL)",
        guard,
    ),
    Case::new(
        "mappings/droppable",
        "memory the kernel may drop (MAP_DROPPABLE)",
        droppable,
    ),
    Case::new(
        "mappings/lock-on-fault",
        "memory locked as it is touched (mlock2, MLOCK_ONFAULT)",
        lock_on_fault,
    ),
    Case::new(
        "mappings/lock-future",
        "mappings to come are locked (mlockall, MCL_FUTURE)",
        |_| lock_future(libc::MCL_FUTURE),
    ),
    Case::new(
        "mappings/lock-future-on-fault",
        "mappings to come are locked as they are touched (MCL_ONFAULT)",
        |_| lock_future(libc::MCL_FUTURE | libc::MCL_ONFAULT),
    ),
    Case::new(
        "mappings/sealed",
        "a mapping that nothing may change any more (mseal)",
        sealed,
    ),
    Case::new(
        "mappings/ksm",
        "memory offered to KSM, by mapping and by process",
        ksm,
    ),
    Case::new("mappings/secret", "a mapping of memfd_secret", secret).refused(),
    Case::new(
        "mappings/sparse",
        "8 GiB of address space with a few pages in use",
        sparse,
    ),
    Case::new(
        "mappings/zeros",
        "pages of zeros that were only read",
        zeros,
    ),
    Case::new(
        "mappings/many",
        "12,000 mappings of alternating protection",
        many,
    ),
    Case::new("mappings/swapped", "pages that lie in swap", swapped).with_swap(64),
    Case::new(
        "mappings/arguments",
        "arguments and environment moved elsewhere (PR_SET_MM_MAP)",
        arguments,
    ),
    Case::new(
        "mappings/policies",
        "NUMA policies of a mapping and of a thread (mbind, set_mempolicy)",
        policies,
    ),
];

pub(super) fn rw() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

/// Maps a file.
pub(super) fn map_file(
    file: &impl AsFd,
    len: usize,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<Map> {
    map_file_at(file, 0, len, prot, flags)
}

pub(super) fn map_file_at(
    file: &impl AsFd,
    offset: usize,
    len: usize,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<Map> {
    let size = std::num::NonZeroUsize::new(len).context("empty")?;
    let offset = offset as i64;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let at = unsafe { nix::sys::mman::mmap(None, size, prot, flags, file.as_fd(), offset) }?;
    // SAFETY: just made.
    Ok(unsafe { Map::from_raw(at.cast(), len) })
}

/// Whether the kernel can read a page of ours.
pub(super) fn readable(addr: usize) -> bool {
    let mut byte = 0_u8;
    let here = [&raw mut byte as u64, 1];
    let there = [addr as u64, 1];
    let me = u64::from(std::process::id());
    let args = [me, here.as_ptr() as u64, 1, there.as_ptr() as u64, 1, 0];
    // SAFETY: a byte goes to a live local; bad addresses are errors.
    unsafe { sys::call(libc::SYS_process_vm_readv, args) }.is_ok()
}

/// The line of flags of the mapping at an address.
fn vm_flags(addr: usize) -> Result<String> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{addr:x}-");
    let rest = smaps.split_once(&start).context("no such mapping")?.1;
    let line = rest.lines().find(|l| l.starts_with("VmFlags:"));
    Ok(line.context("VmFlags")?.to_owned())
}

fn guard(_: &Stage) -> Result<Check> {
    const MADV_GUARD_INSTALL: i32 = 102;
    let mut map = Map::private(16 * PAGE)?;
    stamp(&mut map, 3, 1);
    stamp(&mut map, 6, 1);
    for (page, count) in [(4, 2), (10, 1)] {
        let at = (map.addr() + page * PAGE) as i64;
        let len = (count * PAGE) as i64;
        sys::numbers(libc::SYS_madvise, &[at, len, MADV_GUARD_INSTALL.into()])
            .map_err(|e| Unavailable::because(format!("MADV_GUARD_INSTALL: {e}")))?;
    }
    Ok(Box::new(move |f| {
        for page in 0..16 {
            let guarded = matches!(page, 4 | 5 | 10);
            let can = readable(map.addr() + page * PAGE);
            f.same(&format!("page {page} readable"), &!guarded, &can);
        }
        f.that("page 3", stamped(map.bytes(), 3, 1));
        f.that("page 6", stamped(map.bytes(), 6, 1));
        Ok(())
    }))
}

fn droppable(_: &Stage) -> Result<Check> {
    let args = [0, 4 * PAGE as i64, 3, 0x28, -1, 0];
    let at = sys::numbers(libc::SYS_mmap, &args)
        .map_err(|e| Unavailable::because(format!("MAP_DROPPABLE: {e}")))?;
    let at = std::ptr::NonNull::new(at as *mut u8).context("null")?;
    // SAFETY: just made.
    let mut map = unsafe { Map::from_raw(at, 4 * PAGE) };
    stamp(&mut map, 1, 1);
    Ok(Box::new(move |f| {
        // Dropped or not: both are right.
        let gone = map.bytes()[PAGE..2 * PAGE].iter().all(|&b| b == 0);
        f.that("page 1", gone || stamped(map.bytes(), 1, 1));
        stamp(&mut map, 1, 1);
        f.that("droppable", vm_flags(map.addr())?.contains(" dp"));
        Ok(())
    }))
}

fn lock_on_fault(_: &Stage) -> Result<Check> {
    let mut map = Map::private(16 * PAGE)?;
    let args = [map.addr() as i64, map.len() as i64, 1];
    sys::numbers(libc::SYS_mlock2, &args)?;
    stamp(&mut map, 5, 1);
    Ok(Box::new(move |f| {
        let there = resident(&map)?;
        let wanted: Vec<bool> = (0..16).map(|p| p == 5).collect();
        f.same("pages in RAM", &wanted, &there);
        f.that("content", stamped(map.bytes(), 5, 1));
        Ok(())
    }))
}

fn lock_future(flags: i32) -> Result<Check> {
    sys::numbers(libc::SYS_mlockall, &[flags.into()])?;
    Ok(Box::new(move |f| {
        let map = Map::private(8 * PAGE)?;
        let on_fault = flags & libc::MCL_ONFAULT != 0;
        let shown = vm_flags(map.addr())?;
        f.that(format!("locked: {shown}"), shown.contains(" lo"));
        f.same("as touched", &on_fault, &shown.contains(" lf"));
        f.same("in RAM", &vec![!on_fault; 8], &resident(&map)?);
        Ok(())
    }))
}

fn sealed(_: &Stage) -> Result<Check> {
    const SYS_MSEAL: i64 = 462;
    let mut map = Map::private(4 * PAGE)?;
    stamp(&mut map, 1, 1);
    let args = [map.addr() as i64, map.len() as i64, 0];
    sys::numbers(SYS_MSEAL, &args).map_err(|e| Unavailable::because(format!("mseal: {e}")))?;
    Ok(Box::new(move |f| {
        f.that("content", stamped(map.bytes(), 1, 1));
        let changed = map.protect(ProtFlags::PROT_READ);
        f.same("mprotect", &Err(nix::errno::Errno::EPERM), &changed);
        map.bytes_mut()[0] += 1;
        Ok(())
    }))
}

fn ksm(_: &Stage) -> Result<Check> {
    const PR_SET_MEMORY_MERGE: i32 = 67;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    let mut map = Map::private(4 * PAGE)?;
    map.advise(libc::MADV_MERGEABLE)
        .map_err(|e| Unavailable::because(format!("KSM: {e}")))?;
    stamp(&mut map, 1, 1);
    sys::prctl(PR_SET_MEMORY_MERGE, &[1, 0, 0, 0])
        .map_err(|e| Unavailable::because(format!("PR_SET_MEMORY_MERGE: {e}")))?;
    Ok(Box::new(move |f| {
        f.that("content", stamped(map.bytes(), 1, 1));
        let all = sys::prctl(PR_GET_MEMORY_MERGE, &[0, 0, 0, 0])?;
        f.same("merges all", &1, &all);
        let later = Map::private(PAGE)?;
        f.that("mappings to come", vm_flags(later.addr())?.contains(" mg"));
        Ok(())
    }))
}

fn secret(stage: &Stage) -> Result<Check> {
    const SYS_MEMFD_SECRET: i64 = 447;
    let fd = sys::numbers(SYS_MEMFD_SECRET, &[0])
        .map_err(|e| Unavailable::because(format!("memfd_secret: {e}")))?;
    // SAFETY: just given to us.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    file.set_len(2 * PAGE as u64)?;
    let mut map = map_file(&file, 2 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    drop(file);
    stamp(&mut map, 1, 1);
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        format!("mapping {:x}-", map.addr()),
        "secret memory".to_owned(),
    ])?;
    Ok(Box::new(move |f| {
        f.that("content", stamped(map.bytes(), 1, 1));
        Ok(())
    }))
}

fn sparse(_: &Stage) -> Result<Check> {
    const PAGES: usize = (8 << 30) / PAGE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let mut map = Map::anonymous(PAGES * PAGE, rw(), flags)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    let used = [0, 77_777, 1_000_000, PAGES - 1];
    for p in used {
        stamp(&mut map, p, 3);
    }
    Ok(Box::new(move |f| {
        for p in used {
            f.that(format!("page {p}"), stamped(map.bytes(), p, 3));
        }
        let there = resident(&map)?.iter().filter(|r| **r).count();
        f.same("pages in RAM", &used.len(), &there);
        Ok(())
    }))
}

fn zeros(_: &Stage) -> Result<Check> {
    const PAGES: usize = 4096;
    let mut map = Map::private(PAGES * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    let sum: u64 = (0..PAGES).map(|p| u64::from(map.bytes()[p * PAGE])).sum();
    ensure!(sum == 0);
    stamp(&mut map, 9, 1);
    // Only what was written to is memory of ours.
    let anonymous = move |map: &Map| -> Result<usize> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let rest = smaps.split_once(&format!("{:x}-", map.addr()));
        let rest = rest.context("no such mapping")?.1;
        let line = rest.lines().find(|l| l.starts_with("Anonymous:"));
        let kib = line.and_then(|l| l.split_ascii_whitespace().nth(1));
        Ok(kib.context("Anonymous")?.parse::<usize>()? * 1024 / PAGE)
    };
    Ok(Box::new(move |f| {
        f.same("pages of its own", &1, &anonymous(&map)?);
        f.that("page 9", stamped(map.bytes(), 9, 1));
        let rest = (10..PAGES).all(|p| map.bytes()[p * PAGE] == 0);
        f.that("zeros", rest);
        Ok(())
    }))
}

fn many(_: &Stage) -> Result<Check> {
    const COUNT: usize = 12_000;
    let mut map = Map::private(COUNT * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    for p in (0..COUNT).step_by(3) {
        stamp(&mut map, p, 4);
    }
    for p in (0..COUNT).step_by(2) {
        let at = (map.addr() + p * PAGE) as i64;
        sys::numbers(
            libc::SYS_mprotect,
            &[at, PAGE as i64, libc::PROT_READ.into()],
        )?;
    }
    Ok(Box::new(move |f| {
        let bad = (0..COUNT).filter(|&p| match p % 3 {
            0 => !stamped(map.bytes(), p, 4),
            _ => map.bytes()[p * PAGE] != 0,
        });
        f.same("pages with other content", &0, &bad.count());
        let maps = fs::read_to_string("/proc/self/maps")?;
        let count = maps.lines().count();
        f.that(format!("{count} mappings"), count >= COUNT);
        Ok(())
    }))
}

/// How many pages of a mapping lie in swap.
fn in_swap(map: &Map) -> Result<usize> {
    const SWAPPED: u64 = 1 << 62;
    let mut bytes = vec![0; map.len() / PAGE * 8];
    let at = (map.addr() / PAGE * 8) as u64;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, at)?;
    let swapped = |c: &&[u8]| u64::from_le_bytes((*c).try_into().expect("8 bytes")) & SWAPPED != 0;
    Ok(bytes.chunks_exact(8).filter(swapped).count())
}

fn swapped(_: &Stage) -> Result<Check> {
    const PAGES: usize = 2048;
    let mut map = Map::private(PAGES * PAGE)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    for p in 0..PAGES {
        stamp(&mut map, p, 8);
    }
    for _ in 0..10 {
        map.advise(libc::MADV_PAGEOUT)?;
    }
    if in_swap(&map)? < PAGES / 2 {
        return Err(Unavailable::because("the kernel does not swap on request"));
    }
    Ok(Box::new(move |f| {
        let bad = (0..PAGES).filter(|&p| !stamped(map.bytes(), p, 8)).count();
        f.same("pages with other content", &0, &bad);
        map.advise(libc::MADV_PAGEOUT)?;
        Ok(())
    }))
}

fn arguments(_: &Stage) -> Result<Check> {
    const PR_SET_MM: i32 = 35;
    const PR_SET_MM_MAP: i64 = 14;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let words: Vec<u64> = stat
        .rsplit_once(')')
        .context("stat")?
        .1
        .split_ascii_whitespace()
        .map(|w| w.parse().unwrap_or(0))
        .collect();
    let field = |n: usize| words[n - 3];
    let map: &'static mut Map = Box::leak(Box::new(Map::private(PAGE)?));
    map.bytes_mut()[..12].copy_from_slice(b"moved\0title\0");
    map.bytes_mut()[100..109].copy_from_slice(b"ENV=elsew");
    let at = map.addr() as u64;
    let brk = sys::numbers(libc::SYS_brk, &[0])? as u64;
    let figures: [u64; 13] = [
        field(26),
        field(27),
        field(45),
        field(46),
        field(47),
        brk,
        field(28),
        at,
        at + 12,
        at + 100,
        at + 109,
        0,
        0xffff_ffff << 32,
    ];
    let address = figures.as_ptr() as i64;
    sys::prctl(PR_SET_MM, &[PR_SET_MM_MAP, address, 104, 0])
        .map_err(|e| Unavailable::because(format!("PR_SET_MM_MAP: {e}")))?;
    Ok(Box::new(move |f| {
        let line = fs::read("/proc/self/cmdline")?;
        f.same("arguments", b"moved\0title\0".as_slice(), &line);
        let env = fs::read("/proc/self/environ")?;
        f.same("environment", b"ENV=elsew".as_slice(), &env);
        Ok(())
    }))
}

fn policies(_: &Stage) -> Result<Check> {
    const MPOL_PREFERRED: i64 = 1;
    const MPOL_BIND: i64 = 2;
    const MPOL_F_ADDR: i64 = 2;
    let mut map = Map::private(4 * PAGE)?;
    stamp(&mut map, 1, 1);
    let node_0 = 1_u64;
    let nodes = &raw const node_0 as i64;
    let (at, len) = (map.addr() as i64, map.len() as i64);
    sys::numbers(libc::SYS_mbind, &[at, len, MPOL_BIND, nodes, 65, 0])
        .map_err(|e| Unavailable::because(format!("mbind: {e}")))?;
    sys::numbers(libc::SYS_set_mempolicy, &[MPOL_PREFERRED, nodes, 65])?;
    let read = |address: i64, flags: i64| -> Result<(i32, u64)> {
        let (mut mode, mut nodes) = (0_i32, [0_u64; 16]);
        let to = (&raw mut mode as i64, nodes.as_mut_ptr() as i64);
        sys::numbers(libc::SYS_get_mempolicy, &[to.0, to.1, 1024, address, flags])?;
        Ok((mode, nodes[0]))
    };
    Ok(Box::new(move |f| {
        f.same("the mapping's", &(2, 1), &read(at, MPOL_F_ADDR)?);
        f.same("the thread's", &(1, 1), &read(0, 0)?);
        f.that("content", stamped(map.bytes(), 1, 1));
        Ok(())
    }))
}
