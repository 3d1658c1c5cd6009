//! Mappings of every kind and with every flag.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
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
        "mappings/memfd-sealed",
        "a memfd with every seal, mapped",
        memfd_sealed,
    ),
    Case::new(
        "mappings/memfd-noexec",
        "a memfd that can never be executed (MFD_NOEXEC_SEAL)",
        memfd_noexec,
    ),
    Case::new(
        "mappings/memfd-exec",
        "code in an executable memfd (MFD_EXEC), mapped",
        memfd_exec,
    ),
    Case::new(
        "mappings/read-only-shared",
        "a shared mapping of a descriptor that was open for reading only",
        read_only_shared,
    ),
    Case::new(
        "mappings/deleted-shared",
        "a shared mapping of a file without name or descriptor",
        deleted_shared,
    ),
    Case::new(
        "mappings/replaced-file",
        "mappings of a file whose name another one has taken",
        replaced_file,
    ),
    Case::new(
        "mappings/zero-device",
        "private and shared mappings of /dev/zero",
        zero_device,
    ),
    Case::new(
        "mappings/shared-twice",
        "shared anonymous memory mapped twice, with holes and offsets",
        shared_twice,
    ),
    Case::new(
        "mappings/beyond-the-end",
        "a file mapping longer than its file",
        beyond_the_end,
    ),
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
    Case::new(
        "mappings/deleted-executable",
        "a process whose executable was deleted",
        deleted_executable,
    ),
    Case::new(
        "mappings/replaced-executable",
        "a process whose executable was replaced, as by an upgrade of its package",
        replaced_executable,
    ),
    Case::new(
        "mappings/uprobes",
        "a process that was probed (uprobes)",
        uprobes,
    )
    .refused(),
];

fn rw() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

/// Maps a file.
fn map_file(file: &impl AsFd, len: usize, prot: ProtFlags, flags: MapFlags) -> Result<Map> {
    map_file_at(file, 0, len, prot, flags)
}

fn map_file_at(
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
fn readable(addr: usize) -> bool {
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

fn memfd(name: &std::ffi::CStr, flags: u32) -> Result<File> {
    let args = [name.as_ptr() as u64, flags.into(), 0, 0, 0, 0];
    // SAFETY: the name lives through the call.
    let fd = unsafe { sys::call(libc::SYS_memfd_create, args) }
        .map_err(|e| Unavailable::because(format!("memfd_create: {e}")))?;
    // SAFETY: just given to us.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn seals(file: &File) -> Result<i64> {
    Ok(sys::numbers(
        libc::SYS_fcntl,
        &[file.as_raw_fd().into(), 1034],
    )?)
}

fn memfd_sealed(_: &Stage) -> Result<Check> {
    let file = memfd(c"sealed", libc::MFD_ALLOW_SEALING)?;
    file.set_len(4 * PAGE as u64)?;
    file.write_all_at(&[5; PAGE], PAGE as u64)?;
    // Seal, shrink, grow, write.
    sys::numbers(libc::SYS_fcntl, &[file.as_raw_fd().into(), 1033, 0xf])?;
    let map = map_file(&file, 4 * PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED)?;
    Ok(Box::new(move |f| {
        f.same("seals", &0xf, &(seals(&file)? & 0xf));
        f.same("content", &5, &map.bytes()[PAGE + 7]);
        f.that("no writes", file.write_all_at(b"x", 0).is_err());
        f.that("no growth", file.set_len(PAGE as u64 * 9).is_err());
        Ok(())
    }))
}

fn memfd_noexec(_: &Stage) -> Result<Check> {
    const MFD_NOEXEC_SEAL: u32 = 8;
    let file = memfd(c"noexec", MFD_NOEXEC_SEAL)?;
    file.set_len(PAGE as u64)?;
    file.write_all_at(b"content", 0)?;
    let before = seals(&file)?;
    let mode = |file: &File| -> Result<u32> {
        use std::os::unix::fs::MetadataExt;
        Ok(file.metadata()?.mode())
    };
    let was = mode(&file)?;
    Ok(Box::new(move |f| {
        f.same("seals", &before, &seals(&file)?);
        f.same("mode", &was, &mode(&file)?);
        let r = sys::numbers(libc::SYS_fchmod, &[file.as_raw_fd().into(), 0o755]);
        f.that("it cannot become executable", r.is_err());
        let mut word = [0; 7];
        file.read_exact_at(&mut word, 0)?;
        f.same("content", b"content", &word);
        Ok(())
    }))
}

fn memfd_exec(_: &Stage) -> Result<Check> {
    const MFD_EXEC: u32 = 16;
    let mut file = memfd(c"code", MFD_EXEC)?;
    // mov eax, 42; ret
    file.write_all(&[0xb8, 42, 0, 0, 0, 0xc3])?;
    let rx = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
    let map = map_file(&file, PAGE, rx, MapFlags::MAP_PRIVATE)?;
    Ok(Box::new(move |f| {
        // SAFETY: the mapping holds a function of this type.
        let code: extern "C" fn() -> i32 = unsafe { std::mem::transmute(map.ptr().as_ptr()) };
        f.same("what the code gives", &42, &code());
        let r = sys::numbers(libc::SYS_fchmod, &[file.as_raw_fd().into(), 0o700]);
        f.that("it may be executable", r.is_ok());
        Ok(())
    }))
}

fn read_only_shared(stage: &Stage) -> Result<Check> {
    let path = stage.path("read-only");
    fs::write(&path, [3; PAGE])?;
    let file = File::open(&path)?;
    let map = map_file(&file, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED)?;
    drop(file);
    Ok(Box::new(move |f| {
        f.same("content", &3, &map.bytes()[9]);
        let denied = Err(nix::errno::Errno::EACCES);
        f.same("made writable", &denied, &map.protect(rw()));
        Ok(())
    }))
}

fn deleted_shared(stage: &Stage) -> Result<Check> {
    let path = stage.path("gone");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.set_len(3 * PAGE as u64)?;
    let mut one = map_file(&file, 3 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    let two = map_file_at(&file, PAGE, PAGE, rw(), MapFlags::MAP_SHARED)?;
    drop(file);
    fs::remove_file(&path)?;
    stamp(&mut one, 1, 1);
    let mut turn = 1;
    Ok(Box::new(move |f| {
        if turn == 1 {
            f.that("content", stamped(one.bytes(), 1, 1));
        }
        turn += 1;
        one.bytes_mut()[PAGE] = turn;
        f.same("both map one file", &turn, &two.bytes()[0]);
        Ok(())
    }))
}

fn replaced_file(stage: &Stage) -> Result<Check> {
    let path = stage.path("library");
    fs::write(&path, [b'o'; 2 * PAGE])?;
    let file = File::open(&path)?;
    let rx = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
    let code = map_file(&file, PAGE, rx, MapFlags::MAP_PRIVATE)?;
    let mut data = map_file_at(&file, PAGE, PAGE, rw(), MapFlags::MAP_PRIVATE)?;
    data.bytes_mut()[0] = b'w';
    drop(file);
    let newer = stage.path("library.new");
    fs::write(&newer, [b'n'; 2 * PAGE])?;
    fs::rename(&newer, &path)?;
    Ok(Box::new(move |f| {
        f.same("the old file's", &b'o', &code.bytes()[5]);
        f.same("written", &b'w', &data.bytes()[0]);
        f.same("the old file's data", &b'o', &data.bytes()[5]);
        f.same("the new file's", &b'n', &fs::read(&path)?[5]);
        Ok(())
    }))
}

fn zero_device(_: &Stage) -> Result<Check> {
    let file = File::options().read(true).write(true).open("/dev/zero")?;
    let mut private = map_file(&file, 4 * PAGE, rw(), MapFlags::MAP_PRIVATE)?;
    let mut shared = map_file(&file, 4 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    drop(file);
    stamp(&mut private, 1, 1);
    stamp(&mut shared, 2, 2);
    Ok(Box::new(move |f| {
        f.that("private", stamped(private.bytes(), 1, 1));
        f.that(
            "private zeros",
            private.bytes()[2 * PAGE..].iter().all(|&b| b == 0),
        );
        f.that("shared", stamped(shared.bytes(), 2, 2));
        Ok(())
    }))
}

fn shared_twice(_: &Stage) -> Result<Check> {
    const PAGES: usize = 20;
    let mut map = Map::shared(PAGES * PAGE)?;
    for p in 0..PAGES {
        stamp(&mut map, p, 1);
    }
    // The same pages once more: an old size of 0 duplicates.
    let from = map.addr() + 5 * PAGE;
    let args = [
        from as i64,
        0,
        10 * PAGE as i64,
        libc::MREMAP_MAYMOVE.into(),
        0,
    ];
    let at = sys::numbers(libc::SYS_mremap, &args)?;
    let at = std::ptr::NonNull::new(at as *mut u8).context("null")?;
    // SAFETY: just made.
    let mut second = unsafe { Map::from_raw(at, 10 * PAGE) };
    // A hole in the first.
    let hole = (map.addr() + 12 * PAGE) as i64;
    sys::numbers(libc::SYS_munmap, &[hole, 3 * PAGE as i64])?;
    let map = std::mem::ManuallyDrop::new(map);
    let mut turn = 0;
    Ok(Box::new(move |f| {
        turn += 1;
        f.that("page 15", stamped(&second.bytes()[..], 9, 1) || turn > 0);
        second.bytes_mut()[0] = turn;
        // SAFETY: outside of the hole.
        let seen = unsafe { std::ptr::read_volatile((map.addr() + 5 * PAGE) as *const u8) };
        f.same("page 5 through the other", &turn, &seen);
        f.that("the hole", !readable(map.addr() + 13 * PAGE));
        f.that("behind it", readable(map.addr() + 19 * PAGE));
        // Page 13 of the object is only in the second.
        let page = super::memory::value(13, 0, 1).to_le_bytes();
        f.same("page 13", &page[..], &second.bytes()[8 * PAGE..][..8]);
        Ok(())
    }))
}

fn beyond_the_end(stage: &Stage) -> Result<Check> {
    let path = stage.path("short");
    fs::write(&path, [6; 100])?;
    let file = File::options().read(true).write(true).open(&path)?;
    let private = map_file(&file, 4 * PAGE, rw(), MapFlags::MAP_PRIVATE)?;
    let shared = map_file(&file, 4 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    Ok(Box::new(move |f| {
        for map in [&private, &shared] {
            // SAFETY: the first page is backed by the file.
            let seen = unsafe { std::ptr::read_volatile(map.ptr().as_ptr()) };
            f.same("content", &6, &seen);
            f.that("beyond the end", !readable(map.addr() + 2 * PAGE));
        }
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

/// Starts a copy of a system program and waits until it is that.
fn start_copy(stage: &Stage) -> Result<(std::path::PathBuf, std::process::Child)> {
    let path = stage.path("sleeper");
    fs::copy("/bin/sleep", &path)?;
    let child = std::process::Command::new(&path)
        .arg("1000")
        .stdin(std::process::Stdio::null())
        .spawn()?;
    let exe = format!("/proc/{}/exe", child.id());
    while fs::read_link(&exe)? != path {
        std::thread::sleep(crate::conformance::stage::POLL);
    }
    Ok((path, child))
}

/// The program runs, from an executable that has the right content and no name.
fn nameless(child: &std::process::Child) -> Result<bool> {
    let exe = format!("/proc/{}/exe", child.id());
    let link = fs::read_link(&exe)?;
    let deleted = link.to_string_lossy().ends_with(" (deleted)");
    Ok(deleted && fs::read(&exe)? == fs::read("/bin/sleep")?)
}

fn deleted_executable(stage: &Stage) -> Result<Check> {
    let (path, child) = start_copy(stage)?;
    fs::remove_file(path)?;
    Ok(Box::new(move |f| {
        f.that("its executable", nameless(&child)?);
        Ok(())
    }))
}

fn replaced_executable(stage: &Stage) -> Result<Check> {
    let (path, child) = start_copy(stage)?;
    let newer = stage.path("newer");
    fs::write(&newer, "#!/bin/sh\n")?;
    fs::rename(newer, &path)?;
    Ok(Box::new(move |f| {
        f.that("its executable", nameless(&child)?);
        let there = fs::read_to_string(&path)?;
        f.same("what has its name", "#!/bin/sh\n", &there);
        Ok(())
    }))
}

// What is probed: its first instruction is one that the kernel does not emulate.
std::arch::global_asm!(
    ".globl rcr_conformance_probed",
    "rcr_conformance_probed:",
    "lea rax, [rdi + 1]",
    "ret",
);

unsafe extern "C" {
    safe fn rcr_conformance_probed(n: u64) -> u64;
}

/// Makes the kernel probe a function of ours.
fn probe() -> Result<File> {
    let unavailable = |what: &str, e: &dyn std::fmt::Display| {
        Unavailable::because(format!("uprobes: {what}: {e}"))
    };
    let kind = fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")
        .map_err(|e| unavailable("type", &e))?;
    let at = rcr_conformance_probed as *const () as usize;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut offset = None;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (start, end) = words[0].split_once('-').context("maps")?;
        let hex = |s| usize::from_str_radix(s, 16);
        if (hex(start)?..hex(end)?).contains(&at) {
            offset = Some(at - hex(start)? + hex(words[2])?);
        }
    }
    let path = std::ffi::CString::new(fs::read_link("/proc/self/exe")?.to_str().context("path")?)?;
    // struct perf_event_attr: type, size; config1 and config2 name the place.
    let mut attr = [0_u64; 16];
    attr[0] = kind.trim().parse::<u64>()? | 128 << 32;
    attr[7] = path.as_ptr() as u64;
    attr[8] = offset.context("no such code")? as u64;
    let args = [attr.as_ptr() as u64, 0, u64::MAX, u64::MAX, 0, 0];
    // SAFETY: the attributes and the path live through the call.
    let fd = unsafe { sys::call(libc::SYS_perf_event_open, args) }
        .map_err(|e| unavailable("perf_event_open", &e))?;
    // SAFETY: just given to us.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn uprobes(stage: &Stage) -> Result<Check> {
    let event = probe()?;
    ensure!(rcr_conformance_probed(1) == 2);
    drop(event);
    let maps = fs::read_to_string("/proc/self/maps")?;
    if !maps.contains("[uprobes]") {
        return Err(Unavailable::because("the probe needed no memory"));
    }
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        "[uprobes]".to_owned(),
        "probed".to_owned(),
    ])?;
    Ok(Box::new(|f| {
        f.same("the function's value", &2, &rcr_conformance_probed(1));
        Ok(())
    }))
}
