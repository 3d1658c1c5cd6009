//! Building network namespaces.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::links::{self, Link, Maker, OtherEnd};
use super::netlink::{Body, Message, Netlink};
use super::save::{NETNSA_FD, NETNSA_NSID, RTM_NEWNSID};
use super::schema::{NetEntry, OutsideEntry};
use super::stream::{self, Start};
use super::sysctls::Which;
use super::{
    NetNamespace, addresses, conntrack, enter::inside_net, image_name, neighbours, nft, routes,
    sysctls, traffic, xtables,
};
use crate::image::{ImageError, ImageSource, Kind, get_record};
use crate::namespace::ids::{NsKind, open_ns};
use crate::namespace::make::make;
use crate::namespace::{NamespaceError, UserNamespace};

/// A namespace that ended goes some time after its last process, and the
/// names of its devices' other ends with it.
const NAME_PATIENCE: Duration = Duration::from_secs(5);

/// Where the outer end of a pair is to go, instead of where it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethEnd {
    /// Name of the end inside.
    pub inside: String,
    /// Name of the end outside.
    pub outside: String,
    /// Bridge to become a port of.
    pub bridge: Option<String>,
}

/// Builds all saved network namespaces.
///
/// `users` are the user namespaces of the dump; `external` gives namespaces
/// that stand in for others, by name; `veths` says where outer ends go.
pub fn build_nets(
    source: &dyn ImageSource,
    users: &BTreeMap<u32, UserNamespace>,
    external: &BTreeMap<String, OwnedFd>,
    veths: &[VethEnd],
) -> Result<BTreeMap<u32, NetNamespace>, NamespaceError> {
    let mut all = BTreeMap::new();
    for id in super::saved(source) {
        let entry: NetEntry = get_record(source, Kind::RcrNamespaces, &image_name(id))?;
        let content = |what: String| ImageError::Content {
            name: image_name(id),
            what,
        };
        let ns = match &entry.external {
            Some(key) => {
                let given = external.get(key).ok_or_else(|| {
                    content(format!(
                        "network namespace {key:?} is to be given from outside"
                    ))
                })?;
                given
                    .try_clone()
                    .map_err(NamespaceError::call("dup", "network namespace"))?
            }
            None => {
                let owner = match entry.owner {
                    0 => None,
                    n => Some(users.get(&n).ok_or_else(|| {
                        content(format!(
                            "it belongs to user namespace {n}, which is not there"
                        ))
                    })?),
                };
                make(NsKind::Net, owner)?
            }
        };
        all.insert(id, Part { entry, ns });
    }
    let builder = Builder {
        host: open_ns("/proc/thread-self/ns/net")?,
        all,
        veths,
    };
    builder.numbers()?;
    builder.devices()?;
    for part in builder.full() {
        inside_net(part.ns.as_fd(), || {
            let mut nl = Netlink::route()?;
            part.maker(&mut nl).configure()?;
            sysctls::restore(&part.entry.sysctls, Which::Early)
        })?;
    }
    for part in builder.full() {
        inside_net(part.ns.as_fd(), || part.maker(&mut Netlink::route()?).up())?;
    }
    for (&id, part) in &builder.all {
        if part.is_full() {
            let rows = Rows::load(source, id)?;
            inside_net(part.ns.as_fd(), || part.fill(&rows))?;
        }
    }
    let made = builder.all.into_iter();
    Ok(made
        .map(|(id, p)| (id, NetNamespace { ns: p.ns }))
        .collect())
}

struct Part {
    entry: NetEntry,
    ns: OwnedFd,
}

impl Part {
    /// Whether its content is ours to make.
    fn is_full(&self) -> bool {
        !self.entry.empty && self.entry.external.is_none()
    }

    fn maker<'a>(&'a self, nl: &'a mut Netlink) -> Maker<'a> {
        Maker {
            nl,
            links: &self.entry.links,
        }
    }

    /// On a thread inside, with all devices up.
    fn fill(&self, rows: &Rows) -> Result<(), NamespaceError> {
        let mut nl = Netlink::route()?;
        addresses::restore(&mut nl, &rows.addresses)?;
        routes::restore_nexthops(&mut nl, &self.entry.nexthops)?;
        routes::restore(&mut nl, libc::AF_INET, &rows.routes)?;
        routes::restore(&mut nl, libc::AF_INET6, &rows.routes6)?;
        routes::restore_rules(&mut nl, &rows.rules)?;
        neighbours::restore(&mut nl, &self.entry.neighbours)?;
        traffic::restore(&mut nl, &self.entry.traffic)?;
        xtables::restore(&self.entry.xtables)?;
        let mut nf = Netlink::netfilter()?;
        nft::restore(&mut nf, &self.entry.nft)?;
        conntrack::restore(&mut nf, &rows.connections, &rows.expected)?;
        sysctls::restore(&self.entry.sysctls, Which::All)?;
        self.maker(&mut nl).finish()
    }
}

/// The images of a namespace that are rows of messages.
struct Rows {
    addresses: Vec<Message>,
    routes: Vec<Message>,
    routes6: Vec<Message>,
    rules: Vec<Message>,
    connections: Vec<Message>,
    expected: Vec<Message>,
}

impl Rows {
    fn load(source: &dyn ImageSource, id: u32) -> Result<Self, ImageError> {
        let row = |name: &str, start| stream::get(source, &format!("{name}-{id}.img"), start);
        Ok(Self {
            addresses: row("ifaddr", Start::Addresses)?,
            routes: row("route", Start::Routes)?,
            routes6: row("route6", Start::Routes)?,
            rules: row("rule", Start::Rules)?,
            connections: row("netns-ct", Start::None)?,
            expected: row("netns-exp", Start::None)?,
        })
    }
}

struct Builder<'a> {
    host: OwnedFd,
    all: BTreeMap<u32, Part>,
    veths: &'a [VethEnd],
}

impl Builder<'_> {
    fn full(&self) -> impl Iterator<Item = &Part> {
        self.all.values().filter(|p| p.is_full())
    }

    /// The namespace of a number; 0 is the host's.
    fn ns(&self, id: u32) -> Option<BorrowedFd<'_>> {
        match id {
            0 => Some(self.host.as_fd()),
            _ => self.all.get(&id).map(|p| p.ns.as_fd()),
        }
    }

    /// The numbers that namespaces give each other.
    fn numbers(&self) -> Result<(), NamespaceError> {
        for part in self.full() {
            inside_net(part.ns.as_fd(), || {
                let mut nl = Netlink::route()?;
                for n in &part.entry.nsids {
                    let Some(other) = self.ns(n.other) else {
                        continue;
                    };
                    let mut body = Body::new(&[0]);
                    body.u32(NETNSA_FD, other.as_raw_fd() as u32);
                    body.u32(NETNSA_NSID, n.nsid as u32);
                    nl.change(RTM_NEWNSID, 0, &body.0, "number a namespace")?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// All devices of all namespaces, each after what it lies on.
    fn devices(&self) -> Result<(), NamespaceError> {
        let mut done: HashSet<(u32, i32)> = HashSet::new();
        let mut waiting = Vec::new();
        for (&id, part) in self.all.iter().filter(|(_, p)| p.is_full()) {
            for entry in &part.entry.links {
                let link = Link(&entry.body);
                match link.is_everywhere() {
                    true => drop(done.insert((id, link.index()))),
                    false => waiting.push((id, entry)),
                }
            }
        }
        while !waiting.is_empty() {
            let before = waiting.len();
            for (id, entry) in std::mem::take(&mut waiting) {
                let link = Link(&entry.body);
                let key = (id, link.index());
                if done.contains(&key) {
                    continue;
                }
                let there = entry.tied_to.unwrap_or(id);
                let pair = link.kind() == "veth";
                let lower = link.tied().filter(|_| !pair);
                let ready = match (lower, there) {
                    (Some(_), 0) | (None, _) => true,
                    (Some(lower), there) => done.contains(&(there, lower)),
                };
                if !ready {
                    waiting.push((id, entry));
                    continue;
                }
                match (pair, there) {
                    (true, 0) => self.pair_outside(id, link, entry.outside.as_ref())?,
                    (true, _) => {
                        self.pair(id, link, there)?;
                        done.extend(link.tied().map(|i| (there, i)));
                    }
                    (false, _) => self.single(id, link, there, entry.outside.as_ref())?,
                }
                done.insert(key);
            }
            if waiting.len() == before {
                let (_, entry) = waiting[0];
                let name = Link(&entry.body).name();
                return Err(missing(format!("what device {name} lies on is not there")));
            }
        }
        Ok(())
    }

    fn inside<T: Send>(
        &self,
        id: u32,
        work: impl FnOnce(&mut Netlink) -> Result<T, NamespaceError> + Send,
    ) -> Result<T, NamespaceError> {
        let ns = self
            .ns(id)
            .ok_or_else(|| missing(format!("namespace {id} is not there")))?;
        inside_net(ns, || work(&mut Netlink::route()?))
    }

    /// A device that is no pair; what it lies on is in `there`.
    fn single(
        &self,
        id: u32,
        link: Link<'_>,
        there: u32,
        outside: Option<&OutsideEntry>,
    ) -> Result<(), NamespaceError> {
        if there == id {
            return self.inside(id, |nl| links::make(nl, link, link.tied(), None, None));
        }
        let into = self.ns(id);
        self.inside(there, |nl| {
            let lower = match outside {
                Some(o) => find(nl, &Link(&o.body).name())?,
                None => link.tied().unwrap_or(0),
            };
            links::make(nl, link, Some(lower), into, None)
        })
    }

    /// A pair with both ends in namespaces of the dump.
    fn pair(&self, id: u32, link: Link<'_>, there: u32) -> Result<(), NamespaceError> {
        let index = link.tied().unwrap_or(0);
        let other = self.all.get(&there).filter(|p| p.is_full());
        let other = other.and_then(|p| {
            let mut links = p.entry.links.iter().map(|e| Link(&e.body));
            Some((links.find(|l| l.index() == index)?, p.ns.as_fd()))
        });
        let (other, ns) = other.ok_or_else(|| {
            missing(format!(
                "the other end of device {} is not there",
                link.name()
            ))
        })?;
        let name = other.name();
        let end = OtherEnd {
            link: other,
            name: &name,
            ns,
            numbered: true,
        };
        self.inside(id, |nl| links::make(nl, link, None, None, Some(end)))
    }

    /// A pair whose other end is the host's.
    fn pair_outside(
        &self,
        id: u32,
        link: Link<'_>,
        outside: Option<&OutsideEntry>,
    ) -> Result<(), NamespaceError> {
        let outside = outside.ok_or_else(|| {
            missing(format!(
                "the other end of device {} is not saved",
                link.name()
            ))
        })?;
        let wish = self.veths.iter().find(|v| v.inside == link.name());
        let was = Link(&outside.body);
        let name = wish.map_or(was.name(), |v| v.outside.clone());
        let end = Instant::now() + NAME_PATIENCE;
        let mut numbered = true;
        loop {
            let other = OtherEnd {
                link: was,
                name: &name,
                ns: self.host.as_fd(),
                numbered,
            };
            match self.inside(id, |nl| links::make(nl, link, None, None, Some(other))) {
                Ok(()) => break,
                // The number may have been given to another device.
                Err(e) if e.errno() == Some(libc::EBUSY) && numbered => numbered = false,
                Err(e) if e.errno() == Some(libc::EEXIST) && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => return Err(e),
            }
        }
        self.inside(0, |nl| {
            let index = find(nl, &name)?;
            let master = wish.map_or(outside.master.clone(), |v| v.bridge.clone());
            let master = master.map(|m| find(nl, &m)).transpose()?;
            links::settle_outside(nl, was, index, master)?;
            if wish.is_some() {
                return Ok(());
            }
            for body in &outside.addresses {
                match addresses::add(nl, body, Some(index)) {
                    Err(e) if e.errno() == Some(libc::EEXIST) => {}
                    other => other?,
                }
            }
            for body in &outside.routes {
                routes::add_outside(nl, body, index)?;
            }
            Ok(())
        })
    }
}

/// The number of a device by its name.
fn find(nl: &mut Netlink, name: &str) -> Result<i32, NamespaceError> {
    let all = links::list(nl)?;
    let found = all.iter().map(|m| Link(&m.body)).find(|l| l.name() == name);
    found
        .map(Link::index)
        .ok_or_else(|| missing(format!("the host has no device {name}")))
}

fn missing(what: String) -> NamespaceError {
    NamespaceError::Netlink {
        what,
        source: std::io::Error::from_raw_os_error(libc::ENODEV),
    }
}
