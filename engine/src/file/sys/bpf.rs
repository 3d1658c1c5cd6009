//! Raw calls of bpf(2) on maps.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{done, owned};
use crate::sys::SysResult;

const MAP_CREATE: i64 = 0;
const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_UPDATE_ELEM: i64 = 2;
const MAP_GET_NEXT_KEY: i64 = 4;
const MAP_GET_FD_BY_ID: i64 = 14;
const OBJ_GET_INFO_BY_FD: i64 = 15;
const MAP_FREEZE: i64 = 22;

/// Words of `union bpf_attr` that are passed.
type Attr = [u64; 9];
/// `BPF_OBJ_NAME_LEN`.
const NAME_BYTES: usize = 16;

/// What makes a map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BpfMap {
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
    pub extra: u64,
    pub name: String,
}

/// # Safety
/// Addresses in `attr` are valid for what the command does with them.
unsafe fn bpf(command: i64, attr: &mut Attr) -> i64 {
    // SAFETY: `attr` has the size given and lives across the call; the rest is
    // up to the caller.
    unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) }
}

/// A map's name, and whether types (BTF) come with it.
pub(crate) fn bpf_map_name(map: BorrowedFd<'_>) -> SysResult<(String, bool)> {
    // struct bpf_map_info: six words of 32 bits, the name, ..., btf_id at 64.
    let mut info = [0u8; 88];
    let mut attr: Attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64 | (info.len() as u64) << 32;
    attr[1] = info.as_mut_ptr() as u64;
    // SAFETY: the command fills at most the 88 bytes it is told of.
    let r = unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) };
    done("bpf(OBJ_GET_INFO_BY_FD)", map.as_raw_fd(), r)?;
    let name = info[24..24 + NAME_BYTES].split(|b| *b == 0).next();
    let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
    Ok((name, info[64..68] != [0; 4]))
}

/// Opens a map by its number, with `BPF_F_RDONLY`, `BPF_F_WRONLY` or neither.
pub(crate) fn bpf_map_by_id(id: u32, open_flags: u32) -> SysResult<OwnedFd> {
    let mut attr: Attr = [0; 9];
    attr[0] = id.into();
    attr[1] = open_flags.into();
    // SAFETY: numbers only.
    let r = unsafe { bpf(MAP_GET_FD_BY_ID, &mut attr) };
    owned("bpf(MAP_GET_FD_BY_ID)", format!("map {id}"), r)
}

/// Makes a map.
pub(crate) fn bpf_map_create(map: &BpfMap) -> SysResult<OwnedFd> {
    let mut bytes = [0u8; size_of::<Attr>()];
    let words = [
        map.kind,
        map.key_size,
        map.value_size,
        map.max_entries,
        map.flags,
    ];
    for (at, w) in bytes.chunks_exact_mut(4).zip(words) {
        at.copy_from_slice(&w.to_ne_bytes());
    }
    let name = map.name.as_bytes();
    let len = name.len().min(NAME_BYTES - 1);
    bytes[28..28 + len].copy_from_slice(&name[..len]);
    bytes[64..72].copy_from_slice(&map.extra.to_ne_bytes());
    let mut attr: Attr = [0; 9];
    for (w, b) in attr.iter_mut().zip(bytes.chunks_exact(8)) {
        *w = u64::from_ne_bytes(b.try_into().expect("8 bytes"));
    }
    // SAFETY: numbers and a name only.
    let r = unsafe { bpf(MAP_CREATE, &mut attr) };
    owned("bpf(MAP_CREATE)", &map.name, r)
}

/// The key after `key`, or the first; `None` at the end.
pub(crate) fn bpf_next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    key_size: usize,
) -> SysResult<Option<Vec<u8>>> {
    assert!(key.is_none_or(|k| k.len() == key_size), "a whole key");
    let mut next = vec![0; key_size];
    let mut attr: Attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    attr[1] = key.map_or(0, |k| k.as_ptr() as u64);
    attr[2] = next.as_mut_ptr() as u64;
    // SAFETY: both keys have the map's key size, as the caller says.
    let r = unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) };
    match done("bpf(MAP_GET_NEXT_KEY)", map.as_raw_fd(), r) {
        Ok(_) => Ok(Some(next)),
        Err(e) if e.errno == Errno::ENOENT => Ok(None),
        Err(e) => Err(e),
    }
}

/// The value of a key.
pub(crate) fn bpf_lookup(map: BorrowedFd<'_>, key: &[u8], value_size: usize) -> SysResult<Vec<u8>> {
    let mut value = vec![0; value_size];
    let mut attr: Attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    attr[1] = key.as_ptr() as u64;
    attr[2] = value.as_mut_ptr() as u64;
    // SAFETY: the key is a whole one; the value has the map's size, as the
    // caller says, for kinds that have one value for all processors.
    let r = unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) };
    done("bpf(MAP_LOOKUP_ELEM)", map.as_raw_fd(), r)?;
    Ok(value)
}

/// Sets the value of a key.
pub(crate) fn bpf_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> SysResult<()> {
    let mut attr: Attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    attr[1] = key.as_ptr() as u64;
    attr[2] = value.as_ptr() as u64;
    // SAFETY: key and value are whole ones, and only read.
    let r = unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) };
    done("bpf(MAP_UPDATE_ELEM)", map.as_raw_fd(), r).map(drop)
}

/// A program that gives what comes for a group of sockets to the first one of a
/// map (`BPF_PROG_TYPE_SK_REUSEPORT`).
pub(crate) fn bpf_selector(map: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    const PROG_LOAD: i64 = 5;
    const SK_REUSEPORT: u64 = 21;
    const SELECT_REUSEPORT: u64 = 82;
    const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";
    let op = |code: u64, dst: u64, src: u64, offset: i16, imm: u64| {
        code | dst << 8 | src << 12 | u64::from(offset as u16) << 16 | (imm & 0xffff_ffff) << 32
    };
    let code = [
        // A key of 0 below the frame pointer.
        op(0x62, 10, 0, -4, 0),
        // map, by its descriptor; key; flags; the context is there
        op(0x18, 2, 1, 0, map.as_raw_fd() as u64),
        0,
        op(0xbf, 3, 10, 0, 0),
        op(0x07, 3, 0, 0, (-4i64) as u64),
        op(0xb7, 4, 0, 0, 0),
        op(0x85, 0, 0, 0, SELECT_REUSEPORT),
        // SK_PASS
        op(0xb7, 0, 0, 0, 1),
        op(0x95, 0, 0, 0, 0),
    ];
    let mut attr: Attr = [0; 9];
    attr[0] = SK_REUSEPORT | (code.len() as u64) << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = LICENSE.as_ptr() as u64;
    // SAFETY: code and license live across the call and are only read.
    let r = unsafe { bpf(PROG_LOAD, &mut attr) };
    owned("bpf(PROG_LOAD)", "a selector of sockets", r)
}

/// From here on no system call changes the map.
pub(crate) fn bpf_freeze(map: BorrowedFd<'_>) -> SysResult<()> {
    let mut attr: Attr = [0; 9];
    attr[0] = map.as_raw_fd() as u64;
    // SAFETY: numbers only.
    let r = unsafe { bpf(MAP_FREEZE, &mut attr) };
    done("bpf(MAP_FREEZE)", map.as_raw_fd(), r).map(drop)
}
