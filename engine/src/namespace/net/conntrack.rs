//! Tracked connections and expected ones (ctnetlink), as `netns-ct-ID.img` and
//! `netns-exp-ID.img` hold them.

use super::netlink::{Attrs, Body, Message, NLM_F_CREATE, NLM_F_EXCL, Netlink};
use crate::namespace::NamespaceError;

// linux/netfilter/nfnetlink_conntrack.h
const CT_NEW: u16 = 1 << 8;
const CT_GET: u16 = 1 << 8 | 1;
const EXP_NEW: u16 = 2 << 8;
const EXP_GET: u16 = 2 << 8 | 1;
/// `sizeof(struct nfgenmsg)`
const HEAD: usize = 4;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const NAT_SRC: u16 = 6;
const COUNTERS_ORIG: u16 = 9;
const COUNTERS_REPLY: u16 = 10;
const USE: u16 = 11;
const ID: u16 = 12;
const NAT_DST: u16 = 13;
const TIMESTAMP: u16 = 20;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// `IPS_EXPECTED`
const EXPECTED: u32 = 1;
/// `IPS_SRC_NAT | IPS_DST_NAT`
const TRANSLATED: u32 = 0x10 | 0x20;

/// What is tracked in the namespace the calling thread is in: connections, and
/// expected ones.
pub(super) fn list(nl: &mut Netlink) -> Result<(Vec<Message>, Vec<Message>), NamespaceError> {
    let mut dump = |kind| match nl.dump(kind, &[0; HEAD]) {
        // A kernel without it, or with the module not loaded.
        Err(e)
            if matches!(
                e.errno(),
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT)
            ) =>
        {
            Ok(Vec::new())
        }
        other => other,
    };
    Ok((dump(CT_GET)?, dump(EXP_GET)?))
}

/// Tracks them again.
pub(super) fn restore(
    nl: &mut Netlink,
    connections: &[Message],
    expected: &[Message],
) -> Result<(), NamespaceError> {
    const TUPLE_MASTER: u16 = 14;
    let has_master = |m: &&Message| m.attrs(HEAD).get(TUPLE_MASTER).is_some();
    // One that was expected names the connection that expected it.
    let first = connections.iter().filter(|m| !has_master(m));
    for m in first.chain(connections.iter().filter(has_master)) {
        let body = connection(m);
        match nl.change(
            CT_NEW,
            NLM_F_CREATE | NLM_F_EXCL,
            &body,
            "track a connection",
        ) {
            // A packet of ours may have been faster.
            Err(e) if e.errno() == Some(libc::EEXIST) => {}
            other => other?,
        }
    }
    for m in expected {
        const EXP_ID: u16 = 5;
        let mut body = head(m);
        body.copy_except(m.body.get(HEAD..).unwrap_or(&[]), &[EXP_ID]);
        nl.change(
            EXP_NEW,
            NLM_F_CREATE | NLM_F_EXCL,
            &body.0,
            "expect a connection",
        )?;
    }
    Ok(())
}

fn head(m: &Message) -> Body {
    Body::new(&[m.body.first().copied().unwrap_or(0), 0, 0, 0])
}

pub(super) fn connection(m: &Message) -> Vec<u8> {
    let rest = m.body.get(HEAD..).unwrap_or(&[]);
    let attrs = Attrs(rest);
    let status = attrs.get(STATUS).and_then(|v| v.get(..4));
    let status = status.map_or(0, |b| u32::from_be_bytes(b.try_into().expect("4")));
    let mut except = vec![STATUS, COUNTERS_ORIG, COUNTERS_REPLY, USE, ID, TIMESTAMP];
    let orig = attrs.nested(TUPLE_ORIG).and_then(Tuple::read);
    let reply = attrs.nested(TUPLE_REPLY).and_then(Tuple::read);
    let translated = orig
        .zip(reply)
        .filter(|(o, _)| status & TRANSLATED != 0 && o.from.port.is_some());
    if translated.is_some() {
        except.push(TUPLE_REPLY);
    }
    let mut body = head(m);
    body.copy_except(rest, &except);
    body.attr(STATUS, &(status & !EXPECTED).to_be_bytes());
    if let Some((orig, reply)) = translated {
        // The kernel works the answer's tuple out from what is translated to what.
        body.nest(TUPLE_REPLY, |b| orig.turned().write(b));
        if reply.to != orig.from {
            body.nest(NAT_SRC, |b| reply.to.write(b));
        }
        if reply.from != orig.to {
            body.nest(NAT_DST, |b| reply.from.write(b));
        }
    }
    body.0
}

/// One end of a connection: address, and port if the protocol has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End<'a> {
    address: &'a [u8],
    port: Option<&'a [u8]>,
}

impl End<'_> {
    /// As a range of one address and port.
    fn write(&self, b: &mut Body) {
        const V4_MIN: u16 = 1;
        const V4_MAX: u16 = 2;
        const PROTO: u16 = 3;
        const V6_MIN: u16 = 4;
        const V6_MAX: u16 = 5;
        let (min, max) = match self.address.len() {
            4 => (V4_MIN, V4_MAX),
            _ => (V6_MIN, V6_MAX),
        };
        b.attr(min, self.address).attr(max, self.address);
        if let Some(port) = self.port {
            b.nest(PROTO, |p| {
                p.attr(1, port).attr(2, port);
            });
        }
    }
}

/// Who sends to whom.
#[derive(Debug, Clone, Copy)]
struct Tuple<'a> {
    from: End<'a>,
    to: End<'a>,
    proto: Attrs<'a>,
}

impl<'a> Tuple<'a> {
    fn read(t: Attrs<'a>) -> Option<Self> {
        const SRC_PORT: u16 = 2;
        const DST_PORT: u16 = 3;
        let ip = t.nested(TUPLE_IP)?;
        let proto = t.nested(TUPLE_PROTO)?;
        let address = |v4, v6| ip.get(v4).or_else(|| ip.get(v6));
        Some(Self {
            from: End {
                address: address(1, 3)?,
                port: proto.get(SRC_PORT),
            },
            to: End {
                address: address(2, 4)?,
                port: proto.get(DST_PORT),
            },
            proto,
        })
    }

    /// What an answer to it would carry.
    fn turned(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
            proto: self.proto,
        }
    }

    fn write(&self, b: &mut Body) {
        const SRC_PORT: u16 = 2;
        const DST_PORT: u16 = 3;
        let (src, dst) = if self.from.address.len() == 4 {
            (1, 2)
        } else {
            (3, 4)
        };
        b.nest(TUPLE_IP, |ip| {
            ip.attr(src, self.from.address).attr(dst, self.to.address);
        });
        b.nest(TUPLE_PROTO, |p| {
            p.copy_except(self.proto.0, &[SRC_PORT, DST_PORT]);
            if let (Some(from), Some(to)) = (self.from.port, self.to.port) {
                p.attr(SRC_PORT, from).attr(DST_PORT, to);
            }
        });
    }
}
