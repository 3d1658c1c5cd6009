//! Memory of huge pages: private, shared, memfd, System V.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags};

use super::memory::{stamp, stamped};
use crate::conformance::case::Unavailable;
use crate::conformance::sys::{self, Map, PAGE};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "hugetlb/private",
        "private anonymous huge pages (MAP_HUGETLB), some touched",
        private,
    )
    .with_huge_pages(24),
    Case::new(
        "hugetlb/shared",
        "shared anonymous huge pages of two processes",
        shared,
    )
    .with_huge_pages(24),
    Case::new(
        "hugetlb/memfd",
        "a memfd of huge pages (MFD_HUGETLB), mapped and open",
        memfd,
    )
    .with_huge_pages(24),
    Case::new(
        "hugetlb/memfd-private",
        "a private mapping of a memfd of huge pages, one page written",
        memfd_private,
    )
    .with_huge_pages(24),
    Case::new(
        "hugetlb/sysv",
        "a System V segment of huge pages (SHM_HUGETLB)",
        sysv,
    )
    .with_huge_pages(24),
];

const HUGE: usize = 2 << 20;

fn huge_map(pages: usize, flags: MapFlags) -> Result<Map> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = flags | MapFlags::MAP_HUGETLB;
    Map::anonymous(pages * HUGE, rw, flags)
        .map_err(|e| Unavailable::because(format!("huge pages: {e}")))
}

fn private(_: &Stage) -> Result<Check> {
    let mut map = huge_map(4, MapFlags::MAP_PRIVATE)?;
    stamp(&mut map, 1, 5);
    stamp(&mut map, 2 * HUGE / PAGE, 6);
    Ok(Box::new(move |f| {
        f.that("page 1", stamped(map.bytes(), 1, 5));
        let third = stamped(map.bytes(), 2 * HUGE / PAGE, 6);
        f.that("the third huge page", third);
        let rest = map.bytes()[2 * PAGE..2 * HUGE].iter().all(|&b| b == 0);
        f.that("zeros", rest);
        map.bytes_mut()[3 * HUGE] = 1;
        Ok(())
    }))
}

fn shared(_: &Stage) -> Result<Check> {
    let map: &'static Map = Box::leak(Box::new(huge_map(2, MapFlags::MAP_SHARED)?));
    map.word(HUGE / 8).store(7, Ordering::SeqCst);
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let turn = map.word(0).load(Ordering::SeqCst);
            map.word(1).store(turn + 100, Ordering::SeqCst);
            let seven = map.word(HUGE / 8).load(Ordering::SeqCst);
            f.same("a word of the second page", &7, &seven);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        let turn = map.word(0).fetch_add(1, Ordering::SeqCst) + 1;
        member.check(f)?;
        let word = map.word(1).load(Ordering::SeqCst);
        f.same("the other's word", &(turn + 100), &word);
        Ok(())
    }))
}

fn huge_memfd(pages: usize) -> Result<File> {
    let flags = u64::from(libc::MFD_HUGETLB | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    let name = c"huge";
    let args = [name.as_ptr() as u64, flags, 0, 0, 0, 0];
    // SAFETY: the name lives through the call.
    let fd = unsafe { sys::call(libc::SYS_memfd_create, args) }
        .map_err(|e| Unavailable::because(format!("MFD_HUGETLB: {e}")))?;
    // SAFETY: just given to us.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    file.set_len((pages * HUGE) as u64)?;
    Ok(file)
}

fn map_file(file: &File, pages: usize, flags: MapFlags) -> Result<Map> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len = std::num::NonZeroUsize::new(pages * HUGE).context("empty")?;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let at = unsafe { nix::sys::mman::mmap(None, len, rw, flags, file.as_fd(), 0) }?;
    // SAFETY: just made.
    Ok(unsafe { Map::from_raw(at.cast(), pages * HUGE) })
}

fn memfd(_: &Stage) -> Result<Check> {
    let file = huge_memfd(3)?;
    let mut map = map_file(&file, 3, MapFlags::MAP_SHARED)?;
    stamp(&mut map, HUGE / PAGE + 3, 9);
    let mut byte = 1;
    Ok(Box::new(move |f| {
        let second = stamped(map.bytes(), HUGE / PAGE + 3, 9);
        f.that("the second huge page", second);
        f.same("size", &(3 * HUGE as u64), &file.metadata()?.len());
        let again = map_file(&file, 3, MapFlags::MAP_SHARED)?;
        map.bytes_mut()[2 * HUGE] = byte;
        f.same("through another mapping", &byte, &again.bytes()[2 * HUGE]);
        byte += 1;
        Ok(())
    }))
}

fn memfd_private(_: &Stage) -> Result<Check> {
    let file = huge_memfd(2)?;
    let mut whole = map_file(&file, 2, MapFlags::MAP_SHARED)?;
    stamp(&mut whole, 0, 1);
    stamp(&mut whole, HUGE / PAGE, 2);
    drop(whole);
    let mut map = map_file(&file, 2, MapFlags::MAP_PRIVATE)?;
    stamp(&mut map, HUGE / PAGE, 3);
    Ok(Box::new(move |f| {
        f.that("the file's page", stamped(map.bytes(), 0, 1));
        f.that("its own page", stamped(map.bytes(), HUGE / PAGE, 3));
        let whole = map_file(&file, 2, MapFlags::MAP_SHARED)?;
        f.that("the file", stamped(whole.bytes(), HUGE / PAGE, 2));
        Ok(())
    }))
}

fn sysv(_: &Stage) -> Result<Check> {
    let flags = libc::IPC_CREAT | libc::SHM_HUGETLB | 0o600;
    let id = sys::numbers(
        libc::SYS_shmget,
        &[libc::IPC_PRIVATE.into(), 2 * HUGE as i64, flags.into()],
    )
    .map_err(|e| Unavailable::because(format!("SHM_HUGETLB: {e}")))?;
    let at = sys::numbers(libc::SYS_shmat, &[id, 0, 0]);
    // It goes with its last user.
    sys::numbers(libc::SYS_shmctl, &[id, libc::IPC_RMID.into(), 0])?;
    let at = NonNull::new(at? as *mut u8).context("null")?;
    // SAFETY: just attached, and nobody else's.
    let mut map = unsafe { Map::from_raw(at, 2 * HUGE) };
    stamp(&mut map, 700, 4);
    Ok(Box::new(move |f| {
        f.that("content", stamped(map.bytes(), 700, 4));
        map.bytes_mut()[0] += 1;
        Ok(())
    }))
}
