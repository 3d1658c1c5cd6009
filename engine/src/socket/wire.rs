//! Netlink messages, byte by byte.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use crate::file::sys;
use crate::sys::{SysError, SysResult};

// linux/netlink.h
pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;

/// Messages one behind the other, ready to be sent.
#[derive(Debug, Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    /// Where the lengths of the open message and of its open attributes stand.
    open: Vec<usize>,
}

impl Messages {
    /// Begins a message with its fixed part, and ends the one before.
    pub(super) fn message(&mut self, kind: u16, flags: u16, seq: u32, fixed: &[u8]) -> &mut Self {
        self.end_message();
        self.open.push(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes
            .extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&seq.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.put(fixed)
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
        self
    }

    /// An attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.put(value)
    }

    /// An attribute with a text, NUL included.
    pub(super) fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        self.attribute(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// An attribute with a number in network order.
    pub(super) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// An attribute made of attributes.
    pub(super) fn nested(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        const NLA_F_NESTED: u16 = 0x8000;
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes
            .extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        inner(self);
        let len = (self.bytes.len() - at) as u16;
        self.bytes[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    fn end_message(&mut self) {
        if let Some(at) = self.open.pop() {
            let len = (self.bytes.len() - at) as u32;
            self.bytes[at..at + 4].copy_from_slice(&len.to_ne_bytes());
        }
    }

    /// All of it.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.end_message();
        self.bytes
    }
}

/// First message: its type, its body, and what follows it.
pub(super) fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = word(bytes, 0)? as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(16..len)?;
    Some((
        kind,
        body,
        bytes.get(len.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

/// The attributes in `bytes`: numbers and values.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & 0x3fff, value))
    })
}

/// A word in the processor's order.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Sends a request and reads the answers until the kernel says that it is done
/// or acknowledges; an error among them ends it.
pub(super) fn converse(
    fd: BorrowedFd<'_>,
    what: &str,
    request: &[u8],
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<()> {
    let failed = |e| SysError::new("netlink", what, e);
    // Nothing but a bug keeps the kernel from answering.
    let patience = [5i64.to_ne_bytes(), 0i64.to_ne_bytes()].concat();
    sys::set_socket_option(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
    let room = (request.len() as i32).saturating_mul(2).max(1 << 16);
    sys::set_socket_option(
        fd,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        &room.to_ne_bytes(),
    )?;
    let sent = sys::send(fd, request)?;
    if sent != request.len() {
        return Err(failed(Errno::EMSGSIZE));
    }
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = sys::receive(fd.as_fd(), &mut buffer)?;
        let mut rest = &buffer[..n];
        while let Some((kind, body, tail)) = split(rest) {
            rest = tail;
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => match word(body, 0).unwrap_or(0) as i32 {
                    0 => return Ok(()),
                    code => return Err(failed(Errno::from_raw(-code))),
                },
                _ => each(body).ok_or_else(|| failed(Errno::EBADMSG))?,
            }
        }
    }
}
