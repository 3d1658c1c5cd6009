//! nftables: tables, chains, sets with their elements, objects, flow tables
//! and rules, made again in one transaction and with their old handles.

use std::collections::{BTreeMap, HashMap};

use super::netlink::{Attrs, Body, NLM_F_APPEND, NLM_F_CREATE, Netlink, message};
use super::schema::NftEntry;
use crate::namespace::NamespaceError;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NLM_F_REQUEST: u16 = 1;
const NEWTABLE: u16 = 0;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const NEWOBJ: u16 = 18;
const NEWFLOWTABLE: u16 = 22;
/// `sizeof(struct nfgenmsg)`
const HEAD: usize = 4;
/// The table's name is the first attribute of everything.
const TABLE: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_F_OWNER: u32 = 2;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_ID: u16 = 10;
/// `NFT_SET_ANONYMOUS`, `NFT_SET_CONSTANT`: filled before a rule uses them.
const FILLED_AT_ONCE: u32 = 1 | 2;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
const RULE_ID: u16 = 9;
const RULE_POSITION_ID: u16 = 10;
/// How many handles that are no longer in use are passed over one by one.
const GAPS_MAX: u64 = 16 << 10;

/// What is listed: the request, the answer's type, the attribute of the handle
/// (0: none), and attributes that are not for making it.
struct Class {
    new: u16,
    handle: u16,
    told: &'static [u16],
}

const CLASSES: [Class; 6] = [
    Class {
        new: NEWTABLE,
        handle: 0,
        told: &[3, 4, 5, 7],
    },
    Class {
        new: NEWCHAIN,
        handle: 2,
        told: &[2, 6, 9, 11],
    },
    Class {
        new: NEWSET,
        handle: 16,
        told: &[10, 14, 16, 19, 20],
    },
    Class {
        new: NEWOBJ,
        handle: 6,
        told: &[5, 6, 7],
    },
    Class {
        new: NEWFLOWTABLE,
        handle: 5,
        told: &[4, 5, 6],
    },
    Class {
        new: NEWRULE,
        handle: 3,
        told: &[3, 6, 8],
    },
];

fn class(kind: u32) -> Option<&'static Class> {
    CLASSES.iter().find(|c| u32::from(c.new) == kind)
}

fn attrs(e: &NftEntry) -> Attrs<'_> {
    Attrs(e.body.get(HEAD..).unwrap_or(&[]))
}

fn family(e: &NftEntry) -> u8 {
    e.body.first().copied().unwrap_or(0)
}

fn be32(a: Attrs<'_>, kind: u16) -> u32 {
    let bytes = a.get(kind).and_then(|v| v.get(..4));
    bytes.map_or(0, |b| u32::from_be_bytes(b.try_into().expect("4")))
}

fn handle(e: &NftEntry) -> u64 {
    let at = class(e.kind).map_or(0, |c| c.handle);
    let bytes = attrs(e).get(at).and_then(|v| v.get(..8));
    bytes.map_or(0, |b| u64::from_be_bytes(b.try_into().expect("8")))
}

fn name_of(e: &NftEntry, kind: u16) -> Vec<u8> {
    attrs(e).get(kind).unwrap_or_default().to_vec()
}

/// All of it in the namespace the calling thread is in.
pub(super) fn list(nl: &mut Netlink) -> Result<Vec<NftEntry>, NamespaceError> {
    let mut all: Vec<NftEntry> = Vec::new();
    for c in &CLASSES {
        // The number of each request follows that of what it lists.
        let messages = match nl.dump(SUBSYSTEM << 8 | (c.new + 1), &[0; HEAD]) {
            Ok(m) => m,
            // A kernel without it, or with the module not loaded.
            Err(e)
                if matches!(e.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL))
                    && c.new != NEWRULE =>
            {
                continue;
            }
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => continue,
            Err(e) => return Err(e),
        };
        let first = all.len();
        all.extend(messages.into_iter().map(|m| NftEntry {
            kind: u32::from(m.kind & 0xff),
            body: m.body,
        }));
        if c.new == NEWSET {
            for i in first..all.len() {
                let elements = elements(nl, &all[i])?;
                all.extend(elements);
            }
        }
    }
    Ok(all)
}

fn elements(nl: &mut Netlink, set: &NftEntry) -> Result<Vec<NftEntry>, NamespaceError> {
    let mut ask = Body::new(&[family(set), 0, 0, 0]);
    ask.attr(1, &name_of(set, TABLE))
        .attr(2, &name_of(set, SET_NAME));
    let found = nl.dump(SUBSYSTEM << 8 | GETSETELEM, &ask.0)?;
    const LIST: u16 = 3;
    let entries = found.into_iter().map(|m| NftEntry {
        kind: u32::from(m.kind & 0xff),
        body: m.body,
    });
    Ok(entries.filter(|e| attrs(e).get(LIST).is_some()).collect())
}

/// Why a ruleset cannot be made again, if so.
pub(super) fn objection(all: &[NftEntry]) -> Option<String> {
    let owned = all.iter().find(|e| {
        e.kind == u32::from(NEWTABLE) && be32(attrs(e), TABLE_FLAGS) & TABLE_F_OWNER != 0
    })?;
    let name = attrs(owned).string(TABLE).unwrap_or_default();
    Some(format!(
        "table {name} belongs to a netlink socket and goes with it"
    ))
}

/// Makes a ruleset in an empty namespace.
pub(super) fn restore(nl: &mut Netlink, all: &[NftEntry]) -> Result<(), NamespaceError> {
    if all.is_empty() {
        return Ok(());
    }
    nl.batch(&transaction(all), "make nftables rules")
}

/// The messages that make a ruleset.
pub(super) fn transaction(all: &[NftEntry]) -> Vec<u8> {
    let mut batch = Batch::default();
    batch.bounds(BATCH_BEGIN);
    for table in all.iter().filter(|e| e.kind == u32::from(NEWTABLE)) {
        batch.table(table, all);
    }
    batch.bounds(BATCH_END);
    batch.bytes
}

#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn bounds(&mut self, kind: u16) {
        let subsystem = SUBSYSTEM.to_be_bytes();
        self.push(kind, 0, &[0, 0, subsystem[0], subsystem[1]]);
    }

    fn push(&mut self, kind: u16, flags: u16, body: &[u8]) {
        self.sequence += 1;
        let bytes = message(kind, NLM_F_REQUEST | flags, self.sequence, body);
        self.bytes.extend_from_slice(&bytes);
    }

    fn add(&mut self, kind: u16, flags: u16, body: &Body) {
        self.push(SUBSYSTEM << 8 | kind, NLM_F_CREATE | flags, &body.0);
    }

    /// A table with all that is in it, in the order in which it was made.
    fn table(&mut self, table: &NftEntry, all: &[NftEntry]) {
        let name = name_of(table, TABLE);
        let of_table = |e: &&NftEntry| family(e) == family(table) && name_of(e, TABLE) == name;
        self.add(NEWTABLE, 0, &bare(table));
        let mut parts: Vec<&NftEntry> = all
            .iter()
            .filter(of_table)
            .filter(|e| ![NEWTABLE, NEWSETELEM].map(u32::from).contains(&e.kind))
            .collect();
        let mut chains: BTreeMap<Vec<u8>, Vec<u64>> = BTreeMap::new();
        for rule in parts.iter().filter(|e| e.kind == u32::from(NEWRULE)) {
            chains
                .entry(name_of(rule, RULE_CHAIN))
                .or_default()
                .push(handle(rule));
        }
        parts.sort_by_key(|e| handle(e));
        let last = parts.last().map_or(0, |e| handle(e));
        let gaps = last.saturating_sub(parts.len() as u64);
        let exact = gaps <= GAPS_MAX;
        if !exact {
            tracing::info!(gaps, "handles of an nftables table are given anew");
        }
        let fillings: Vec<&NftEntry> = all
            .iter()
            .filter(of_table)
            .filter(|e| e.kind == u32::from(NEWSETELEM))
            .collect();
        let mut made: HashMap<Vec<u8>, Vec<u64>> = HashMap::new();
        let mut at_once = Vec::new();
        let mut next = 1;
        for part in parts {
            while exact && next < handle(part) {
                self.pass_handle(family(table), &name);
                next += 1;
            }
            next += 1;
            match part.kind as u16 {
                NEWRULE => {
                    let chain = name_of(part, RULE_CHAIN);
                    let order = chains.get(&chain).map_or(&[][..], Vec::as_slice);
                    self.rule(part, order, made.entry(chain).or_default());
                }
                NEWSET => {
                    let mut body = bare(part);
                    body.attr(SET_ID, &(self.sequence + 1).to_be_bytes());
                    self.add(NEWSET, 0, &body);
                    if be32(attrs(part), SET_FLAGS) & FILLED_AT_ONCE != 0 {
                        let set = name_of(part, SET_NAME);
                        for e in fillings.iter().filter(|e| name_of(e, SET_NAME) == set) {
                            self.add(NEWSETELEM, 0, &bare(e));
                        }
                        at_once.push(set);
                    }
                }
                kind => self.add(kind, 0, &bare(part)),
            }
        }
        for e in fillings {
            if !at_once.contains(&name_of(e, SET_NAME)) {
                self.add(NEWSETELEM, 0, &bare(e));
            }
        }
    }

    /// A rule, behind those of `order` that come before it and are already `made`.
    fn rule(&mut self, rule: &NftEntry, order: &[u64], made: &mut Vec<u64>) {
        let me = handle(rule);
        let mut body = bare(rule);
        body.attr(RULE_ID, &(me as u32).to_be_bytes());
        let before = order.iter().take_while(|&&h| h != me);
        let previous = before.filter(|h| made.contains(h)).last().copied();
        let mut flags = NLM_F_APPEND;
        match previous {
            // `made` is kept in the order of the chain.
            Some(p) if made.last() == Some(&p) => made.push(me),
            Some(p) => {
                body.attr(RULE_POSITION_ID, &(p as u32).to_be_bytes());
                let at = made.iter().position(|&h| h == p).unwrap_or(0);
                made.insert(at + 1, me);
            }
            None => {
                flags = 0;
                made.insert(0, me);
            }
        }
        self.add(NEWRULE, flags, &body);
    }

    /// Uses up a handle that belonged to something that is gone.
    fn pass_handle(&mut self, family: u8, table: &[u8]) {
        let mut body = Body::new(&[family, 0, 0, 0]);
        body.attr(TABLE, table)
            .string(CHAIN_NAME, "rcr-passed-over");
        self.add(NEWCHAIN, 0, &body);
        self.push(SUBSYSTEM << 8 | DELCHAIN, 0, &body.0);
    }
}

/// Without what the kernel gives by itself.
fn bare(e: &NftEntry) -> Body {
    let mut body = Body::new(&[family(e), 0, 0, 0]);
    let told = class(e.kind).map_or(&[][..], |c| c.told);
    body.copy_except(e.body.get(HEAD..).unwrap_or(&[]), told);
    body
}
