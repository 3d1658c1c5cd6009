//! Parsers of this folder, for the fuzz targets.

use super::links::Link;
use super::netlink::messages;
use super::schema::{NetEntry, NftEntry};
use super::stream::{Start, get};
use super::{conntrack, nft, routes};
use crate::image::ImageSource;

/// What the kernel says of devices, routes, tracked connections and packet
/// filters, and what is made of it.
pub(crate) fn netlink(bytes: &[u8]) {
    let mut rules = Vec::new();
    for m in messages(bytes).flatten() {
        let link = Link(&m.body);
        link.objection();
        let _ = (link.tied(), link.master(), link.address(), link.mtu());
        routes::device(&m.body);
        routes::settled(&m.body);
        routes::expires(&m.body);
        conntrack::connection(&m);
        rules.push(NftEntry {
            kind: u32::from(m.kind & 0xff),
            body: m.body,
        });
    }
    nft::objection(&rules);
    nft::transaction(&rules);
}

/// The rules of a network namespace's image.
pub(crate) fn rules(net: &NetEntry) {
    nft::objection(&net.nft);
    nft::transaction(&net.nft);
}

/// Images that are rows of messages.
pub(crate) fn streams(source: &dyn ImageSource, name: &str) {
    for start in [Start::None, Start::Addresses, Start::Routes, Start::Rules] {
        let _ = get(source, name, start);
    }
}
