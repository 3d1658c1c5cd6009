//! Devices: seen by `RTM_GETLINK`, made again by `RTM_NEWLINK` with the same
//! numbers, names, addresses and properties of their kind.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::netlink::{Attrs, Body, Message, NLM_F_CREATE, NLM_F_EXCL, Netlink};
use super::schema::LinkEntry;
use crate::namespace::NamespaceError;

// linux/rtnetlink.h
pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWLINKPROP: u16 = 108;
/// `sizeof(struct ifinfomsg)`
pub(super) const IFINFO: usize = 16;
// linux/if_link.h
const ADDRESS: u16 = 1;
const BROADCAST: u16 = 2;
pub(super) const NAME: u16 = 3;
const MTU: u16 = 4;
const LINK: u16 = 5;
const MASTER: u16 = 10;
const TXQLEN: u16 = 13;
const LINKINFO: u16 = 18;
const ALIAS: u16 = 20;
const AF_SPEC: u16 = 26;
const GROUP: u16 = 27;
const NET_NS_FD: u16 = 28;
const TX_QUEUES: u16 = 31;
const RX_QUEUES: u16 = 32;
const LINK_NETNSID: u16 = 37;
const GSO_MAX_SEGS: u16 = 40;
const GSO_MAX_SIZE: u16 = 41;
const XDP: u16 = 43;
const XDP_ATTACHED: u16 = 2;
const PROP_LIST: u16 = 52;
const ALT_NAME: u16 = 53;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_SLAVE_KIND: u16 = 4;
const INFO_SLAVE_DATA: u16 = 5;
const VETH_PEER: u16 = 1;
const INET6_ADDR_GEN_MODE: u16 = 8;
/// `IN6_ADDR_GEN_MODE_NONE`
const NO_ADDRESS: u8 = 1;

/// Kinds whose properties come back as the kernel tells them.
const KINDS: [&str; 9] = [
    "veth", "bridge", "dummy", "ifb", "macvlan", "ipvlan", "vlan", "vxlan", "vrf",
];
/// Devices that the kernel makes by itself in every namespace.
const EVERYWHERE: [&str; 8] = [
    "tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6gre0",
];
/// Bridge properties that are measured, not set (ids, ports, timers, state), and
/// filtering by VLAN, which is refused where it is on.
const BRIDGE_MEASURED: [u16; 14] = [7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 47, 48];
/// Properties of a bridge's port that are measured or follow from others.
const PORT_MEASURED: [u16; 19] = [
    1, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 29, 35, 36, 38, 41,
];
/// How many sources a macvlan has, and the length of its queue.
const MACVLAN_MEASURED: [u16; 2] = [6, 8];
/// Flags that somebody sets: UP, DEBUG, NOARP, PROMISC, ALLMULTI, MULTICAST.
const SETTABLE: u32 = 0x1 | 0x4 | 0x80 | 0x100 | 0x200 | 0x1000;
const IFF_UP: u32 = 1;

/// One device, as `RTM_NEWLINK` tells of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link<'a>(pub &'a [u8]);

impl<'a> Link<'a> {
    pub(super) fn index(self) -> i32 {
        self.word(4) as i32
    }

    pub(super) fn flags(self) -> u32 {
        self.word(8)
    }

    fn word(self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4);
        bytes.map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("4")))
    }

    pub(super) fn attrs(self) -> Attrs<'a> {
        Attrs(self.0.get(IFINFO..).unwrap_or(&[]))
    }

    pub(super) fn name(self) -> String {
        self.attrs().string(NAME).unwrap_or_default()
    }

    /// What made it; empty for `lo` and hardware.
    pub(super) fn kind(self) -> String {
        let info = self.attrs().nested(LINKINFO);
        info.and_then(|i| i.string(INFO_KIND)).unwrap_or_default()
    }

    fn data(self, kind: u16) -> Option<&'a [u8]> {
        self.attrs().nested(LINKINFO)?.get(kind)
    }

    pub(super) fn is_loopback(self) -> bool {
        self.flags() & 0x8 != 0
    }

    /// The device it lies on or is paired with.
    pub(super) fn tied(self) -> Option<i32> {
        let index = self.attrs().u32(LINK)? as i32;
        (index != 0).then_some(index)
    }

    /// The namespace's number for where that device is; none: here.
    pub(super) fn tied_nsid(self) -> Option<i32> {
        self.attrs().u32(LINK_NETNSID).map(|n| n as i32)
    }

    pub(super) fn master(self) -> Option<i32> {
        self.attrs().u32(MASTER).map(|n| n as i32)
    }

    pub(super) fn mtu(self) -> u32 {
        self.attrs().u32(MTU).unwrap_or(0)
    }

    pub(super) fn address(self) -> Option<&'a [u8]> {
        self.attrs().get(ADDRESS)
    }

    /// The kernel makes it whenever a namespace is made.
    pub(super) fn is_everywhere(self) -> bool {
        self.is_loopback() || EVERYWHERE.contains(&self.name().as_str())
    }

    /// Why it cannot be made again, if so.
    pub(super) fn objection(self) -> Option<String> {
        if self.is_everywhere() {
            return None;
        }
        let kind = self.kind();
        if kind.is_empty() {
            return Some("it is hardware, which belongs to the host".into());
        }
        if kind == "tun" {
            return Some("tun and tap devices are not carried".into());
        }
        if !KINDS.contains(&kind.as_str()) {
            return Some(format!("devices of kind {kind} are not carried"));
        }
        let xdp = self.attrs().nested(XDP).and_then(|x| x.get(XDP_ATTACHED));
        if xdp.is_some_and(|x| x.first() != Some(&0)) {
            return Some("an XDP program is attached to it".into());
        }
        const VLAN_FILTERING: u16 = 7;
        let filtering = self.data(INFO_DATA).map(Attrs);
        let filtering = filtering.and_then(|d| d.get(VLAN_FILTERING));
        if kind == "bridge" && filtering.is_some_and(|v| v != [0]) {
            return Some("it filters by VLAN, which is not carried".into());
        }
        None
    }
}

/// All devices of the namespace the calling thread is in.
pub(super) fn list(nl: &mut Netlink) -> Result<Vec<Message>, NamespaceError> {
    let mut all = nl.dump(RTM_GETLINK, &[0; IFINFO])?;
    all.sort_by_key(|m| Link(&m.body).index());
    Ok(all)
}

/// The devices of a namespace under construction, on a thread inside of it.
pub(super) struct Maker<'a> {
    pub nl: &'a mut Netlink,
    pub links: &'a [LinkEntry],
}

/// Where the other end of a pair goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct OtherEnd<'a> {
    /// Its record; only names and addresses of it are used.
    pub link: Link<'a>,
    /// Its name.
    pub name: &'a str,
    /// Its namespace.
    pub ns: BorrowedFd<'a>,
    /// Whether it must have its old number.
    pub numbered: bool,
}

/// Makes one device in the namespace of `nl`, or, with `into`, in another one
/// while the device it lies on, which is number `lower`, is here.
pub(super) fn make(
    nl: &mut Netlink,
    link: Link<'_>,
    lower: Option<i32>,
    into: Option<BorrowedFd<'_>>,
    other: Option<OtherEnd<'_>>,
) -> Result<(), NamespaceError> {
    let kind = link.kind();
    let mut body = Body::new(&ifinfo(link.index(), 0, 0));
    identity(&mut body, link, &link.name());
    if let Some(ns) = into {
        body.u32(NET_NS_FD, ns.as_raw_fd() as u32);
    }
    if let Some(lower) = lower {
        body.u32(LINK, lower as u32);
    }
    body.nest(LINKINFO, |info| {
        info.string(INFO_KIND, &kind);
        if let Some(other) = &other {
            info.nest(INFO_DATA, |data| {
                let index = if other.numbered {
                    other.link.index()
                } else {
                    0
                };
                let mut peer = Body::new(&ifinfo(index, 0, 0));
                identity(&mut peer, other.link, other.name);
                peer.u32(NET_NS_FD, other.ns.as_raw_fd() as u32);
                data.attr(VETH_PEER, &peer.0);
            });
        } else if let Some(data) = link.data(INFO_DATA) {
            info.nest(INFO_DATA, |d| properties(d, &kind, data));
        }
    });
    let what = format!("make device {} ({kind})", link.name());
    nl.change(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body.0, &what)
}

/// What a device of that kind is made with, from what it was seen to have.
fn properties(body: &mut Body, kind: &str, seen: &[u8]) {
    const BRIDGE_OPTIONS: u16 = 46;
    const VXLAN_TTL_INHERIT: u16 = 28;
    // What the kernel says of them it takes for an overlap with those in use.
    const VXLAN_RESERVED_BITS: u16 = 33;
    match kind {
        "bridge" => {
            body.copy_except(seen, &[&BRIDGE_MEASURED[..], &[BRIDGE_OPTIONS]].concat());
            // Values and which of them are meant: only those that are on.
            if let Some(on) = Attrs(seen).get(BRIDGE_OPTIONS).and_then(|v| v.get(..4)) {
                body.attr(BRIDGE_OPTIONS, &[on, on].concat());
            }
        }
        "macvlan" => drop(body.copy_except(seen, &MACVLAN_MEASURED)),
        "vxlan" => {
            body.copy_except(seen, &[VXLAN_TTL_INHERIT, VXLAN_RESERVED_BITS]);
            if Attrs(seen)
                .get(VXLAN_TTL_INHERIT)
                .is_some_and(|v| v.first() == Some(&1))
            {
                body.attr(VXLAN_TTL_INHERIT, &[]);
            }
        }
        _ => drop(body.copy_except(seen, &[])),
    }
}

fn identity(body: &mut Body, link: Link<'_>, name: &str) {
    body.string(NAME, name);
    // An ipvlan has the address of the device below it.
    if let Some(address) = link.address()
        && link.kind() != "ipvlan"
        && address.iter().any(|&b| b != 0)
    {
        body.attr(ADDRESS, address);
    }
    for kind in [TX_QUEUES, RX_QUEUES] {
        if let Some(n) = link.attrs().get(kind) {
            body.attr(kind, n);
        }
    }
}

/// `struct ifinfomsg`.
pub(super) fn ifinfo(index: i32, flags: u32, change: u32) -> [u8; IFINFO] {
    let mut bytes = [0; IFINFO];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

impl Maker<'_> {
    fn set(
        &mut self,
        index: i32,
        what: String,
        fill: impl FnOnce(&mut Body),
    ) -> Result<(), NamespaceError> {
        let mut body = Body::new(&ifinfo(index, 0, 0));
        fill(&mut body);
        self.nl.change(RTM_SETLINK, 0, &body.0, &what)
    }

    /// What a device has beyond its making. No addresses appear by themselves
    /// until [`Maker::finish`].
    pub(super) fn configure(&mut self) -> Result<(), NamespaceError> {
        let present = indexes(self.nl)?;
        for entry in self.links {
            let link = Link(&entry.body);
            let (name, index) = (link.name(), link.index());
            if !present.contains(&index) {
                self.missing(link)?;
                continue;
            }
            self.set(index, format!("properties of device {name}"), |b| {
                b.u32(MTU, link.mtu());
                for kind in [TXQLEN, GROUP, GSO_MAX_SIZE, GSO_MAX_SEGS, ALIAS] {
                    if let Some(v) = link.attrs().get(kind) {
                        b.attr(kind, v);
                    }
                }
                if let Some(v) = link.attrs().get(BROADCAST)
                    && !link.is_loopback()
                {
                    b.attr(BROADCAST, v);
                }
            })?;
            self.generation_mode(link, Some(NO_ADDRESS))?;
            if let Some(names) = link.attrs().get(PROP_LIST) {
                let mut body = Body::new(&ifinfo(index, 0, 0));
                body.nest(PROP_LIST, |b| {
                    for (_, n) in Attrs(names).filter(|(k, _)| *k == ALT_NAME) {
                        b.attr(ALT_NAME, n);
                    }
                });
                let flags = NLM_F_CREATE | NLM_F_EXCL;
                let what = format!("other names of device {name}");
                self.nl.change(RTM_NEWLINKPROP, flags, &body.0, &what)?;
            }
        }
        for entry in self.links {
            let link = Link(&entry.body);
            let Some(master) = link.master() else {
                continue;
            };
            self.set(
                link.index(),
                format!("master of device {}", link.name()),
                |b| {
                    b.u32(MASTER, master as u32);
                },
            )?;
            let info = link.attrs().nested(LINKINFO);
            let Some(kind) = info.and_then(|i| i.string(INFO_SLAVE_KIND)) else {
                continue;
            };
            if let Some(data) = link.data(INFO_SLAVE_DATA)
                && kind == "bridge"
            {
                let mut body = Body::new(&ifinfo(link.index(), 0, 0));
                body.nest(LINKINFO, |i| {
                    i.string(INFO_SLAVE_KIND, &kind);
                    i.nest(INFO_SLAVE_DATA, |d| {
                        d.copy_except(data, &PORT_MEASURED);
                    });
                });
                let what = format!("bridge port {}", link.name());
                self.nl.change(RTM_NEWLINK, 0, &body.0, &what)?;
            }
        }
        Ok(())
    }

    /// A device that the old kernel had made by itself, and this one has not.
    fn missing(&self, link: Link<'_>) -> Result<(), NamespaceError> {
        if link.flags() & IFF_UP == 0 {
            tracing::info!(
                device = link.name(),
                "device of the old kernel left out, it was down"
            );
            return Ok(());
        }
        Err(NamespaceError::Netlink {
            what: format!("this kernel makes no device {} by itself", link.name()),
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        })
    }

    /// Brings devices up, masters and lower ones first by the order of numbers.
    pub(super) fn up(&mut self) -> Result<(), NamespaceError> {
        let present = indexes(self.nl)?;
        let mut waiting: Vec<Link<'_>> = self.links.iter().map(|e| Link(&e.body)).collect();
        waiting.retain(|l| present.contains(&l.index()));
        // One that lies on another can only come up after it.
        for round in 0.. {
            let before = waiting.len();
            let mut failed = None;
            waiting.retain(|link| {
                let flags = link.flags() & SETTABLE;
                let body = ifinfo(link.index(), flags, SETTABLE);
                let what = format!("flags of device {}", link.name());
                match self.nl.change(RTM_NEWLINK, 0, &body, &what) {
                    Ok(()) => false,
                    Err(e) => {
                        failed = Some(e);
                        true
                    }
                }
            });
            match failed {
                None => return Ok(()),
                Some(e) if waiting.len() == before || round > self.links.len() => return Err(e),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// From here on addresses appear by themselves as they used to.
    pub(super) fn finish(&mut self) -> Result<(), NamespaceError> {
        let present = indexes(self.nl)?;
        for entry in self.links {
            let link = Link(&entry.body);
            if present.contains(&link.index()) {
                self.generation_mode(link, None)?;
            }
        }
        Ok(())
    }

    /// How IPv6 addresses are made from the hardware's; `None`: as it was.
    fn generation_mode(&mut self, link: Link<'_>, mode: Option<u8>) -> Result<(), NamespaceError> {
        const INET6: u16 = libc::AF_INET6 as u16;
        let was = link.attrs().nested(AF_SPEC).and_then(|s| s.nested(INET6));
        let was = was.and_then(|v6| v6.get(INET6_ADDR_GEN_MODE)?.first().copied());
        // Absent where the device or the kernel has no IPv6.
        let Some(was) = was else { return Ok(()) };
        let mode = mode.unwrap_or(was);
        const STABLE_PRIVACY: u8 = 2;
        if mode == STABLE_PRIVACY {
            // It comes with the secret, among the settings.
            return Ok(());
        }
        let what = format!("address generation of device {}", link.name());
        self.set(link.index(), what, |b| {
            b.nest(AF_SPEC, |s| {
                s.nest(INET6, |v6| {
                    v6.attr(INET6_ADDR_GEN_MODE, &[mode]);
                });
            });
        })
    }
}

/// Numbers of the devices that are there.
pub(super) fn indexes(nl: &mut Netlink) -> Result<Vec<i32>, NamespaceError> {
    let all = list(nl)?;
    Ok(all.iter().map(|m| Link(&m.body).index()).collect())
}

/// The host's end of a pair as it was: port of a bridge, properties, flags.
pub(super) fn settle_outside(
    nl: &mut Netlink,
    was: Link<'_>,
    index: i32,
    master: Option<i32>,
) -> Result<(), NamespaceError> {
    let flags = was.flags() & SETTABLE;
    let mut body = Body::new(&ifinfo(index, flags, SETTABLE));
    body.u32(MTU, was.mtu());
    if let Some(v) = was.attrs().get(ALIAS) {
        body.attr(ALIAS, v);
    }
    if let Some(master) = master {
        body.u32(MASTER, master as u32);
    }
    let what = format!("the host's end of a pair, {}", was.name());
    nl.change(RTM_SETLINK, 0, &body.0, &what)
}
