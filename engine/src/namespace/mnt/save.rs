//! Saving a mount namespace.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::mountinfo::MountInfo;
use super::plan::{Plan, Problem, plan};
use super::schema::TreeRefEntry;
use super::{HostEnv, MountPolicy, host, image_name, nodes};
use crate::Refusal;
use crate::content::{estimate_tree, save_node, save_tree};
use crate::image::{ImageSink, Kind, put_records};
use crate::namespace::view::{MountView, inside};
use crate::namespace::{NamespaceError, NsIds, NsKind, ids};

/// Saves the mount namespace that `pid`, a stopped task, is in.
/// `pid_namespaces` has those of the tree by inode number, each with the images'
/// id of a process in it.
///
/// Writes `rcr-mounts-ID.img` and the trees of content it names. What cannot
/// be carried is returned; then nothing was written.
pub fn save_mounts(
    pid: Pid,
    ns_id: u32,
    policy: &MountPolicy,
    pid_namespaces: &BTreeMap<u64, i32>,
    sink: &mut dyn ImageSink,
) -> Result<Vec<Refusal>, NamespaceError> {
    let mut found = Examined::of(pid, policy)?;
    found.procs(pid, pid_namespaces)?;
    if !found.plan.problems.is_empty() {
        return Ok(found.refusals(pid));
    }
    for (i, content) in found.contents.iter().enumerate() {
        let name = format!("mounts-{ns_id}-{i}");
        content.save(&name, sink)?;
        match content.of {
            Of::Own { fs, ref root } => found.plan.image.owns[fs].trees.push(TreeRefEntry {
                root: root.as_os_str().as_bytes().to_vec(),
                tree: name,
            }),
            Of::Source { mount } => found.plan.image.mounts[mount].tree = Some(name),
        }
    }
    put_records(
        sink,
        Kind::RcrNamespaces,
        &image_name(ns_id),
        &[found.plan.image],
    )?;
    Ok(Vec::new())
}

/// What [`save_mounts`] would refuse. Reads alone.
pub fn check_mounts(
    pid: Pid,
    policy: &MountPolicy,
    pid_namespaces: &BTreeMap<u64, i32>,
) -> Result<Vec<Refusal>, NamespaceError> {
    let mut found = Examined::of(pid, policy)?;
    found.procs(pid, pid_namespaces)?;
    Ok(found.refusals(pid))
}

/// How many bytes [`save_mounts`] would put into the store, about.
pub fn estimate_mounts(pid: Pid, policy: &MountPolicy) -> Result<u64, NamespaceError> {
    let mut bytes = 64 << 10;
    for content in Examined::of(pid, policy)?.contents {
        bytes += content.estimate()?;
    }
    Ok(bytes)
}

/// What a piece of content belongs to.
enum Of {
    /// Directory `root` of the plan's own file system `fs`.
    Own { fs: usize, root: PathBuf },
    /// The source of the plan's mount `mount`.
    Source { mount: usize },
}

struct Content {
    of: Of,
    /// A directory to be taken whole, or the one `leaf` is in.
    dir: OwnedFd,
    leaf: Option<PathBuf>,
    /// Where the service sees it.
    seen: PathBuf,
}

impl Content {
    fn save(&self, name: &str, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
        match &self.leaf {
            Some(leaf) => save_node(self.dir.as_fd(), leaf.as_os_str(), name, sink),
            None => save_tree(self.dir.as_fd(), name, sink),
        }
        .map(drop)
        .map_err(NamespaceError::content(&self.seen))
    }

    fn estimate(&self) -> Result<u64, NamespaceError> {
        match self.leaf {
            Some(_) => Ok(1 << 20),
            None => estimate_tree(self.dir.as_fd()).map_err(NamespaceError::content(&self.seen)),
        }
    }
}

struct Examined {
    plan: Plan,
    contents: Vec<Content>,
}

impl Examined {
    fn of(pid: Pid, policy: &MountPolicy) -> Result<Self, NamespaceError> {
        let (service, host) = (MountView::of(pid)?, MountView::own()?);
        let mut plan = plan(&service.mounts, &host.mounts, policy);
        plan.image.boot_id = HostEnv::current()?.boot_id;
        for (entry, &at) in plan.image.hosts.iter_mut().zip(&plan.hosts) {
            entry.links = host::device_links(&host.mounts[at])?;
        }
        let mut this = Self {
            plan,
            contents: Vec::new(),
        };
        if this.plan.problems.is_empty() {
            this.sources(&service, &host)?;
            this.places(&host)?;
            this.own_trees(&service)?;
        }
        Ok(this)
    }

    /// The ways to binds' sources on the host, and the content some of them need.
    fn sources(&mut self, service: &MountView, host: &MountView) -> Result<(), NamespaceError> {
        let mut tops: HashMap<u32, OwnedFd> = HashMap::new();
        for i in 0..self.plan.image.mounts.len() {
            let m = &service.mounts[self.plan.mounts[i]];
            let entry = &self.plan.image.mounts[i];
            let Some(h) = entry.host.filter(|_| !entry.root.is_empty()) else {
                continue;
            };
            let below = PathBuf::from(OsStr::from_bytes(&entry.root));
            let on = &host.mounts[self.plan.hosts[h as usize]];
            if !is_volatile(on) && !nodes::tied_to_boot(&below) {
                continue;
            }
            if let std::collections::hash_map::Entry::Vacant(v) = tops.entry(h) {
                // One that others cover on the host cannot be looked at, and nobody needs it.
                let Some(top) = bare_clone(&host.ns, &host.root, on)? else {
                    continue;
                };
                v.insert(top);
            }
            let top = &tops[&h];
            let way = nodes::describe(top, &below)?;
            let kind = way.last().map_or(0, |w| w.mode & libc::S_IFMT);
            let hidden_with = below.starts_with(nodes::INACCESSIBLE);
            let content = match kind {
                _ if hidden_with => None,
                libc::S_IFSOCK => {
                    let reason = "it shows a socket, which its owner makes anew after the boot";
                    self.plan.problems.push(Problem::mount(m, reason));
                    None
                }
                libc::S_IFDIR if nodes::tied_to_boot(&below) => Some((open_in(top, &below)?, None)),
                libc::S_IFREG => {
                    let up = below.parent().filter(|p| !p.as_os_str().is_empty());
                    let dir = open_in(top, up.unwrap_or(Path::new(".")))?;
                    Some((dir, below.file_name().map(PathBuf::from)))
                }
                _ => None,
            };
            if let Some((dir, leaf)) = content {
                let seen = m.mountpoint.clone();
                self.contents.push(Content {
                    of: Of::Source { mount: i },
                    dir,
                    leaf,
                    seen,
                });
            }
            self.plan.image.mounts[i].way = way;
        }
        Ok(())
    }

    /// The ways to places on volatile file systems of the host that are mounted on.
    fn places(&mut self, host: &MountView) -> Result<(), NamespaceError> {
        let mut tops: HashMap<u32, OwnedFd> = HashMap::new();
        for i in 0..self.plan.image.mounts.len() {
            let entry = &self.plan.image.mounts[i];
            let Some(above) = entry.parent.map(|p| &self.plan.image.mounts[p as usize]) else {
                continue;
            };
            let Some(h) = above.host else { continue };
            let on = &host.mounts[self.plan.hosts[h as usize]];
            if !is_volatile(on) {
                continue;
            }
            if let std::collections::hash_map::Entry::Vacant(v) = tops.entry(h) {
                // One that others cover on the host cannot be looked at, and nobody needs it.
                let Some(top) = bare_clone(&host.ns, &host.root, on)? else {
                    continue;
                };
                v.insert(top);
            }
            let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
            let (place, above_place) = (path(&entry.mountpoint), path(&above.mountpoint));
            let below = place.strip_prefix(above_place).unwrap_or(&place);
            let way = nodes::describe(&tops[&h], &path(&above.root).join(below))?;
            self.plan.image.mounts[i].place_way = way;
        }
        Ok(())
    }

    /// The directories of own file systems that hold content and can be seen.
    fn own_trees(&mut self, service: &MountView) -> Result<(), NamespaceError> {
        let mut found: Vec<(usize, PathBuf, usize)> = Vec::new();
        for (i, entry) in self.plan.image.mounts.iter().enumerate() {
            let Some(fs) = entry.own.map(|o| o as usize) else {
                continue;
            };
            if !matches!(self.plan.image.owns[fs].fstype.as_str(), "tmpfs" | "ramfs") {
                continue;
            }
            let root = PathBuf::from(OsStr::from_bytes(&entry.root));
            found.push((fs, root, self.plan.mounts[i]));
        }
        found.sort_by_key(|(fs, root, _)| (*fs, root.components().count()));
        let mut taken: Vec<(usize, PathBuf)> = Vec::new();
        for (fs, root, at) in found {
            if taken.iter().any(|(f, t)| *f == fs && root.starts_with(t)) {
                continue;
            }
            let m = &service.mounts[at];
            if m.unbindable {
                let reason = "it is unbindable, so its content cannot be read apart";
                self.plan.problems.push(Problem::mount(m, reason));
                continue;
            }
            // What other mounts cover, no path of the service leads to.
            let Some(dir) = bare_clone(&service.ns, &service.root, m)? else {
                continue;
            };
            let kind = statx(&dir, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
                .map_err(NamespaceError::call("statx", &m.mountpoint))?;
            if u32::from(kind.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
                let reason =
                    "it shows a single file of a file system that is not visible otherwise";
                self.plan.problems.push(Problem::mount(m, reason));
                continue;
            }
            taken.push((fs, root.clone()));
            let seen = m.mountpoint.clone();
            self.contents.push(Content {
                of: Of::Own { fs, root },
                dir,
                leaf: None,
                seen,
            });
        }
        Ok(())
    }

    /// Finds out whose processes each proc of the service's own shows.
    fn procs(
        &mut self,
        pid: Pid,
        pid_namespaces: &BTreeMap<u64, i32>,
    ) -> Result<(), NamespaceError> {
        let host = NsIds::own()?.get(NsKind::Pid);
        let service = MountView::of(pid)?;
        for fs in 0..self.plan.image.owns.len() {
            if self.plan.image.owns[fs].fstype != "proc" {
                continue;
            }
            let entries = self.plan.image.mounts.iter().zip(&self.plan.mounts);
            let shows = entries.filter(|(e, _)| e.own == Some(fs as u32));
            let shows: Vec<_> = shows.map(|(e, &at)| (e.root.is_empty(), at)).collect();
            let mut shown = None;
            for &(_, at) in shows.iter().filter(|(whole, _)| *whole) {
                if let Some(root) = open_mount(&service.root, &service.mounts[at])? {
                    shown = pid_namespace_of(&root);
                    break;
                }
            }
            let Some(&(_, at)) = shows.first() else {
                continue;
            };
            let m = &service.mounts[at];
            let own = &mut self.plan.image.owns[fs];
            match shown {
                Some(inode) if inode == host => {}
                Some(inode) => match pid_namespaces.get(&inode) {
                    Some(&process) => own.pid_ns_of = Some(process),
                    None => {
                        let reason = "it shows a PID namespace that no process of the tree is in";
                        self.plan.problems.push(Problem::mount(m, reason));
                    }
                },
                None => {
                    let reason = "it cannot be seen whose processes it shows";
                    self.plan.problems.push(Problem::mount(m, reason));
                }
            }
        }
        Ok(())
    }

    fn refusals(&self, pid: Pid) -> Vec<Refusal> {
        let comm = ids::comm(pid);
        let refusal = |p: &Problem| Refusal {
            pid: pid.as_raw(),
            comm: comm.clone(),
            object: p.object.clone(),
            reason: p.reason.clone(),
            advice: p.advice.clone(),
        };
        self.plan.problems.iter().map(refusal).collect()
    }
}

/// Whether what is on it is gone after a boot.
fn is_volatile(m: &MountInfo) -> bool {
    matches!(m.fstype.as_str(), "tmpfs" | "ramfs")
}

/// Inode number of the PID namespace that a proc shows: that of a process in it,
/// its first one unless that may not be looked at.
fn pid_namespace_of(root: &OwnedFd) -> Option<u64> {
    let namespace = |pid: &str| -> Option<u64> {
        let link = rustix::fs::readlinkat(root, format!("{pid}/ns/pid"), Vec::new()).ok()?;
        let name = link.to_str().ok()?;
        name.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
    };
    if let Some(first) = namespace("1") {
        return Some(first);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(root, ".", flags, Mode::empty()).ok()?;
    let dir = rustix::fs::Dir::new(dir).ok()?;
    let names = dir.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
    let pids = names.filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    // Who is in a namespace below has further ids.
    let inside = |pid: &String| {
        let status = open_read(root, &format!("{pid}/status"));
        let line = |text: String| {
            let ids = text.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
            Some(ids.split_ascii_whitespace().count())
        };
        status.and_then(line) == Some(1)
    };
    pids.filter(inside).find_map(|pid| namespace(&pid))
}

fn open_read(root: &OwnedFd, path: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(root, path, flags, Mode::empty()).ok()?;
    std::io::read_to_string(std::fs::File::from(file)).ok()
}

/// Opens the mount's root by its path, if that is what the path leads to.
fn open_mount(root: &OwnedFd, m: &MountInfo) -> Result<Option<OwnedFd>, NamespaceError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let err = |call| NamespaceError::call(call, &m.mountpoint);
    let fd = match openat2(root, &m.mountpoint, flags, Mode::empty(), how) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(e) => return Err(err("open")(e)),
    };
    let stat = statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map_err(err("statx"))?;
    Ok((stat.stx_mnt_id == u64::from(m.id)).then_some(fd))
}

/// A copy of one mount of a namespace, without what is mounted on it; none if others cover it.
fn bare_clone(
    ns: &OwnedFd,
    root: &OwnedFd,
    m: &MountInfo,
) -> Result<Option<OwnedFd>, NamespaceError> {
    let Some(at) = open_mount(root, m)? else {
        return Ok(None);
    };
    inside(ns, "mount namespace", || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        open_tree(&at, "", flags).map_err(NamespaceError::call("open_tree", &m.mountpoint))
    })
    .map(Some)
}

fn open_in(top: &OwnedFd, path: &Path) -> Result<OwnedFd, NamespaceError> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(
        top,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        how,
    )
    .map_err(NamespaceError::call("open", path))
}
