//! BPF maps.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Result, ensure};

use super::refusals::expect;
use crate::conformance::case::Unavailable;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("files/bpf-hash", "a BPF hash table with entries", hash),
    Case::new(
        "files/bpf-array",
        "a frozen BPF array, and a descriptor that may only read it",
        array,
    ),
    Case::new("refusals/bpf-queue", "a BPF map of another type", queue).not_yet(),
];

const MAP_CREATE: u64 = 0;
const MAP_LOOKUP_ELEM: u64 = 1;
const MAP_UPDATE_ELEM: u64 = 2;
const MAP_GET_FD_BY_ID: u64 = 14;
const MAP_FREEZE: u64 = 22;
const HASH: u64 = 1;
const ARRAY: u64 = 2;
const QUEUE: u64 = 22;
const RDONLY: u64 = 1 << 3;

fn bpf(command: u64, attr: &mut [u64; 9]) -> std::io::Result<i64> {
    let args = [command, attr.as_mut_ptr() as u64, 72, 0, 0, 0];
    // SAFETY: the attributes are 72 bytes and, like what they point to, outlive the call.
    unsafe { sys::call(libc::SYS_bpf, args) }
}

fn create(kind: u64, key: u64, name: [u8; 4]) -> Result<OwnedFd> {
    let mut attr = [0; 9];
    attr[0] = kind | key << 32;
    // Values of 8 bytes, 64 of them.
    attr[1] = 8 | 64 << 32;
    // The name begins at byte 28.
    attr[3] = u64::from(u32::from_ne_bytes(name)) << 32;
    let fd = bpf(MAP_CREATE, &mut attr)
        .map_err(|e| Unavailable::because(format!("bpf(MAP_CREATE): {e}")))?;
    // SAFETY: the kernel has just returned it; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn set(map: &OwnedFd, key: u32, value: u64) -> std::io::Result<i64> {
    let mut attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    attr[1] = &raw const key as u64;
    attr[2] = &raw const value as u64;
    bpf(MAP_UPDATE_ELEM, &mut attr)
}

fn get(map: &OwnedFd, key: u32) -> Option<u64> {
    let mut value = 0_u64;
    let mut attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    attr[1] = &raw const key as u64;
    attr[2] = &raw mut value as u64;
    bpf(MAP_LOOKUP_ELEM, &mut attr).ok().map(|_| value)
}

fn hash(_: &Stage) -> Result<Check> {
    let map = create(HASH, 4, *b"hash")?;
    let twin = nix::unistd::dup(&map)?;
    for key in 0..50 {
        set(&map, key * 1000, u64::from(key) << 40)?;
    }
    Ok(Box::new(move |f| {
        for key in 0..50 {
            let want = Some(u64::from(key) << 40);
            f.same(&format!("entry {key}"), &want, &get(&map, key * 1000));
        }
        f.same("no other", &None, &get(&map, 7));
        f.that("a new one", set(&twin, 7, 77).is_ok());
        f.same("by the other descriptor", &Some(77), &get(&map, 7));
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
        f.that("room for 64", text.contains("max_entries:\t64\n"));
        let mut attr = [0; 9];
        let key = 7_u32;
        attr[0] = map.as_raw_fd() as u64;
        attr[1] = &raw const key as u64;
        // BPF_MAP_DELETE_ELEM
        bpf(3, &mut attr)?;
        Ok(())
    }))
}

fn array(_: &Stage) -> Result<Check> {
    let map = create(ARRAY, 4, *b"arry")?;
    for key in 0..64 {
        set(&map, key, u64::from(key * key))?;
    }
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
    let id = text.lines().find_map(|l| l.strip_prefix("map_id:\t"));
    let mut attr = [0; 9];
    attr[0] = id.unwrap_or_default().trim().parse()?;
    attr[1] = RDONLY;
    let reader = bpf(MAP_GET_FD_BY_ID, &mut attr)?;
    // SAFETY: the kernel has just returned it; nobody else has it.
    let reader = unsafe { OwnedFd::from_raw_fd(reader as i32) };
    let mut attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    bpf(MAP_FREEZE, &mut attr)?;
    ensure!(set(&map, 1, 0).is_err(), "it is frozen");
    Ok(Box::new(move |f| {
        for key in [0, 1, 17, 63] {
            let want = Some(u64::from(key * key));
            f.same(&format!("entry {key}"), &want, &get(&map, key));
            f.same(&format!("read {key}"), &want, &get(&reader, key));
        }
        f.that("it is frozen", set(&map, 1, 0).is_err());
        f.that("the reader only reads", set(&reader, 1, 0).is_err());
        Ok(())
    }))
}

fn queue(stage: &Stage) -> Result<Check> {
    let map = create(QUEUE, 0, *b"line")?;
    expect(stage, &map, "it is of type 22")?;
    Ok(Box::new(move |f| {
        f.that("it is still open", map.try_clone().is_ok());
        Ok(())
    }))
}
