//! Mappings and what stands behind them: memfds, files, devices, each other.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags};

use super::mappings::{map_file, map_file_at, readable, rw};
use super::memory::{stamp, stamped};
use crate::conformance::case::Unavailable;
use crate::conformance::sys::{self, Map, PAGE};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
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
];

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
