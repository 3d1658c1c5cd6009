//! PID namespaces: which ids tasks have where.
//!
//! A task has an id in its own PID namespace and in every one above it. Images
//! name tasks by their ids in the namespace of the dumped tree: the deepest one
//! that all of its processes are in or below. What is needed to give every task
//! all of its ids again is in `rcr-pids.img`, which is written only where there
//! is more to say than that one id.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::Pid;
use rustix::fs::fstat;

use super::NamespaceError;
use super::ids::{NsIds, NsKind, open_ns};
use super::sys::{NsRelation, ns_relative};
use crate::image::{ImageSink, Kind, put_records};
use crate::tree::{Process, Stat};

/// Name of the image of [`RcrPids`].
pub const IMAGE: &str = "rcr-pids.img";

/// The ids of all tasks of a tree.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrPids {
    /// Whether the tree's namespace is not the dumper's own.
    #[prost(bool, required, tag = "1")]
    pub inner: bool,
    /// Inode number of the tree's namespace.
    #[prost(uint64, required, tag = "2")]
    pub inode: u64,
    /// The namespace's first process, as the dumper numbers it.
    #[prost(int32, required, tag = "3")]
    pub init: i32,
    /// When it was started: field 22 of `/proc/PID/stat`.
    #[prost(uint64, required, tag = "4")]
    pub init_start: u64,
    /// Tasks, sessions and groups.
    #[prost(message, repeated, tag = "5")]
    pub ids: Vec<RcrPid>,
}

/// One task, session or group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrPid {
    /// Its id in the tree's namespace, which the other images use.
    #[prost(int32, required, tag = "1")]
    pub id: i32,
    /// Its id as the dumper numbers it.
    #[prost(int32, required, tag = "2")]
    pub outer: i32,
    /// Its ids in the namespaces below the tree's, outermost first.
    #[prost(int32, repeated, packed = "false", tag = "3")]
    pub inner: Vec<i32>,
    /// Number of the namespace it is in, among those of the tree; for tasks.
    #[prost(uint32, optional, tag = "4")]
    pub ns: Option<u32>,
}

/// The numbering of a tree at its dump.
#[derive(Debug, Clone, Default)]
pub struct Numbering {
    /// How many namespaces the tree's is below ours.
    depth: usize,
    inode: u64,
    /// Ids from our namespace down, by ours.
    chains: BTreeMap<i32, Vec<i32>>,
    /// Namespace of each task, by its inode.
    namespaces: BTreeMap<i32, u64>,
    /// The first process of each namespace below ours.
    inits: BTreeMap<u64, i32>,
    /// A living process in each namespace.
    members: BTreeMap<u64, i32>,
}

impl Numbering {
    /// Looks at all processes of a tree that stands still.
    pub fn of<'a>(
        processes: impl Iterator<Item = &'a Process> + Clone,
    ) -> Result<Self, NamespaceError> {
        let own = NsIds::own()?.get(NsKind::Pid);
        let mut this = Self {
            inode: own,
            ..Self::default()
        };
        let mut lineages: BTreeMap<u64, Vec<u64>> = BTreeMap::from([(own, vec![own])]);
        for p in processes.clone() {
            let inode = NsIds::of(Pid::from_raw(p.pid))?.get(NsKind::Pid);
            if let std::collections::btree_map::Entry::Vacant(v) = lineages.entry(inode) {
                v.insert(lineage(p.pid, own)?);
            }
            this.namespaces.insert(p.pid, inode);
            if !p.is_zombie() {
                this.members.entry(inode).or_insert(p.pid);
            }
        }
        let used: Vec<&Vec<u64>> = this.namespaces.values().map(|i| &lineages[i]).collect();
        if let Some((first, rest)) = used.split_first() {
            let common = |l: &&Vec<u64>| first.iter().zip(*l).take_while(|(a, b)| a == b).count();
            let shared = rest.iter().map(common).min().unwrap_or(first.len());
            this.depth = shared.saturating_sub(1);
            this.inode = first[this.depth];
        }
        let plain = this.depth == 0 && this.namespaces.values().all(|&i| i == own);
        if plain {
            return Ok(this);
        }
        for p in processes {
            this.process(p)?;
        }
        if this.depth > 0 && !this.inits.contains_key(&this.inode) {
            this.find_init()?;
        }
        Ok(this)
    }

    fn process(&mut self, p: &Process) -> Result<(), NamespaceError> {
        let ns = self.namespaces[&p.pid];
        for &tid in &p.tids {
            let status = IdLines::of(tid)?;
            if tid == p.pid && status.pid.len() > 1 && status.pid.last() == Some(&1) {
                self.inits.insert(ns, p.pid);
            }
            self.namespaces.insert(tid, ns);
            self.note(status.pid);
            self.note(status.pgid);
            self.note(status.sid);
        }
        if p.tids.is_empty() {
            self.note(IdLines::of(p.pid)?.pid);
        }
        Ok(())
    }

    /// Whoever is deepest below a session or group knows all of its ids.
    fn note(&mut self, mut chain: Vec<i32>) {
        while chain.last() == Some(&0) {
            chain.pop();
        }
        if let Some(&here) = chain.first() {
            let known = self.chains.entry(here).or_default();
            if known.len() < chain.len() {
                *known = chain;
            }
        }
    }

    /// The first process of the tree's namespace, which is not in the tree.
    fn find_init(&mut self) -> Result<(), NamespaceError> {
        let err = |e| NamespaceError::call("read", "/proc")(e);
        for entry in std::fs::read_dir("/proc").map_err(err)? {
            let name = entry.map_err(err)?.file_name();
            let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else {
                continue;
            };
            // Whatever ends meanwhile is not the one: the tree's would have ended with it.
            let Ok(ids) = NsIds::of(Pid::from_raw(pid)) else {
                continue;
            };
            if ids.get(NsKind::Pid) != self.inode {
                continue;
            }
            if IdLines::of(pid).is_ok_and(|l| l.pid.last() == Some(&1)) {
                self.inits.insert(self.inode, pid);
                return Ok(());
            }
        }
        Ok(())
    }

    /// The id that images use for one that we know; 0 where it has none there.
    pub fn id(&self, here: i32) -> i32 {
        match (self.chains.get(&here), self.depth) {
            (Some(chain), depth) => chain.get(depth).copied().unwrap_or(0),
            (None, 0) => here,
            // Outside of the tree, but maybe in its namespace.
            (None, depth) => IdLines::of(here)
                .ok()
                .and_then(|l| l.pid.get(depth).copied())
                .unwrap_or(0),
        }
    }

    /// The id that images use for a parent; 0 for one outside of the namespace.
    pub fn parent(&self, here: i32) -> i32 {
        match self.depth {
            0 => here,
            depth => self
                .chains
                .get(&here)
                .and_then(|c| c.get(depth).copied())
                .unwrap_or(0),
        }
    }

    /// The namespaces by inode number, each with the images' id of a living
    /// process in it.
    pub fn members(&self) -> BTreeMap<u64, i32> {
        let members = self.members.iter();
        members.map(|(&ns, &pid)| (ns, self.id(pid))).collect()
    }

    /// Whether the tree's namespace is not our own.
    pub fn is_inner(&self) -> bool {
        self.depth > 0
    }

    /// The namespace a process's children are born into, where that is not its
    /// own: the images' id of its first process, or 0 for one without any yet.
    pub fn of_children(&self, pid: i32) -> Result<Option<i32>, NamespaceError> {
        let ids = NsIds::of(Pid::from_raw(pid))?;
        let (own, children) = (ids.get(NsKind::Pid), ids.get(NsKind::PidForChildren));
        Ok(match children {
            _ if children == own => None,
            0 => Some(0),
            other => self.inits.get(&other).map(|&i| self.id(i)),
        })
    }

    /// Writes [`IMAGE`] if there is anything to say.
    pub fn save(&self, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
        if self.chains.is_empty() {
            return Ok(());
        }
        let mut numbers: Vec<u64> = self.namespaces.values().copied().collect();
        numbers.sort_unstable();
        numbers.dedup();
        let number = |inode: &u64| numbers.iter().position(|n| n == inode).map(|n| n as u32);
        let ids = self.chains.iter().filter_map(|(&outer, chain)| {
            Some(RcrPid {
                id: *chain.get(self.depth)?,
                outer,
                inner: chain[self.depth + 1..].to_vec(),
                ns: self.namespaces.get(&outer).and_then(number),
            })
        });
        let init = self.inits.get(&self.inode).copied().unwrap_or(0);
        let init_start = match init {
            0 => 0,
            pid => Stat::read(pid)
                .map_err(NamespaceError::call("read", format!("/proc/{pid}/stat")))?
                .number(22),
        };
        let image = RcrPids {
            inner: self.is_inner(),
            inode: self.inode,
            init,
            init_start,
            ids: ids.collect(),
        };
        Ok(put_records(sink, Kind::RcrNamespaces, IMAGE, &[image])?)
    }
}

/// The namespaces above that of a process, from ours down to it.
fn lineage(pid: i32, own: u64) -> Result<Vec<u64>, NamespaceError> {
    let path = format!("/proc/{pid}/ns/pid");
    let inode = |fd: &std::os::fd::OwnedFd| {
        fstat(fd)
            .map(|s| s.st_ino)
            .map_err(NamespaceError::call("fstat", &path))
    };
    let mut at = open_ns(&path)?;
    let mut up = vec![inode(&at)?];
    while up.last() != Some(&own) {
        at = ns_relative(&at, NsRelation::Parent)
            .map_err(NamespaceError::call("ioctl NS_GET_PARENT", &path))?;
        up.push(inode(&at)?);
    }
    up.reverse();
    Ok(up)
}

/// Whether a process is the first of a namespace below ours.
pub fn is_init_below(pid: i32) -> bool {
    IdLines::of(pid).is_ok_and(|l| l.pid.len() > 1 && l.pid.last() == Some(&1))
}

/// The lines of `/proc/TID/status` that show ids in every namespace from the
/// reader's down (proc_pid_status(5)).
#[derive(Debug, Default)]
struct IdLines {
    pid: Vec<i32>,
    pgid: Vec<i32>,
    sid: Vec<i32>,
}

impl IdLines {
    fn of(tid: i32) -> Result<Self, NamespaceError> {
        let path = format!("/proc/{tid}/status");
        let text = std::fs::read(&path).map_err(NamespaceError::call("read", &path))?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    fn parse(text: &str) -> Self {
        let line = |key: &str| -> Vec<i32> {
            let line = text.lines().find_map(|l| l.strip_prefix(key));
            let words = line.unwrap_or_default().split_ascii_whitespace();
            words.filter_map(|w| w.parse().ok()).collect()
        };
        Self {
            pid: line("NSpid:"),
            pgid: line("NSpgid:"),
            sid: line("NSsid:"),
        }
    }
}

/// Where every task of a restore has its ids.
#[derive(Debug, Default)]
pub struct Places {
    here: BTreeMap<i32, i32>,
    places: BTreeMap<i32, Place>,
    /// The tree's namespace, where it lives on without the tree.
    join: Option<std::fs::File>,
    inner: bool,
}

#[derive(Debug, Clone, Default)]
struct Place {
    id: i32,
    /// Ids in namespaces below ours, outermost first.
    chain: Vec<i32>,
    ns: Option<u32>,
}

impl Places {
    /// Works out where the tasks of a dump go. `all` are the ids that its
    /// images use, and `same_boot` says that this kernel made the dump.
    pub fn plan(image: Option<RcrPids>, all: &[i32], same_boot: bool) -> io::Result<Self> {
        let Some(image) = image else {
            return Ok(Self::default());
        };
        let mut this = Self::default();
        if image.inner {
            let makes_it = all.contains(&1);
            if !makes_it
                && same_boot
                && NsIds::own().is_ok_and(|o| o.get(NsKind::Pid) != image.inode)
            {
                this.join = living(&image);
            }
            this.inner = makes_it || this.join.is_some();
        }
        let mut free = Free::new()?;
        for e in &image.ids {
            let mut chain = e.inner.clone();
            let mut here = e.id;
            if this.inner {
                chain.insert(0, e.id);
                here = free.take(e.outer)?;
            }
            this.here.insert(e.id, here);
            let place = Place {
                id: e.id,
                chain,
                ns: e.ns,
            };
            this.places.insert(here, place);
        }
        Ok(this)
    }

    /// Our number for an id of the images. Ids that are not the tree's own are
    /// left as they are.
    pub fn here(&self, id: i32) -> i32 {
        self.here.get(&id).copied().unwrap_or(id)
    }

    /// The images' id for a number of ours.
    pub fn id(&self, here: i32) -> i32 {
        self.places.get(&here).map_or(here, |p| p.id)
    }

    /// What clone3(2) takes as `set_tid`: innermost namespace first.
    pub fn set_tid(&self, here: i32) -> Vec<i32> {
        let mut ids: Vec<i32> = self.chain(here).iter().rev().copied().collect();
        ids.push(here);
        ids
    }

    fn chain(&self, here: i32) -> &[i32] {
        self.places.get(&here).map_or(&[], |p| &p.chain)
    }

    /// How many namespaces below ours a task is.
    pub fn depth(&self, here: i32) -> usize {
        self.chain(here).len()
    }

    /// Whether a task is the first of a namespace.
    pub fn is_init(&self, here: i32) -> bool {
        self.chain(here).last() == Some(&1)
    }

    /// The number that `viewer` knows `target` by; 0 for none.
    pub fn seen(&self, viewer: i32, target: i32) -> i32 {
        match self.depth(viewer) {
            0 => target,
            n => self.chain(target).get(n - 1).copied().unwrap_or(0),
        }
    }

    /// The first process of the namespace that a task is in, if that is below ours.
    pub fn init_of(&self, here: i32) -> Option<i32> {
        let ns = self.places.get(&here)?.ns?;
        let first = |(_, p): &(&i32, &Place)| p.ns == Some(ns) && p.chain.last() == Some(&1);
        self.places.iter().find(first).map(|(&h, _)| h)
    }

    /// Whether the tree lives in a namespace that is not ours.
    pub fn is_inner(&self) -> bool {
        self.inner
    }

    /// Runs `work` while our children are born into the tree's namespace.
    pub fn among<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let Some(ns) = &self.join else {
            return Ok(work());
        };
        let own = std::fs::File::open("/proc/self/ns/pid")?;
        let enter =
            |ns: &std::fs::File| crate::sys::process::setns(ns.as_raw_fd(), libc::CLONE_NEWPID);
        enter(ns).map_err(io::Error::other)?;
        let done = work();
        enter(&own).map_err(io::Error::other)?;
        Ok(done)
    }
}

/// The namespace of a dump if its first process is still the same.
fn living(image: &RcrPids) -> Option<std::fs::File> {
    let stat = Stat::read(image.init).ok()?;
    let ns = std::fs::File::open(format!("/proc/{}/ns/pid", image.init)).ok()?;
    let same = fstat(&ns).ok()?.st_ino == image.inode && stat.number(22) == image.init_start;
    same.then_some(ns)
}

/// Chooses numbers that nobody has.
struct Free {
    taken: std::collections::BTreeSet<i32>,
    next: i32,
    max: i32,
}

impl Free {
    fn new() -> io::Result<Self> {
        let number = |path: &str| -> io::Result<i32> {
            let text = std::fs::read_to_string(path)?;
            text.trim().parse().map_err(io::Error::other)
        };
        let max = number("/proc/sys/kernel/pid_max")?;
        // Numbers are given out in order: half way round it takes longest until they come.
        let last = number("/proc/sys/kernel/ns_last_pid").unwrap_or(0);
        Ok(Self {
            taken: std::collections::BTreeSet::new(),
            next: (last + max / 2) % max,
            max,
        })
    }

    /// The wanted number if it is free, else another one.
    fn take(&mut self, wanted: i32) -> io::Result<i32> {
        let mut at = wanted;
        for _ in 0..self.max {
            let free = at > 300 || at == wanted;
            if free
                && !self.taken.contains(&at)
                && !std::path::Path::new(&format!("/proc/{at}")).exists()
            {
                self.taken.insert(at);
                return Ok(at);
            }
            self.next = (self.next + 1) % self.max;
            at = self.next;
        }
        Err(io::Error::other("no process id is free"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> RcrPids {
        let pid = |id, outer, inner: &[i32], ns| RcrPid {
            id,
            outer,
            inner: inner.to_vec(),
            ns: Some(ns),
        };
        RcrPids {
            inner: true,
            ids: vec![
                pid(1, 0x3fff_0001, &[], 0),
                pid(7, 0x3fff_0002, &[1], 1),
                pid(9, 0x3fff_0003, &[2], 1),
            ],
            ..RcrPids::default()
        }
    }

    #[test]
    fn every_namespace_has_its_numbers() {
        let p = Places::plan(Some(image()), &[1, 7, 9], true).unwrap();
        let [a, b, c] = [1, 7, 9].map(|id| p.here(id));
        assert_eq!([a, b, c], [0x3fff_0001, 0x3fff_0002, 0x3fff_0003]);
        assert_eq!(p.set_tid(c), [2, 9, c]);
        assert_eq!((p.seen(a, c), p.seen(b, c), p.seen(b, a)), (9, 2, 0));
        assert!(p.is_init(a) && p.is_init(b) && !p.is_init(c));
        assert_eq!(p.init_of(c), Some(b));
        assert_eq!((p.id(b), p.here(4)), (7, 4));
    }

    #[test]
    fn a_taken_number_is_replaced() {
        let mut free = Free::new().unwrap();
        let me = std::process::id() as i32;
        let other = free.take(me).unwrap();
        assert!(other != me && !std::path::Path::new(&format!("/proc/{other}")).exists());
    }

    #[test]
    fn a_plain_tree_says_nothing() {
        let me = Process::read(std::process::id() as i32).unwrap().unwrap();
        let n = Numbering::of(std::iter::once(&me)).unwrap();
        assert!(!n.is_inner());
        assert_eq!((n.id(me.pid), n.parent(me.ppid)), (me.pid, me.ppid));
        let mut images = crate::namespace::mnt::testing::Memory::default();
        n.save(&mut images).unwrap();
        assert!(crate::image::ImageSource::names(&images).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn any_status_is_read(text in "\\PC{0,200}") {
            let _ = IdLines::parse(&text);
        }
    }
}
