//! Where each mount of a service comes from: worked out from the two mount
//! tables alone, so that it can be tested as a value.

use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::mountinfo::MountInfo;
use super::schema::{HostMountEntry, MountEntry, MountsEntry, OwnFsEntry};
use super::{MountPolicy, ROOT};
use crate::namespace::NamespaceError;
use crate::namespace::view::MountView;

/// What the root directory of a mount namespace shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootShown {
    dev: (u32, u32),
    below: PathBuf,
}

/// What the root directory of a task's mount namespace shows.
pub fn root_shown(pid: Pid) -> Result<Option<RootShown>, NamespaceError> {
    let mounts = MountView::of(pid)?.mounts;
    let first = parents_first(&mounts).first().map(|&i| &mounts[i]);
    Ok(first.map(|m| RootShown {
        dev: m.dev,
        below: m.root.clone(),
    }))
}

/// Something in a mount namespace that cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub object: String,
    pub reason: String,
    pub advice: String,
}

impl Problem {
    pub(super) fn mount(m: &MountInfo, reason: impl Into<String>) -> Self {
        Self {
            object: format!("mount {} ({})", m.mountpoint.display(), m.fstype),
            reason: reason.into(),
            advice: "untag the unit or change the setting that mounts it".into(),
        }
    }
}

/// A plan, and which mount each of its parts comes from.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub image: MountsEntry,
    /// For each mount of the image, its place in the service's table.
    pub mounts: Vec<usize>,
    /// For each host mount of the image, its place in the host's table.
    pub hosts: Vec<usize>,
    pub problems: Vec<Problem>,
}

/// Every early boot has these; they are never mounted by us.
const BASE: [&str; 5] = ["/", "/proc", "/sys", "/dev", "/run"];

/// File systems of the kernel's that can be mounted again without a device.
const PSEUDO: [&str; 15] = [
    "tmpfs",
    "mqueue",
    "hugetlbfs",
    "debugfs",
    "tracefs",
    "configfs",
    "fusectl",
    "securityfs",
    "pstore",
    "bpf",
    "efivarfs",
    "cgroup2",
    "devpts",
    "sysfs",
    "proc",
];

/// File systems a service can have of its own: those with content in RAM and those with none.
const OWN: [&str; 7] = [
    "tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "cgroup2",
];

/// Works out the plan for `service` over `host`.
pub(super) fn plan(service: &[MountInfo], host: &[MountInfo], policy: &MountPolicy) -> Plan {
    let mut p = Planner {
        host,
        policy,
        plan: Plan::default(),
        owns: HashMap::new(),
    };
    let order = parents_first(service);
    let place: HashMap<u32, u32> = order
        .iter()
        .enumerate()
        .map(|(at, &i)| (service[i].id, at as u32))
        .collect();
    let groups: Vec<u32> = service.iter().filter_map(|m| m.shared).collect();
    for &i in &order {
        let m = &service[i];
        let parent = place.get(&m.parent).copied().filter(|_| m.parent != m.id);
        p.mount(m, parent, &groups);
        p.plan.mounts.push(i);
    }
    p.finish(service);
    p.plan
}

struct Planner<'a> {
    host: &'a [MountInfo],
    policy: &'a MountPolicy,
    plan: Plan,
    owns: HashMap<(u32, u32), u32>,
}

impl Planner<'_> {
    fn mount(&mut self, m: &MountInfo, parent: Option<u32>, groups: &[u32]) {
        let mut entry = MountEntry {
            parent,
            mountpoint: bytes(&m.mountpoint),
            attrs: m.attrs,
            group: m.shared,
            unbindable: m.unbindable,
            ..MountEntry::default()
        };
        if let Some(flag) = m.unknown_flags.first() {
            self.refuse(m, format!("its flag {flag} is not carried yet"));
        }
        if m.root.as_os_str().as_bytes().ends_with(b"//deleted") {
            self.refuse(m, "the directory or file it shows was deleted");
        }
        let in_group = |g: Option<u32>| {
            let g = g?;
            self.host.iter().any(|h| h.shared == Some(g)).then_some(g)
        };
        let (slave_of, peer_of) = (in_group(m.master), in_group(m.shared));
        entry.host_slave = slave_of.is_some();
        entry.host_peer = peer_of.is_some();
        if entry.host_peer {
            entry.group = None;
        }
        if let (Some(master), None) = (m.master, slave_of) {
            if groups.contains(&master) {
                entry.master = Some(master);
            } else {
                self.refuse(
                    m,
                    "it receives mounts from a mount that the host does not have",
                );
            }
        }
        if let Some((name, root)) = self.external(m) {
            if entry.host_peer {
                self.refuse(m, "it is external, and in a peer group of the host's");
            }
            entry.external = Some(name);
            entry.root = root;
            self.plan.image.mounts.push(entry);
            return;
        }
        match self.host_origin(m, slave_of.or(peer_of)) {
            Some(h) => self.show_host(m, h, &mut entry),
            None if entry.host_slave || entry.host_peer => {
                self.refuse(
                    m,
                    "the host's mount that it belongs to shows only a part of it",
                );
            }
            None => self.own(m, &mut entry),
        }
        self.plan.image.mounts.push(entry);
    }

    /// The name under which somebody else makes `m`, and what of that it shows.
    fn external(&self, m: &MountInfo) -> Option<(String, Vec<u8>)> {
        if let Some(name) = self.policy.external.get(&m.mountpoint) {
            return Some((name.clone(), Vec::new()));
        }
        let root = self.policy.root.as_ref().filter(|r| r.dev == m.dev)?;
        let below = m.root.strip_prefix(&root.below).ok()?;
        Some((ROOT.to_owned(), bytes(below)))
    }

    /// The host mount that shows what `m` shows, if there is one.
    fn host_origin(&self, m: &MountInfo, group: Option<u32>) -> Option<usize> {
        let fits = |h: &MountInfo| {
            h.dev == m.dev
                && h.fstype == m.fstype
                && m.root.starts_with(&h.root)
                && group.is_none_or(|g| h.shared == Some(g))
        };
        let same_place = |h: &MountInfo| h.mountpoint == m.mountpoint && h.root == m.root;
        let all = || self.host.iter().enumerate().filter(|(_, h)| fits(h));
        let nearest = || all().min_by_key(|(_, h)| (h.root.components().count(), h.id));
        all()
            .find(|(_, h)| same_place(h))
            .or_else(nearest)
            .map(|(i, _)| i)
    }

    fn show_host(&mut self, m: &MountInfo, h: usize, entry: &mut MountEntry) {
        let host = &self.host[h];
        let below = m.root.strip_prefix(&host.root).unwrap_or(Path::new(""));
        let as_on_host = m.mountpoint == host.mountpoint && below.as_os_str().is_empty();
        let delivered = as_on_host && follows_host(entry) && self.below_same_parent(host, entry);
        let again = can_mount_again(host, self.host, self.policy);
        let mut create = false;
        if !BASE.iter().any(|b| host.mountpoint.as_os_str() == *b) {
            let follows = delivered && m.attrs == host.attrs && is_pseudo(host);
            entry.optional = delivered && (follows || !again);
            create = again && !follows;
            if as_on_host && has_automount(host, self.host) {
                // Mounted on demand, and by whoever owns the automount point: nothing to wait for.
                entry.optional = true;
            } else if !again && !delivered {
                if matches!(host.fstype.as_str(), "tmpfs" | "ramfs") {
                    // Somebody else's and not there in time: the service gets a copy.
                    (entry.host_slave, entry.host_peer) = (false, false);
                    return self.own(m, entry);
                }
                let at = host.mountpoint.display();
                self.refuse(m, format!("it shows {at}, which early boot cannot mount"));
            }
        }
        entry.root = bytes(below);
        let known = self.plan.hosts.iter().position(|&known| known == h);
        let at = known.unwrap_or_else(|| {
            self.plan.hosts.push(h);
            self.plan.image.hosts.push(host_entry(host));
            self.plan.hosts.len() - 1
        });
        self.plan.image.hosts[at].create |= create;
        entry.host = Some(at as u32);
    }

    /// Whether what the host mounts there later arrives here by propagation.
    fn below_same_parent(&self, host: &MountInfo, entry: &MountEntry) -> bool {
        let parent = entry.parent.map(|p| &self.plan.image.mounts[p as usize]);
        parent.is_some_and(|parent| {
            let shows = parent
                .host
                .map(|h| self.host[self.plan.hosts[h as usize]].id);
            follows_host(parent) && shows == Some(host.parent)
        })
    }

    fn own(&mut self, m: &MountInfo, entry: &mut MountEntry) {
        if !OWN.contains(&m.fstype.as_str()) && !is_block(m) {
            self.refuse(
                m,
                "a file system of this type that only the service has is not carried yet",
            );
            return;
        }
        entry.root = bytes(m.root.strip_prefix("/").unwrap_or(&m.root));
        let owns = &mut self.plan.image.owns;
        let at = *self.owns.entry(m.dev).or_insert_with(|| {
            owns.push(OwnFsEntry {
                fstype: m.fstype.clone(),
                source: m.source.as_bytes().to_vec(),
                options: options(m),
                trees: Vec::new(),
                pid_ns_of: None,
            });
            owns.len() as u32 - 1
        });
        entry.own = Some(at);
    }

    fn finish(&mut self, service: &[MountInfo]) {
        let Some(&first) = self.plan.mounts.first() else {
            return;
        };
        let root = &service[first];
        if root.mountpoint.as_os_str() != "/" {
            self.refuse(root, "the namespace has no mount for its root directory");
        }
        let roots = self
            .plan
            .image
            .mounts
            .iter()
            .filter(|m| m.parent.is_none())
            .count();
        if roots > 1 {
            self.refuse(root, "the namespace has more than one root mount");
        }
        self.need_parents();
        // Parents first, as on the host, whatever order the service's mounts named them in.
        let order = parents_first(self.host);
        let mut sorted: Vec<usize> = (0..self.plan.hosts.len()).collect();
        sorted.sort_by_key(|&at| order.iter().position(|&i| i == self.plan.hosts[at]));
        let new_place: HashMap<u32, u32> = sorted
            .iter()
            .enumerate()
            .map(|(new, &old)| (old as u32, new as u32))
            .collect();
        self.plan.image.hosts = sorted
            .iter()
            .map(|&i| self.plan.image.hosts[i].clone())
            .collect();
        self.plan.hosts = sorted.iter().map(|&i| self.plan.hosts[i]).collect();
        for m in &mut self.plan.image.mounts {
            m.host = m.host.map(|h| new_place[&h]);
        }
    }

    /// What something of the service's own is mounted on must be there in time.
    fn need_parents(&mut self) {
        for i in (0..self.plan.image.mounts.len()).rev() {
            let m = &self.plan.image.mounts[i];
            let (false, Some(p)) = (m.optional, m.parent) else {
                continue;
            };
            let parent = &mut self.plan.image.mounts[p as usize];
            let Some(h) = parent.host.filter(|_| parent.optional) else {
                continue;
            };
            if can_mount_again(
                &self.host[self.plan.hosts[h as usize]],
                self.host,
                self.policy,
            ) {
                parent.optional = false;
                self.plan.image.hosts[h as usize].create = true;
            }
        }
    }

    fn refuse(&mut self, m: &MountInfo, reason: impl Into<String>) {
        self.plan.problems.push(Problem::mount(m, reason));
    }
}

/// Whether what happens on the host mount that it shows happens here too.
fn follows_host(m: &MountEntry) -> bool {
    m.host_slave || m.host_peer
}

/// Whether early boot can mount it from what is recorded.
pub(super) fn can_mount_again(h: &MountInfo, host: &[MountInfo], policy: &MountPolicy) -> bool {
    let automount = has_automount(h, host);
    let transient = policy.transient.iter().any(|t| h.mountpoint.starts_with(t));
    let whole = h.root.as_os_str() == "/" || h.fstype == "btrfs";
    whole && !automount && !transient && (is_pseudo(h) || is_block(h))
}

fn has_automount(h: &MountInfo, host: &[MountInfo]) -> bool {
    host.iter()
        .any(|a| a.fstype == "autofs" && a.mountpoint == h.mountpoint)
}

/// A file system without a device that can be mounted again.
pub(super) fn is_pseudo(h: &MountInfo) -> bool {
    PSEUDO.contains(&h.fstype.as_str())
}

/// A file system on a block device.
pub(super) fn is_block(h: &MountInfo) -> bool {
    (h.dev.0 != 0 || h.fstype == "btrfs")
        && h.source.as_bytes().starts_with(b"/dev/")
        && !h.fstype.starts_with("fuse")
}

/// A host mount as the image keeps it.
pub(super) fn host_entry(h: &MountInfo) -> HostMountEntry {
    HostMountEntry {
        mountpoint: bytes(&h.mountpoint),
        fstype: h.fstype.clone(),
        source: h.source.as_bytes().to_vec(),
        options: options(h),
        attrs: h.attrs,
        shared: h.shared.is_some(),
        create: false,
        links: Vec::new(),
    }
}

/// Places of the mounts with every parent before its children, else in order.
fn parents_first(mounts: &[MountInfo]) -> Vec<usize> {
    let known: HashMap<u32, usize> = mounts.iter().enumerate().map(|(i, m)| (m.id, i)).collect();
    let mut order = Vec::with_capacity(mounts.len());
    let mut done = vec![false; mounts.len()];
    for i in 0..mounts.len() {
        let mut way = Vec::new();
        let mut at = Some(i);
        while let Some(j) = at.filter(|&j| !done[j]) {
            done[j] = true;
            way.push(j);
            at = known.get(&mounts[j].parent).copied();
        }
        order.extend(way.into_iter().rev());
    }
    order
}

fn options(m: &MountInfo) -> Vec<Vec<u8>> {
    m.options.iter().map(|o| o.clone().into_vec()).collect()
}

pub(super) fn bytes(path: &Path) -> Vec<u8> {
    PathBuf::from(path).into_os_string().into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::mnt::mountinfo::parse;

    const HOST: &str = "\
        29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
        25 29 0:23 / /proc rw shared:11 - proc proc rw
        28 29 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw
        38 28 0:32 / /run/lock rw shared:13 - tmpfs tmpfs rw
        64 28 0:34 / /run/credentials/a.service ro shared:19 - ramfs ramfs rw
        42 29 254:1 / /var rw shared:18 - xfs /dev/vdb rw
        36 25 0:30 / /proc/sys/fs/binfmt_misc rw shared:12 - autofs systemd-1 rw
        70 29 0:50 / /mnt rw shared:30 - nfs4 server:/x rw
    ";

    fn planned(service: &str) -> Plan {
        let table = |text: &str| {
            let lines: Vec<_> = text.lines().map(str::trim).collect();
            parse(lines.join("\n").as_bytes()).unwrap()
        };
        plan(&table(service), &table(HOST), &MountPolicy::default())
    }

    fn refused(service: &str) -> Vec<String> {
        planned(service)
            .problems
            .into_iter()
            .map(|p| p.object)
            .collect()
    }

    const ROOT: &str = "168 47 254:0 / / ro shared:87 master:1 - ext4 /dev/vda rw\n";

    #[test]
    fn binds_own_file_systems_and_followers() {
        let p = planned(&format!(
            "{ROOT}174 168 0:25 / /run rw,nosuid master:5 - tmpfs tmpfs rw
            175 174 0:32 / /run/lock rw master:13 - tmpfs tmpfs rw
            176 174 0:34 / /run/credentials/a.service ro master:19 - ramfs ramfs rw
            177 174 0:25 /redis /run/redis rw master:5 - tmpfs tmpfs rw
            178 168 254:1 / /var ro master:18 - xfs /dev/vdb rw
            190 168 0:41 / /dev ro shared:135 - tmpfs tmpfs rw,size=4096k
            193 190 0:32 / /dev/lock rw master:13 - tmpfs tmpfs rw"
        ));
        assert_eq!(p.problems, []);
        let optional: Vec<_> = p.image.mounts.iter().map(|m| m.optional).collect();
        assert_eq!(
            optional,
            [false, false, true, true, false, false, false, false]
        );
        let bind = &p.image.mounts[4];
        assert_eq!((&bind.root[..], bind.host_slave), (&b"redis"[..], true));
        let dev = &p.image.mounts[6];
        assert_eq!(
            (dev.own, dev.group, dev.parent),
            (Some(0), Some(135), Some(0))
        );
        let created: Vec<_> = p
            .image
            .hosts
            .iter()
            .filter(|h| h.create)
            .map(|h| &h.mountpoint[..])
            .collect();
        assert_eq!(created, [&b"/run/lock"[..], b"/var"]); // /dev/lock shows the first
    }

    #[test]
    fn a_mount_under_something_of_its_own_is_needed_in_time() {
        let p = planned(&format!(
            "{ROOT}174 168 0:25 / /run rw,nosuid master:5 - tmpfs tmpfs rw
            175 174 0:32 / /run/lock rw master:13 - tmpfs tmpfs rw
            176 175 0:60 / /run/lock/own rw - tmpfs tmpfs rw"
        ));
        let lock = &p.image.mounts[2];
        assert!(!lock.optional && p.image.hosts[lock.host.unwrap() as usize].create);
    }

    #[test]
    fn credentials_of_another_place_are_copied() {
        let p = planned(&format!(
            "{ROOT}200 168 0:34 / /creds ro master:19 - ramfs ramfs rw"
        ));
        assert_eq!(p.problems, []);
        assert_eq!(
            (p.image.mounts[1].own, p.image.mounts[1].host_slave),
            (Some(0), false)
        );
    }

    #[test]
    fn an_automount_point_is_left_to_its_owner() {
        let p = planned(&format!(
            "{ROOT}171 168 0:42 / /proc rw - proc proc rw,hidepid=invisible
            172 171 0:30 / /proc/sys/fs/binfmt_misc rw master:12 - autofs systemd-1 rw"
        ));
        assert_eq!(p.problems, []);
        assert!(p.image.mounts[2].optional);
        assert!(!p.image.hosts.iter().any(|h| h.create));
    }

    #[test]
    fn what_cannot_be_carried_is_named() {
        assert_eq!(
            refused("9 1 0:77 / / rw - overlay o rw"),
            ["mount / (overlay)"]
        );
        assert_eq!(
            refused("9 1 254:0 /srv/root / rw master:1 - ext4 /dev/vda rw"),
            [""; 0]
        );
        let with = |line: &str| refused(&format!("{ROOT}{line}"));
        assert_eq!(
            with("9 168 0:77 / /data rw - fuse.x x rw"),
            ["mount /data (fuse.x)"]
        );
        assert_eq!(
            with("9 168 0:50 / /elsewhere rw master:30 - nfs4 s:/x rw"),
            ["mount /elsewhere (nfs4)"]
        );
        assert_eq!(
            with("9 168 0:25 /gone//deleted /x rw master:5 - tmpfs tmpfs rw"),
            ["mount /x (tmpfs)"]
        );
        assert_eq!(
            with("9 168 0:25 /a /x rw,idmapped master:5 - tmpfs tmpfs rw"),
            ["mount /x (tmpfs)"]
        );
        assert_eq!(
            with("9 168 0:25 /a /x rw master:99 - tmpfs tmpfs rw"),
            ["mount /x (tmpfs)"]
        );
    }
}
