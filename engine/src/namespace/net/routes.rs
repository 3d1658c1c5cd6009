//! Routes of all tables, next hops and rules: rtnetlink messages, as
//! `route-ID.img`, `route6-ID.img` and `rule-ID.img` hold them.

use super::netlink::{Attrs, Body, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Netlink};
use crate::namespace::NamespaceError;

// linux/rtnetlink.h
pub(super) const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
/// `sizeof(struct rtmsg)`, and that of `struct fib_rule_hdr`.
const RTMSG: usize = 12;
/// `sizeof(struct nhmsg)`
const NHMSG: usize = 8;
const OIF: u16 = 4;
const GATEWAY: u16 = 5;
const MULTIPATH: u16 = 9;
const CACHEINFO: u16 = 12;
const VIA: u16 = 18;
const EXPIRES: u16 = 23;
const NH_ID: u16 = 30;
const NHA_ID: u16 = 1;
const NHA_OP_FLAGS: u16 = 14;
/// An entry of a cache, not of a table.
const CLONED: u32 = 0x200;
/// What of `rtm_flags` is set by who makes a route (`RTNH_F_ONLINK`,
/// `RTNH_F_PERVASIVE`); the rest is the state of the devices.
const LASTING: u32 = 0x2 | 0x4;
const PROTO_KERNEL: u8 = 2;
const TABLE_LOCAL: u8 = 255;
/// Clock ticks that user space is told of, a second.
const USER_HZ: i32 = 100;

/// Routes of one family (`AF_INET`, `AF_INET6`), all tables.
pub(super) fn list(nl: &mut Netlink, family: i32) -> Result<Vec<Message>, NamespaceError> {
    let mut head = [0; RTMSG];
    head[0] = family as u8;
    let mut all = nl.dump(RTM_GETROUTE, &head)?;
    // Families without routes of their own answer for all.
    all.retain(|m| m.kind == RTM_NEWROUTE && m.body.first() == Some(&head[0]));
    all.retain(|m| m.body.len() >= RTMSG && flags(&m.body) & CLONED == 0);
    Ok(all)
}

fn flags(body: &[u8]) -> u32 {
    let bytes = body.get(8..12);
    bytes.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
}

/// The device a route goes out of, if it is one.
pub(super) fn device(body: &[u8]) -> Option<i32> {
    Attrs(body.get(RTMSG..)?).u32(OIF).map(|i| i as i32)
}

/// A route as it is asked for, and by which two are compared.
pub(super) fn settled(body: &[u8]) -> Vec<u8> {
    let mut head = body[..RTMSG.min(body.len())].to_vec();
    head.resize(RTMSG, 0);
    let kept = flags(body) & LASTING;
    head[8..12].copy_from_slice(&kept.to_ne_bytes());
    let rest = body.get(RTMSG..).unwrap_or(&[]);
    let mut out = Body::new(&head);
    // A next hop object says the rest.
    let by_object: &[u16] = match Attrs(rest).u32(NH_ID) {
        Some(_) => &[CACHEINFO, OIF, GATEWAY, MULTIPATH, VIA],
        None => &[CACHEINFO],
    };
    out.copy_except(rest, by_object);
    out.0
}

/// Seconds until a route goes by itself.
pub(super) fn expires(body: &[u8]) -> Option<u32> {
    let info = Attrs(body.get(RTMSG..)?).get(CACHEINFO)?;
    // rta_expires is the third word of struct rta_cacheinfo.
    let ticks = i32::from_ne_bytes(info.get(8..12)?.try_into().ok()?);
    (ticks > 0).then_some((ticks / USER_HZ).max(1) as u32)
}

/// Makes one family's routes those of the list.
pub(super) fn restore(
    nl: &mut Netlink,
    family: i32,
    wanted: &[Message],
) -> Result<(), NamespaceError> {
    let mut present: Vec<Vec<u8>> = list(nl, family)?.iter().map(|m| settled(&m.body)).collect();
    let goal: Vec<Vec<u8>> = wanted.iter().map(|m| settled(&m.body)).collect();
    // Of IPv4 routes to one place the first counts, so their order must be right:
    // those that differ make all be put there anew.
    if family == libc::AF_INET && present != goal {
        for body in present.drain(..) {
            remove(nl, &body)?;
        }
    }
    let unwanted = |p: &&Vec<u8>| !goal.contains(p) && !comes_with_address(p);
    for body in present.iter().filter(unwanted) {
        remove(nl, body)?;
    }
    let mut missing: Vec<(&Message, Vec<u8>)> = wanted
        .iter()
        .zip(goal)
        .filter(|(m, g)| !present.contains(g) && !comes_with_address(&m.body))
        .collect();
    // A source address needs the local table, and a gateway a route to it.
    missing.sort_by_key(|(m, _)| m.body.get(4) != Some(&TABLE_LOCAL));
    while !missing.is_empty() {
        let before = missing.len();
        let mut failed = None;
        missing.retain(|(m, body)| match add(nl, m, body) {
            Ok(()) => false,
            Err(e) => {
                failed = Some(e);
                true
            }
        });
        if let Some(e) = failed
            && missing.len() == before
        {
            return Err(e);
        }
    }
    Ok(())
}

fn remove(nl: &mut Netlink, body: &[u8]) -> Result<(), NamespaceError> {
    match nl.change(RTM_DELROUTE, 0, body, "remove a route") {
        // It went with another.
        Err(e) if e.errno() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// IPv6 routes to our own addresses: the kernel adds them a moment after the
/// address, with a metric that cannot be asked for.
fn comes_with_address(body: &[u8]) -> bool {
    const LOCAL: u8 = 2;
    const ANYCAST: u8 = 4;
    let v6 = body.first() == Some(&(libc::AF_INET6 as u8));
    let kernel = body.get(5) == Some(&PROTO_KERNEL);
    v6 && kernel && matches!(body.get(7), Some(&LOCAL | &ANYCAST))
}

fn add(nl: &mut Netlink, m: &Message, settled: &[u8]) -> Result<(), NamespaceError> {
    let mut body = Body(settled.to_vec());
    if let Some(seconds) = expires(&m.body)
        && m.body.first() == Some(&(libc::AF_INET6 as u8))
    {
        body.u32(EXPIRES, seconds);
    }
    let v4 = m.body.first() == Some(&(libc::AF_INET as u8));
    let how = if v4 {
        NLM_F_CREATE | NLM_F_APPEND
    } else {
        NLM_F_CREATE
    };
    match nl.change(RTM_NEWROUTE, how, &body.0, "add a route") {
        // Those of the kernel's own making come and go with addresses and settings.
        Err(e) if e.errno() == Some(libc::EEXIST) && m.body.get(5) == Some(&PROTO_KERNEL) => Ok(()),
        other => other,
    }
}

/// Adds a route of the host's that went out of a device which is there again
/// under the number `device`.
pub(super) fn add_outside(
    nl: &mut Netlink,
    body: &[u8],
    device: i32,
) -> Result<(), NamespaceError> {
    let old = settled(body);
    let mut new = Body::new(&old[..RTMSG]);
    new.copy_except(&old[RTMSG..], &[OIF]);
    new.u32(OIF, device as u32);
    match nl.change(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_EXCL,
        &new.0,
        "add a route of the host",
    ) {
        Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Next hop objects; groups come after their members.
pub(super) fn list_nexthops(nl: &mut Netlink) -> Result<Vec<Vec<u8>>, NamespaceError> {
    match nl.dump(RTM_GETNEXTHOP, &[0; NHMSG]) {
        Ok(all) => Ok(all.into_iter().map(|m| m.body).collect()),
        // A kernel without them.
        Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Makes next hop objects.
pub(super) fn restore_nexthops(nl: &mut Netlink, all: &[Vec<u8>]) -> Result<(), NamespaceError> {
    const NHA_GROUP: u16 = 2;
    let rest = |b: &'_ Vec<u8>| b.get(NHMSG..).map(<[u8]>::to_vec).unwrap_or_default();
    let is_group = |b: &&Vec<u8>| Attrs(&rest(b)).get(NHA_GROUP).is_some();
    let singles = all.iter().filter(|b| !is_group(b));
    for body in singles.chain(all.iter().filter(is_group)) {
        let mut head = body[..NHMSG.min(body.len())].to_vec();
        head.resize(NHMSG, 0);
        // Scope and reserved; of the flags only that a gateway is on the link.
        (head[1], head[3]) = (0, 0);
        const ONLINK: u32 = 4;
        let flags = u32::from_ne_bytes(head[4..8].try_into().expect("4")) & ONLINK;
        head[4..8].copy_from_slice(&flags.to_ne_bytes());
        if is_group(&body) {
            head[0] = libc::AF_UNSPEC as u8;
        }
        let mut new = Body::new(&head);
        new.copy_except(&rest(body), &[NHA_OP_FLAGS]);
        let id = Attrs(&rest(body)).u32(NHA_ID).unwrap_or(0);
        let what = format!("make next hop {id}");
        nl.change(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_EXCL, &new.0, &what)?;
    }
    Ok(())
}

/// Rules of both families.
pub(super) fn list_rules(nl: &mut Netlink) -> Result<Vec<Message>, NamespaceError> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut head = [0; RTMSG];
        head[0] = family as u8;
        match nl.dump(RTM_GETRULE, &head) {
            Ok(rules) => all.extend(rules),
            // A kernel without several tables for that family.
            Err(e) if e.errno() == Some(libc::EAFNOSUPPORT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// Makes the namespace's rules those of the list.
pub(super) fn restore_rules(nl: &mut Netlink, wanted: &[Message]) -> Result<(), NamespaceError> {
    let mut present = list_rules(nl)?;
    let mut missing = Vec::new();
    for w in wanted {
        match present.iter().position(|p| p.body == w.body) {
            Some(at) => drop(present.remove(at)),
            None => missing.push(w),
        }
    }
    for m in &present {
        nl.change(RTM_DELRULE, 0, &m.body, "remove a rule")?;
    }
    for m in missing {
        nl.change(RTM_NEWRULE, NLM_F_CREATE, &m.body, "add a rule")?;
    }
    Ok(())
}
