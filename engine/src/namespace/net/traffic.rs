//! Queueing disciplines and their classes (tc(8)).

use super::netlink::{Attrs, Body, NLM_F_CREATE, NLM_F_REPLACE, Netlink};
use super::schema::NftEntry;
use crate::namespace::NamespaceError;

// linux/rtnetlink.h
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTCLASS: u16 = 40;
const RTM_GETTCLASS: u16 = 42;
const RTM_GETTFILTER: u16 = 46;
/// `sizeof(struct tcmsg)`
const TCMSG: usize = 20;
const KIND: u16 = 1;
/// What is measured: STATS, XSTATS, STATS2, HW_OFFLOAD.
const MEASURED: [u16; 4] = [3, 4, 7, 12];

fn word(body: &[u8], at: usize) -> u32 {
    let b = body.get(at..at + 4);
    b.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
}

fn handle(body: &[u8]) -> u32 {
    word(body, 8)
}

fn request(device: i32, parent: u32) -> [u8; TCMSG] {
    let mut head = [0; TCMSG];
    head[4..8].copy_from_slice(&device.to_ne_bytes());
    head[12..16].copy_from_slice(&parent.to_ne_bytes());
    head
}

/// What was set up, in the namespace the calling thread is in; or, as the
/// error's other side, the name of what cannot be carried.
pub(super) fn list(nl: &mut Netlink) -> Result<Result<Vec<NftEntry>, String>, NamespaceError> {
    let mut found = Vec::new();
    let mut devices = Vec::new();
    for m in nl.dump(RTM_GETQDISC, &[0; TCMSG])? {
        // Those without a handle the kernel has attached by itself.
        if handle(&m.body) == 0 {
            continue;
        }
        let device = word(&m.body, 4) as i32;
        let filters = nl.dump(RTM_GETTFILTER, &request(device, handle(&m.body)))?;
        if let Some(filter) = filters.first() {
            let kind = filter.attrs(TCMSG).string(KIND).unwrap_or_default();
            return Ok(Err(format!("a traffic filter ({kind}) on device {device}")));
        }
        if !devices.contains(&device) {
            devices.push(device);
        }
        found.push(NftEntry {
            kind: RTM_NEWQDISC.into(),
            body: m.body,
        });
    }
    for device in devices {
        for m in nl.dump(RTM_GETTCLASS, &request(device, 0))? {
            let of_ours = found.iter().any(|q| {
                word(&q.body, 4) as i32 == device && handle(&q.body) >> 16 == handle(&m.body) >> 16
            });
            let made_by_itself = ["mq", "multiq", "prio", "fq_codel", "tbf", "sfq", "red"];
            let kind = m.attrs(TCMSG).string(KIND).unwrap_or_default();
            if of_ours && !made_by_itself.contains(&kind.as_str()) {
                found.push(NftEntry {
                    kind: RTM_NEWTCLASS.into(),
                    body: m.body,
                });
            }
        }
    }
    Ok(Ok(found))
}

/// Sets it up again, each after what it hangs on.
pub(super) fn restore(nl: &mut Netlink, all: &[NftEntry]) -> Result<(), NamespaceError> {
    let mut waiting: Vec<&NftEntry> = all.iter().collect();
    while !waiting.is_empty() {
        let before = waiting.len();
        let mut failed = None;
        waiting.retain(|e| match add(nl, e) {
            Ok(()) => false,
            Err(e) => {
                failed = Some(e);
                true
            }
        });
        if let Some(e) = failed
            && waiting.len() == before
        {
            return Err(e);
        }
    }
    Ok(())
}

fn add(nl: &mut Netlink, e: &NftEntry) -> Result<(), NamespaceError> {
    let mut head = e.body[..TCMSG.min(e.body.len())].to_vec();
    head.resize(TCMSG, 0);
    // tcm_info is a count of users or the class of the leaf.
    head[16..].copy_from_slice(&[0; 4]);
    let rest = e.body.get(TCMSG..).unwrap_or(&[]);
    let mut body = Body::new(&head);
    body.copy_except(rest, &MEASURED);
    let what = format!(
        "queueing ({})",
        Attrs(rest).string(KIND).unwrap_or_default()
    );
    nl.change(e.kind as u16, NLM_F_CREATE | NLM_F_REPLACE, &body.0, &what)
}
