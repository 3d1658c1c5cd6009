//! Neighbours that somebody set: permanent ones, proxies, and forwarding
//! entries of bridges and tunnels. What was learned is learned again.

use super::netlink::{Attrs, Body, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Netlink};
use crate::namespace::NamespaceError;

// linux/rtnetlink.h, linux/neighbour.h
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
/// `sizeof(struct ndmsg)`
const NDMSG: usize = 12;
const PERMANENT: u16 = 0x80;
const NOARP: u16 = 0x40;
const NTF_PROXY: u8 = 0x08;
const NTF_SELF: u8 = 0x02;
const RTN_UNICAST: u8 = 1;
const DESTINATION: u16 = 1;
const CACHEINFO: u16 = 3;
const PROBES: u16 = 4;
const MASTER: u16 = 9;

fn family(body: &[u8]) -> i32 {
    body.first().copied().unwrap_or(0).into()
}

fn state(body: &[u8]) -> u16 {
    let bytes = body.get(8..10);
    bytes.map_or(0, |b| u16::from_ne_bytes(b.try_into().expect("2")))
}

fn flags(body: &[u8]) -> u8 {
    body.get(10).copied().unwrap_or(0)
}

/// What was set, in the namespace the calling thread is in.
pub(super) fn list(nl: &mut Netlink) -> Result<Vec<Vec<u8>>, NamespaceError> {
    let mut all = Vec::new();
    for m in nl.dump(RTM_GETNEIGH, &[0; NDMSG])? {
        if state(&m.body) & PERMANENT != 0 && family(&m.body) != libc::AF_BRIDGE {
            all.push(m.body);
        }
    }
    let mut proxies = [0; NDMSG];
    proxies[10] = NTF_PROXY;
    let set = |b: &[u8]| flags(b) & NTF_PROXY != 0;
    all.extend(
        nl.dump(RTM_GETNEIGH, &proxies)?
            .into_iter()
            .map(|m| m.body)
            .filter(|b| set(b)),
    );
    let mut bridges = [0; NDMSG];
    bridges[0] = libc::AF_BRIDGE as u8;
    let forwarding = nl.dump(RTM_GETNEIGH, &bridges)?.into_iter().map(|m| m.body);
    let set = |b: &Vec<u8>| {
        // A device's own entries without a destination are the groups it is in.
        let group = flags(b) & NTF_SELF != 0 && Attrs(&b[NDMSG..]).get(DESTINATION).is_none();
        state(b) & (PERMANENT | NOARP) != 0 && !group
    };
    all.extend(forwarding.filter(|b| b.len() >= NDMSG && set(b)));
    for body in &mut all {
        *body = settled(body);
    }
    Ok(all)
}

/// Without what is measured, so that two can be compared.
fn settled(body: &[u8]) -> Vec<u8> {
    let head = body.get(..NDMSG).unwrap_or(body);
    let mut out = Body::new(head);
    out.copy_except(body.get(NDMSG..).unwrap_or(&[]), &[CACHEINFO, PROBES]);
    out.0
}

/// Sets what is not there by itself.
pub(super) fn restore(nl: &mut Netlink, wanted: &[Vec<u8>]) -> Result<(), NamespaceError> {
    let present = list(nl)?;
    for body in wanted.iter().filter(|w| !present.contains(w)) {
        let mut new = body.clone();
        let bridge = family(body) == libc::AF_BRIDGE;
        if bridge && new.get(11).is_some_and(|&t| t == 0) {
            new[11] = RTN_UNICAST;
        }
        // The port's master has it unless it is the device's own.
        if bridge && flags(body) & NTF_SELF == 0 {
            const NTF_MASTER: u8 = 0x04;
            new[10] |= NTF_MASTER;
            let mut without = Body::new(&new[..NDMSG]);
            without.copy_except(&new[NDMSG..], &[MASTER]);
            new = without.0;
        }
        let how = match bridge {
            // A tunnel has several destinations for one address.
            true => NLM_F_CREATE | NLM_F_APPEND,
            false => NLM_F_CREATE | NLM_F_REPLACE,
        };
        let lladdr = Attrs(body.get(NDMSG..).unwrap_or(&[])).get(2).is_some();
        match nl.change(RTM_NEWNEIGH, how, &new, "add a neighbour") {
            Err(e) if bridge && lladdr && e.errno() == Some(libc::EEXIST) => {}
            other => other?,
        }
    }
    Ok(())
}
