//! What sock_diag(7) says about unix sockets.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::file::sys;
use crate::sys::{SysError, SysResult};

/// One unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct UnixInfo {
    /// `TCP_LISTEN` (10), `TCP_ESTABLISHED` (1) or `TCP_CLOSE` (7).
    pub state: u8,
    /// Inode of the peer; 0: gone, or not accepted yet.
    pub peer: Option<u32>,
    /// While listening: the backlog's limit.
    pub backlog: u32,
    /// While listening: who waits to be accepted, by inode.
    pub pending: Vec<u32>,
    /// Bit 1: reading, bit 2: writing was shut down.
    pub shutdown: u8,
}

// linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SHOW_PEER: u32 = 4;
const SHOW_ICONS: u32 = 8;
const SHOW_RQLEN: u32 = 16;
const DIAG_PEER: u16 = 2;
const DIAG_ICONS: u16 = 3;
const DIAG_RQLEN: u16 = 4;
const DIAG_SHUTDOWN: u16 = 6;

/// All unix sockets of our network namespace, by inode.
pub(super) fn unix_sockets() -> SysResult<HashMap<u32, UnixInfo>> {
    let fd = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    let mut request = Vec::with_capacity(40);
    request.extend_from_slice(&40u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    for word in [
        u32::MAX,
        0,
        SHOW_PEER | SHOW_ICONS | SHOW_RQLEN,
        u32::MAX,
        u32::MAX,
    ] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    let failed = |call, e| SysError::new(call, "unix socket diagnosis", e);
    send(fd.as_raw_fd(), &request, MsgFlags::empty()).map_err(|e| failed("send", e))?;
    collect(fd.as_fd())
}

fn collect(fd: BorrowedFd<'_>) -> SysResult<HashMap<u32, UnixInfo>> {
    let failed = |e| SysError::new("sock_diag", "unix sockets", e);
    let mut all = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(failed)?;
        let mut rest = &buffer[..n];
        while let Some((kind, body, tail)) = message(rest) {
            rest = tail;
            match kind {
                NLMSG_DONE => return Ok(all),
                NLMSG_ERROR => {
                    let code = word(body, 0).unwrap_or(0) as i32;
                    return Err(failed(Errno::from_raw(-code)));
                }
                _ => {
                    let (ino, info) = parse(body).ok_or_else(|| failed(Errno::EBADMSG))?;
                    all.insert(ino, info);
                }
            }
        }
    }
}

/// First message: its type, its body, and what follows it.
pub(super) fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = word(bytes, 0)? as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(16..len)?;
    Some((
        kind,
        body,
        bytes.get(len.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

/// A `struct unix_diag_msg` and its attributes.
pub(super) fn parse(body: &[u8]) -> Option<(u32, UnixInfo)> {
    let mut info = UnixInfo {
        state: *body.get(2)?,
        ..UnixInfo::default()
    };
    let ino = word(body, 4)?;
    let mut rest = body.get(16..)?;
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let value = rest.get(4..len)?;
        match kind {
            DIAG_PEER => info.peer = Some(word(value, 0)?),
            DIAG_ICONS => info.pending = value.chunks_exact(4).filter_map(|w| word(w, 0)).collect(),
            DIAG_RQLEN => info.backlog = word(value, 4)?,
            DIAG_SHUTDOWN => info.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((ino, info))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_pair_sees_each_other_and_a_listener_its_backlog() {
        let (a, b) = sys::socket_pair(libc::SOCK_STREAM).unwrap();
        let l = sys::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        sys::bind(l.as_fd(), &[1, 0]).unwrap();
        sys::listen(l.as_fd(), 33).unwrap();
        sys::shutdown(a.as_fd(), libc::SHUT_WR).unwrap();
        let ino = |fd: &std::os::fd::OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino as u32;
        let all = unix_sockets().unwrap();
        assert_eq!(all[&ino(&a)].peer, Some(ino(&b)));
        assert_eq!(all[&ino(&a)].shutdown, 2);
        assert_eq!((all[&ino(&l)].state, all[&ino(&l)].backlog), (10, 33));
    }

    proptest! {
        #[test]
        fn any_answer_is_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let mut rest = bytes.as_slice();
            while let Some((_, body, tail)) = message(rest) {
                let _ = parse(body);
                if tail.len() >= rest.len() { break; }
                rest = tail;
            }
            let _ = parse(&bytes);
        }
    }
}
