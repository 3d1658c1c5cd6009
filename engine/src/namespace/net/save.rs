//! Saving network namespaces.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::links::{self, Link};
use super::netlink::{Body, Message, Netlink};
use super::schema::{LinkEntry, NetEntry, NsidEntry, OutsideEntry};
use super::stream::{self, Start};
use super::{
    addresses, conntrack, enter::inside_net, image_name, neighbours, nft, routes, sysctls, traffic,
    xtables,
};
use crate::Refusal;
use crate::image::schema::{NdType, NetDeviceEntry, NetnsEntry, NetnsId};
use crate::image::{ImageSink, Kind, names, put_records};
use crate::namespace::NamespaceError;
use crate::namespace::ids::open_ns;

// linux/rtnetlink.h, linux/net_namespace.h
pub(super) const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
pub(super) const NETNSA_NSID: u16 = 1;
pub(super) const NETNSA_FD: u16 = 3;

/// A network namespace to be saved.
#[derive(Debug)]
pub struct NetSource {
    /// Its number in the images.
    pub id: u32,
    /// Itself.
    pub ns: OwnedFd,
    /// Number of the user namespace that owns it; 0 is the host's.
    pub owner: u32,
    /// Its content is left to whoever restores: it comes back with `lo` alone.
    pub empty: bool,
    /// Another one, known by that name at the restore, stands in for it.
    pub external: Option<String>,
    /// A process that has to do with it, for messages.
    pub pid: i32,
    /// That process's name.
    pub comm: String,
}

/// Saves all network namespaces of a dump. What cannot be carried is returned;
/// then nothing was written.
pub fn save_nets(
    all: &[NetSource],
    sink: &mut dyn ImageSink,
) -> Result<Vec<Refusal>, NamespaceError> {
    let (found, refusals) = examine(all)?;
    if !refusals.is_empty() {
        return Ok(refusals);
    }
    for (source, f) in all.iter().zip(&found) {
        f.write(source, sink)?;
    }
    Ok(Vec::new())
}

/// What [`save_nets`] would refuse. Reads alone.
pub fn check_nets(all: &[NetSource]) -> Result<Vec<Refusal>, NamespaceError> {
    Ok(examine(all)?.1)
}

fn examine(all: &[NetSource]) -> Result<(Vec<Found>, Vec<Refusal>), NamespaceError> {
    let host = open_ns("/proc/thread-self/ns/net")?;
    let mut others = vec![(0, host.as_fd())];
    others.extend(all.iter().map(|s| (s.id, s.ns.as_fd())));
    let mut found = Vec::new();
    let mut refusals = Vec::new();
    for source in all {
        let mut f = Found::default();
        f.entry.owner = source.owner;
        f.entry.empty = source.empty;
        f.entry.external = source.external.clone();
        if !source.empty && source.external.is_none() {
            inside_net(source.ns.as_fd(), || f.look(&others))?;
            f.look_outside(&host, all)?;
        }
        refusals.extend(f.problems.drain(..).map(|(object, reason)| Refusal {
            pid: source.pid,
            comm: source.comm.clone(),
            object: format!("network namespace: {object}"),
            reason,
            advice: "take it out of the namespace, or untag the unit".into(),
        }));
        found.push(f);
    }
    Ok((found, refusals))
}

/// One namespace's content.
#[derive(Debug, Default)]
struct Found {
    entry: NetEntry,
    addresses: Vec<Message>,
    routes: Vec<Message>,
    routes6: Vec<Message>,
    rules: Vec<Message>,
    connections: Vec<Message>,
    expected: Vec<Message>,
    /// Object and reason.
    problems: Vec<(String, String)>,
}

impl Found {
    /// On a thread inside.
    fn look(&mut self, others: &[(u32, BorrowedFd<'_>)]) -> Result<(), NamespaceError> {
        let mut nl = Netlink::route()?;
        for &(other, ns) in others {
            if let Some(nsid) = nsid_of(&mut nl, ns)? {
                self.entry.nsids.push(NsidEntry { other, nsid });
            }
        }
        for m in links::list(&mut nl)? {
            let link = Link(&m.body);
            if let Some(reason) = link.objection() {
                self.refuse(format!("device {}", link.name()), reason);
            }
            let tied_to = link.tied_nsid().map(|n| {
                let known = self.entry.nsids.iter().find(|e| e.nsid == n);
                known.map(|e| e.other)
            });
            if tied_to == Some(None) {
                let reason = "it is tied to a device in a namespace that does not come along";
                self.refuse(format!("device {}", link.name()), reason.into());
            }
            self.entry.links.push(LinkEntry {
                body: m.body,
                tied_to: tied_to.flatten(),
                outside: None,
            });
        }
        self.addresses = addresses::list(&mut nl)?;
        self.routes = routes::list(&mut nl, libc::AF_INET)?;
        self.routes6 = routes::list(&mut nl, libc::AF_INET6)?;
        self.rules = routes::list_rules(&mut nl)?;
        self.entry.nexthops = routes::list_nexthops(&mut nl)?;
        self.entry.neighbours = neighbours::list(&mut nl)?;
        match traffic::list(&mut nl)? {
            Ok(all) => self.entry.traffic = all,
            Err(what) => self.refuse("traffic control".into(), format!("{what} is not carried")),
        }
        // linux/rtnetlink.h: RTNL_FAMILY_IPMR, RTNL_FAMILY_IP6MR
        for family in [128, 129] {
            if routes::list(&mut nl, family).is_ok_and(|r| !r.is_empty()) {
                self.refuse("multicast routes".into(), "they are not carried".into());
            }
        }
        self.entry.xtables = xtables::list()?;
        self.entry.sysctls = sysctls::list()?;
        let mut nf = Netlink::netfilter()?;
        self.entry.nft = nft::list(&mut nf)?;
        if let Some(reason) = nft::objection(&self.entry.nft) {
            self.refuse("nftables".into(), reason);
        }
        (self.connections, self.expected) = conntrack::list(&mut nf)?;
        self.others(&mut nf)
    }

    /// What is only looked for to be refused.
    fn others(&mut self, nf: &mut Netlink) -> Result<(), NamespaceError> {
        const IPSET_LIST: u16 = 6 << 8 | 7;
        const IPSET_PROTOCOL: u16 = 1;
        let mut ask = Body::new(&[libc::AF_INET as u8, 0, 0, 0]);
        ask.attr(IPSET_PROTOCOL, &[6]);
        // A kernel without sets, or without IPsec, has none of them.
        if nf.dump(IPSET_LIST, &ask.0).is_ok_and(|all| !all.is_empty()) {
            self.refuse("IP sets".into(), "ipset(8) is not carried".into());
        }
        const XFRM_MSG_GETSA: u16 = 0x12;
        const XFRM_MSG_GETPOLICY: u16 = 0x15;
        if let Ok(mut xfrm) = Netlink::open(libc::NETLINK_XFRM, "xfrm") {
            for kind in [XFRM_MSG_GETSA, XFRM_MSG_GETPOLICY] {
                if xfrm.dump(kind, &[]).is_ok_and(|all| !all.is_empty()) {
                    self.refuse(
                        "IPsec".into(),
                        "its states and policies are not carried".into(),
                    );
                }
            }
        }
        let text = std::fs::read_to_string("/proc/thread-self/net/arp_tables_names");
        if text.is_ok_and(|t| !t.is_empty()) {
            self.refuse("arptables".into(), "its tables are not carried".into());
        }
        Ok(())
    }

    /// What the host has of devices that are tied to ours.
    fn look_outside(&mut self, host: &OwnedFd, all: &[NetSource]) -> Result<(), NamespaceError> {
        if self.entry.links.iter().all(|l| l.tied_to.is_none()) {
            return Ok(());
        }
        let (devices, addresses, routes) = inside_net(host.as_fd(), || {
            let mut nl = Netlink::route()?;
            let mut routes = routes::list(&mut nl, libc::AF_INET)?;
            routes.extend(routes::list(&mut nl, libc::AF_INET6)?);
            Ok((links::list(&mut nl)?, addresses::list(&mut nl)?, routes))
        })?;
        let by_index: HashMap<i32, &Message> =
            devices.iter().map(|m| (Link(&m.body).index(), m)).collect();
        let mut problems = Vec::new();
        for entry in &mut self.entry.links {
            let link = Link(&entry.body);
            let left = all.iter().find(|s| Some(s.id) == entry.tied_to);
            if left.is_some_and(|s| s.empty || s.external.is_some()) && link.kind() == "veth" {
                problems.push((
                    format!("device {}", link.name()),
                    "its other end is in a namespace whose content is not saved".to_owned(),
                ));
            }
            if entry.tied_to != Some(0) {
                continue;
            }
            let there = link.tied().and_then(|i| by_index.get(&i));
            let Some(there) = there else {
                let reason = "the host's device it is tied to is gone".to_owned();
                problems.push((format!("device {}", link.name()), reason));
                continue;
            };
            let outside = Link(&there.body);
            let master = outside.master().and_then(|i| by_index.get(&i));
            let of_it = |m: &&Message| addresses::index(&m.body) == outside.index();
            let through = |m: &&Message| routes::device(&m.body) == Some(outside.index());
            let bodies = |m: &Message| m.body.clone();
            entry.outside = Some(OutsideEntry {
                body: there.body.clone(),
                master: master.map(|m| Link(&m.body).name()),
                addresses: addresses.iter().filter(of_it).map(bodies).collect(),
                routes: routes.iter().filter(through).map(bodies).collect(),
            });
        }
        self.problems.extend(problems);
        Ok(())
    }

    fn refuse(&mut self, object: String, reason: String) {
        self.problems.push((object, reason));
    }

    fn write(&self, source: &NetSource, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
        let id = source.id;
        let own = std::slice::from_ref(&self.entry);
        put_records(sink, Kind::RcrNamespaces, &image_name(id), own)?;
        let nsids = self.entry.nsids.iter().map(|n| NetnsId {
            target_ns_id: n.other,
            netnsid_value: n.nsid,
        });
        let netns = NetnsEntry {
            nsids: nsids.collect(),
            ext_key: source.external.clone(),
            ..NetnsEntry::default()
        };
        put_records(sink, Kind::Netns, &names::netns(id), &[netns])?;
        if source.empty || source.external.is_some() {
            return Ok(());
        }
        let devices: Vec<_> = self.entry.links.iter().map(device).collect();
        put_records(sink, Kind::Netdev, &format!("netdev-{id}.img"), &devices)?;
        let rows = [
            ("ifaddr", Start::Addresses, &self.addresses),
            ("route", Start::Routes, &self.routes),
            ("route6", Start::Routes, &self.routes6),
            ("rule", Start::Rules, &self.rules),
            ("netns-ct", Start::None, &self.connections),
            ("netns-exp", Start::None, &self.expected),
        ];
        for (name, start, row) in rows {
            stream::put(sink, &format!("{name}-{id}.img"), start, row)?;
        }
        Ok(())
    }
}

/// A device in the common schema, which knows few kinds.
fn device(entry: &LinkEntry) -> NetDeviceEntry {
    let link = Link(&entry.body);
    let kind = match link.kind().as_str() {
        _ if link.is_loopback() => NdType::Loopback,
        "veth" => NdType::Veth,
        "bridge" => NdType::Bridge,
        "macvlan" => NdType::Macvlan,
        _ => NdType::Extlink,
    };
    NetDeviceEntry {
        r#type: kind.into(),
        ifindex: link.index() as u32,
        mtu: link.mtu(),
        flags: link.flags(),
        name: link.name(),
        address: link.address().map(<[u8]>::to_vec),
        peer_ifindex: link.tied().map(|i| i as u32),
        peer_nsid: link.tied_nsid().map(|i| i as u32),
        master: link.master().map(|i| i as u32),
        ..NetDeviceEntry::default()
    }
}

/// The number that the namespace of `nl` gives another one, if it gives one.
fn nsid_of(nl: &mut Netlink, ns: BorrowedFd<'_>) -> Result<Option<i32>, NamespaceError> {
    let mut ask = Body::new(&[0]);
    ask.u32(NETNSA_FD, ns.as_raw_fd() as u32);
    let answer = nl.ask(RTM_GETNSID, &ask.0, "number of a namespace")?;
    let nsid = answer.and_then(|m| m.attrs(4).u32(NETNSA_NSID));
    Ok(nsid.map(|n| n as i32).filter(|&n| n >= 0))
}
