//! Addresses: `RTM_NEWADDR` messages, as `ifaddr-ID.img` holds them.

use super::netlink::{Attrs, Body, Message, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Netlink};
use crate::namespace::NamespaceError;

// linux/rtnetlink.h
pub(super) const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
/// `sizeof(struct ifaddrmsg)`
const IFADDR: usize = 8;
// linux/if_addr.h
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const FLAGS: u16 = 8;
const NODAD: u32 = 0x02;
const TENTATIVE: u32 = 0x40;
const DADFAILED: u32 = 0x08;

/// All addresses of the namespace the calling thread is in, in their order.
pub(super) fn list(nl: &mut Netlink) -> Result<Vec<Message>, NamespaceError> {
    nl.dump(RTM_GETADDR, &[0; IFADDR])
}

fn attrs(body: &[u8]) -> Attrs<'_> {
    Attrs(body.get(IFADDR..).unwrap_or(&[]))
}

/// The number of its device.
pub(super) fn index(body: &[u8]) -> i32 {
    let bytes = body.get(4..8);
    bytes.map_or(0, |b| i32::from_ne_bytes(b.try_into().expect("4")))
}

fn is_v6(body: &[u8]) -> bool {
    body.first() == Some(&(libc::AF_INET6 as u8))
}

fn flags(body: &[u8]) -> u32 {
    let short = u32::from(body.get(2).copied().unwrap_or(0));
    attrs(body).u32(FLAGS).unwrap_or(short)
}

/// Family and prefix length, device, local address, address.
type Key<'a> = (Option<&'a [u8]>, i32, Option<&'a [u8]>, Option<&'a [u8]>);

/// What distinguishes an address from others.
fn key(body: &[u8]) -> Key<'_> {
    let a = attrs(body);
    (body.get(..2), index(body), a.get(LOCAL), a.get(ADDRESS))
}

/// Makes the namespace's addresses those of the list. Nothing waits for the
/// detection of duplicates: they were in use before.
pub(super) fn restore(nl: &mut Netlink, wanted: &[Message]) -> Result<(), NamespaceError> {
    let present = list(nl)?;
    let is_wanted = |m: &Message| wanted.iter().any(|w| key(&w.body) == key(&m.body));
    for m in present.iter().filter(|m| !is_wanted(m)) {
        nl.change(RTM_DELADDR, 0, &m.body, "remove an address")?;
    }
    let is_there = |w: &Message| present.iter().any(|m| key(&w.body) == key(&m.body));
    let missing: Vec<&Message> = wanted.iter().filter(|w| !is_there(w)).collect();
    let (v6, v4): (Vec<&Message>, Vec<&Message>) =
        missing.into_iter().partition(|w| is_v6(&w.body));
    // A new IPv6 address goes before the others of its scope, an IPv4 address behind.
    for w in v4.into_iter().chain(v6.into_iter().rev()) {
        add(nl, &w.body, None)?;
    }
    Ok(())
}

/// Adds one address, to another device if `device` says so.
pub(super) fn add(
    nl: &mut Netlink,
    body: &[u8],
    device: Option<i32>,
) -> Result<(), NamespaceError> {
    let flags = flags(body) & !(TENTATIVE | DADFAILED);
    let with = |flags: u32| {
        let mut head = body[..IFADDR.min(body.len())].to_vec();
        head[2] = flags as u8;
        if let Some(index) = device {
            head[4..8].copy_from_slice(&index.to_ne_bytes());
        }
        let mut b = Body::new(&head);
        b.copy_except(body.get(IFADDR..).unwrap_or(&[]), &[FLAGS]);
        b.u32(FLAGS, flags);
        b.0
    };
    if !is_v6(body) {
        return nl.change(
            RTM_NEWADDR,
            NLM_F_CREATE | NLM_F_EXCL,
            &with(flags),
            "add an address",
        );
    }
    let quiet = with(flags | NODAD);
    nl.change(
        RTM_NEWADDR,
        NLM_F_CREATE | NLM_F_EXCL,
        &quiet,
        "add an address",
    )?;
    if flags & NODAD == 0 {
        nl.change(
            RTM_NEWADDR,
            NLM_F_REPLACE,
            &with(flags),
            "flags of an address",
        )?;
    }
    Ok(())
}
