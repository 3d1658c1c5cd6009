//! Netlink conversations (netlink(7)): requests, dumps, batches, attributes.
//!
//! Messages are kept as the kernel wrote them: what it says of an object is,
//! with few exceptions, also how the object is asked for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::file::sys;
use crate::namespace::NamespaceError;

// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;
const NETLINK_CAP_ACK: i32 = 10;
const NETLINK_EXT_ACK: i32 = 11;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Type bits of an attribute without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const NLA_TYPE_MASK: u16 = 0x3fff;
pub(super) const NLA_F_NESTED: u16 = 0x8000;
/// How often a dump is taken anew because the tables changed under it.
const TRIES: usize = 20;

/// One message, without its `nlmsghdr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub body: Vec<u8>,
}

impl Message {
    /// Attributes after a family header of that many bytes.
    pub(super) fn attrs(&self, header: usize) -> Attrs<'_> {
        Attrs(self.body.get(header.next_multiple_of(4)..).unwrap_or(&[]))
    }
}

/// A netlink socket of the network namespace the calling thread is in.
#[derive(Debug)]
pub(super) struct Netlink {
    fd: OwnedFd,
    what: &'static str,
    sequence: u32,
}

impl Netlink {
    /// `NETLINK_ROUTE`.
    pub(super) fn route() -> Result<Self, NamespaceError> {
        Self::open(libc::NETLINK_ROUTE, "rtnetlink")
    }

    /// `NETLINK_NETFILTER`.
    pub(super) fn netfilter() -> Result<Self, NamespaceError> {
        Self::open(libc::NETLINK_NETFILTER, "nfnetlink")
    }

    /// Any protocol.
    pub(super) fn open(protocol: i32, what: &'static str) -> Result<Self, NamespaceError> {
        let failed = |e: crate::sys::SysError| NamespaceError::call(e.call, what)(e.errno);
        let fd = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol).map_err(failed)?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
            sys::set_socket_option(fd.as_fd(), libc::SOL_NETLINK, option, &1_i32.to_ne_bytes())
                .map_err(failed)?;
        }
        Ok(Self {
            fd,
            what,
            sequence: 0,
        })
    }

    /// All objects of a kind. `body` is the family's header.
    pub(super) fn dump(&mut self, kind: u16, body: &[u8]) -> Result<Vec<Message>, NamespaceError> {
        for _ in 0..TRIES {
            self.send(kind, NLM_F_DUMP, body, "list")?;
            let mut all = Vec::new();
            let mut torn = false;
            while !self.receive("list", |m| {
                torn |= m.flags & NLM_F_DUMP_INTR != 0;
                all.push(m);
            })? {}
            if !torn {
                return Ok(all);
            }
        }
        Err(self.failed("list", "it changes all the time", Errno::EINTR))
    }

    /// One object; `None` if there is none.
    pub(super) fn ask(
        &mut self,
        kind: u16,
        body: &[u8],
        what: &str,
    ) -> Result<Option<Message>, NamespaceError> {
        self.send(kind, NLM_F_ACK, body, what)?;
        let mut found = None;
        loop {
            match self.receive(what, |m| found = Some(m)) {
                Ok(false) => {}
                Ok(true) => return Ok(found),
                Err(e)
                    if e.errno()
                        .is_some_and(|e| matches!(e, libc::ENOENT | libc::ENODEV)) =>
                {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// A change, acknowledged.
    pub(super) fn change(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        what: &str,
    ) -> Result<(), NamespaceError> {
        self.send(kind, NLM_F_ACK | flags, body, what)?;
        while !self.receive(what, drop)? {}
        Ok(())
    }

    /// Many messages as one transaction, headers included; errors come at once.
    pub(super) fn batch(&mut self, bytes: &[u8], what: &str) -> Result<(), NamespaceError> {
        let room = i32::try_from(bytes.len() + (1 << 16)).unwrap_or(i32::MAX);
        for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            sys::set_socket_option(
                self.fd.as_fd(),
                libc::SOL_SOCKET,
                option,
                &room.to_ne_bytes(),
            )
            .map_err(|e| self.failed(what, "room for a batch", e.errno))?;
        }
        send(self.fd.as_raw_fd(), bytes, MsgFlags::empty())
            .map_err(|e| self.failed(what, "", e))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            // The kernel has worked it off before send(2) returns.
            let n = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(n) => n,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(e) => return Err(self.failed(what, "", e)),
            };
            for m in messages(&buffer[..n]) {
                let m = m.ok_or_else(|| self.failed(what, "torn answer", Errno::EBADMSG))?;
                if m.kind == NLMSG_ERROR {
                    self.verdict(&m, what)?;
                }
            }
        }
    }

    fn send(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        what: &str,
    ) -> Result<(), NamespaceError> {
        self.sequence += 1;
        let bytes = message(kind, NLM_F_REQUEST | flags, self.sequence, body);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())
            .map_err(|e| self.failed(what, "", e))?;
        Ok(())
    }

    /// One packet; whether it ended the answer.
    fn receive(&self, what: &str, mut each: impl FnMut(Message)) -> Result<bool, NamespaceError> {
        let mut buffer = vec![0; 1 << 17];
        let n = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .map_err(|e| self.failed(what, "", e))?;
        for m in messages(&buffer[..n]) {
            let m = m.ok_or_else(|| self.failed(what, "torn answer", Errno::EBADMSG))?;
            match m.kind {
                NLMSG_DONE => return Ok(true),
                NLMSG_ERROR => {
                    self.verdict(&m, what)?;
                    return Ok(true);
                }
                _ => each(m),
            }
        }
        Ok(false)
    }

    /// The outcome in a `struct nlmsgerr`, with the kernel's words if it has any.
    fn verdict(&self, m: &Message, what: &str) -> Result<(), NamespaceError> {
        let code = m.body.get(..4).map_or(libc::EBADMSG, |b| {
            -i32::from_ne_bytes(b.try_into().expect("4"))
        });
        if code == 0 {
            return Ok(());
        }
        let words = match m.flags & NLM_F_ACK_TLVS {
            0 => None,
            _ => m.attrs(4 + HEADER).find(|(k, _)| *k == NLMSGERR_ATTR_MSG),
        };
        let words = words.map_or(String::new(), |(_, v)| {
            String::from_utf8_lossy(v).trim_end_matches('\0').to_owned()
        });
        Err(self.failed(what, &words, Errno::from_raw(code)))
    }

    fn failed(&self, what: &str, words: &str, errno: Errno) -> NamespaceError {
        let colon = if words.is_empty() { "" } else { ": " };
        NamespaceError::Netlink {
            what: format!("{}: {what}{colon}{words}", self.what),
            source: io::Error::from(errno),
        }
    }
}

/// The bytes of one message.
pub(super) fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let len = HEADER + body.len();
    let mut out = Vec::with_capacity(len.next_multiple_of(4));
    out.extend_from_slice(&(len as u32).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(body);
    out.resize(len.next_multiple_of(4), 0);
    out
}

/// A row of messages; `None` where one is torn.
pub(super) fn messages(bytes: &[u8]) -> impl Iterator<Item = Option<Message>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let next = split_message(rest);
        match next {
            Some((m, len)) => {
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
                Some(Some(m))
            }
            None => {
                rest = &[];
                Some(None)
            }
        }
    })
}

fn split_message(bytes: &[u8]) -> Option<(Message, usize)> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let m = Message {
        kind: half(4)?,
        flags: half(6)?,
        body: bytes.get(HEADER..len)?.to_vec(),
    };
    Some((m, len))
}

/// Attributes one after another. What is torn ends the row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attrs<'a>(pub &'a [u8]);

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    }
}

impl<'a> Attrs<'a> {
    /// The value of one attribute.
    pub(super) fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(k, _)| *k == kind).map(|(_, v)| v)
    }

    /// A word in the machine's order.
    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(
            self.get(kind)?.get(..4)?.try_into().ok()?,
        ))
    }

    /// A string without its end.
    pub(super) fn string(self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// Attributes within one.
    pub(super) fn nested(self, kind: u16) -> Option<Attrs<'a>> {
        self.get(kind).map(Attrs)
    }
}

/// A body under construction.
#[derive(Debug, Clone, Default)]
pub(super) struct Body(pub Vec<u8>);

impl Body {
    /// Starts with a family's header.
    pub(super) fn new(header: &[u8]) -> Self {
        let mut bytes = header.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = (4 + value.len()) as u16;
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a word.
    pub(super) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a string.
    pub(super) fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds attributes within one.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Body)) -> &mut Self {
        let mut inner = Body::default();
        fill(&mut inner);
        self.attr(kind | NLA_F_NESTED, &inner.0)
    }

    /// Adds what another body had, except some kinds.
    pub(super) fn copy_except(&mut self, from: &[u8], except: &[u16]) -> &mut Self {
        let mut rest = Attrs(from);
        loop {
            let before = rest.0;
            let Some((kind, value)) = rest.next() else {
                return self;
            };
            if !except.contains(&kind) {
                let raw = u16::from_ne_bytes([before[2], before[3]]);
                self.attr(raw, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_torn(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for m in messages(&bytes).take(bytes.len() + 1).flatten() {
                let _ = m.attrs(4).count();
                let _ = m.attrs(16).nested(2).map(Iterator::count);
            }
        }

        #[test]
        fn what_is_built_is_read(kind in 0_u16..100, value in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut body = Body::new(&[1, 2, 3]);
            body.nest(7, |b| { b.attr(kind, &value).string(101, "x"); });
            let bytes = message(30, 4, 9, &body.0);
            let m = messages(&bytes).next().unwrap().unwrap();
            prop_assert_eq!(m.kind, 30);
            let inner = m.attrs(3).nested(7).unwrap();
            prop_assert_eq!(inner.get(kind).unwrap(), &value[..]);
            prop_assert_eq!(inner.string(101).unwrap(), "x");
        }
    }

    #[test]
    fn our_links_can_be_listed() {
        let mut nl = Netlink::route().unwrap();
        let links = nl.dump(18, &[0; 16]).unwrap();
        let names: Vec<_> = links.iter().filter_map(|m| m.attrs(16).string(3)).collect();
        assert!(names.contains(&"lo".to_owned()), "{names:?}");
    }
}
