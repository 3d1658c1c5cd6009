//! What comes for a group of sockets that share a port goes to one of them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::file::sys::{self, BpfMap};
use crate::sys::SysResult;

/// `BPF_MAP_TYPE_REUSEPORT_SOCKARRAY`, linux/bpf.h.
const SOCKETS: u32 = 20;
// asm-generic/socket.h
const SO_ATTACH_REUSEPORT_EBPF: i32 = 52;
const SO_DETACH_REUSEPORT_BPF: i32 = 68;

/// As long as this value lives the socket gets all.
#[derive(Debug)]
pub(super) struct Steered<'a>(BorrowedFd<'a>);

/// Sends all to a socket that is bound with SO_REUSEPORT.
pub(super) fn to(fd: BorrowedFd<'_>) -> SysResult<Steered<'_>> {
    let map = sys::bpf_map_create(&BpfMap {
        kind: SOCKETS,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        name: "rcr_one".into(),
        ..BpfMap::default()
    })?;
    let number = fd.as_raw_fd() as u64;
    sys::bpf_update(map.as_fd(), &[0; 4], &number.to_ne_bytes())?;
    let program = sys::bpf_selector(map.as_fd())?;
    let number = program.as_raw_fd().to_ne_bytes();
    sys::set_socket_option(fd, libc::SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, &number)?;
    Ok(Steered(fd))
}

impl Drop for Steered<'_> {
    fn drop(&mut self) {
        let none = 0i32.to_ne_bytes();
        let done = sys::set_socket_option(self.0, libc::SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, &none);
        if let Err(e) = done {
            tracing::error!("a port that sockets share still leads to one of them: {e}");
        }
    }
}
