//! Which namespaces a task is in, who owns them, and which of them are refused.

use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use super::NamespaceError;
use super::sys::{NsRelation, ns_relative};
use crate::Refusal;

/// A kind of namespace, as `/proc/PID/ns` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum NsKind {
    Mnt,
    User,
    Uts,
    Ipc,
    Net,
    Pid,
    PidForChildren,
    Cgroup,
    Time,
    TimeForChildren,
}

impl NsKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Mnt,
        Self::User,
        Self::Uts,
        Self::Ipc,
        Self::Net,
        Self::Pid,
        Self::PidForChildren,
        Self::Cgroup,
        Self::Time,
        Self::TimeForChildren,
    ];

    /// Its file in `/proc/PID/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Mnt => "mnt",
            Self::User => "user",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::Net => "net",
            Self::Pid => "pid",
            Self::PidForChildren => "pid_for_children",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
            Self::TimeForChildren => "time_for_children",
        }
    }
}

/// The namespaces of a task, by inode number; 0 where the kernel has no such kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NsIds {
    inodes: [u64; NsKind::ALL.len()],
}

thread_local! {
    /// What [`NsIds::remember`] remembers; 0 stands for the calling thread.
    static KNOWN: RefCell<Option<HashMap<i32, NsIds>>> = const { RefCell::new(None) };
}

/// As long as it lives, [`NsIds`] of a task are looked up once.
#[derive(Debug)]
#[must_use]
pub struct Remembered(PhantomData<*const ()>);

impl Drop for Remembered {
    fn drop(&mut self) {
        KNOWN.set(None);
    }
}

impl NsIds {
    /// Those of a task.
    pub fn of(pid: Pid) -> Result<Self, NamespaceError> {
        Self::known(pid.as_raw(), || Self::below(&format!("/proc/{pid}/ns")))
    }

    /// Those of the calling thread.
    pub fn own() -> Result<Self, NamespaceError> {
        Self::known(0, || Self::below("/proc/thread-self/ns"))
    }

    /// From now on every task, and the calling thread, counts as being where it
    /// was first seen. For a tree that stands still, and for a look at one that
    /// runs, which may be outdated at once anyhow.
    pub fn remember() -> Remembered {
        KNOWN.set(Some(HashMap::new()));
        Remembered(PhantomData)
    }

    fn known(
        task: i32,
        look: impl FnOnce() -> Result<Self, NamespaceError>,
    ) -> Result<Self, NamespaceError> {
        let known = KNOWN.with_borrow(|k| k.as_ref().and_then(|k| k.get(&task).copied()));
        if let Some(ids) = known {
            return Ok(ids);
        }
        let ids = look()?;
        KNOWN.with_borrow_mut(|k| k.as_mut().map(|k| k.insert(task, ids)));
        Ok(ids)
    }

    fn below(dir: &str) -> Result<Self, NamespaceError> {
        let mut inodes = [0; NsKind::ALL.len()];
        for (kind, inode) in NsKind::ALL.iter().zip(&mut inodes) {
            let path = format!("{dir}/{}", kind.file());
            *inode = match rustix::fs::stat(&path) {
                Ok(stat) => stat.st_ino,
                // A kernel without the kind, or `pid_for_children` before the first child.
                Err(Errno::NOENT) if Path::new(dir).exists() => 0,
                Err(e) => return Err(NamespaceError::call("stat", path)(e)),
            };
        }
        Ok(Self { inodes })
    }

    /// The inode number of one of them.
    pub fn get(&self, kind: NsKind) -> u64 {
        self.inodes[kind as usize]
    }

    /// Whether both tasks share that namespace.
    pub fn same(&self, other: &Self, kind: NsKind) -> bool {
        self.get(kind) == other.get(kind)
    }
}

/// Which user namespace a namespace belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The host's, as for everything systemd makes with privileges.
    Host,
    /// The task's own.
    Task,
    /// Another one, which is nested in neither's way.
    Other,
}

/// Who owns the mount namespace of a task.
pub fn mount_owner(pid: Pid) -> Result<Owner, NamespaceError> {
    owner(pid, NsKind::Mnt)
}

/// Who owns the UTS namespace of a task.
pub fn uts_owner(pid: Pid) -> Result<Owner, NamespaceError> {
    owner(pid, NsKind::Uts)
}

fn owner(pid: Pid, kind: NsKind) -> Result<Owner, NamespaceError> {
    let path = format!("/proc/{pid}/ns/{}", kind.file());
    let owner = match ns_relative(open_ns(&path)?, NsRelation::Owner) {
        Ok(fd) => inode(&fd, &path)?,
        Err(Errno::PERM) => return Ok(Owner::Other),
        Err(e) => return Err(NamespaceError::call("ioctl NS_GET_USERNS", path)(e)),
    };
    Ok(if owner == NsIds::own()?.get(NsKind::User) {
        Owner::Host
    } else if owner == NsIds::of(pid)?.get(NsKind::User) {
        Owner::Task
    } else {
        Owner::Other
    })
}

/// Namespaces of the task that cannot be carried, each named. Reads alone.
pub fn check_namespaces(pid: Pid) -> Result<Vec<Refusal>, NamespaceError> {
    let (host, task) = (NsIds::own()?, NsIds::of(pid)?);
    let mut refusals = Vec::new();
    let mut refuse = |object: &str, reason: &str, advice: &str| {
        refusals.push(Refusal {
            pid: pid.as_raw(),
            comm: comm(pid),
            object: object.to_owned(),
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        });
    };
    let children = task.get(NsKind::PidForChildren);
    if children != task.get(NsKind::Pid) && threads(pid) > 1 {
        let advice = "try again when it has a single thread";
        refuse(
            "PID namespace for children",
            "it differs from its own, and a process with threads cannot be given one again",
            advice,
        );
    }
    if !task.same(&host, NsKind::User) && parent_user(pid)? != Some(host.get(NsKind::User)) {
        let advice = "untag the unit";
        refuse(
            "user namespace",
            "it is nested deeper than one level below the host's",
            advice,
        );
    }
    for (kind, object) in [
        (NsKind::Mnt, "mount namespace"),
        (NsKind::Uts, "UTS namespace"),
    ] {
        if !task.same(&host, kind) && owner(pid, kind)? != Owner::Host {
            let advice = "untag the unit, or let systemd make the namespace";
            refuse(
                object,
                "it is owned by a user namespace other than the host's",
                advice,
            );
        }
    }
    Ok(refusals)
}

/// The network namespace of a task.
pub fn open_net(pid: Pid) -> Result<OwnedFd, NamespaceError> {
    open_ns(&format!("/proc/{pid}/ns/net"))
}

/// The IPC namespace of a task.
pub fn open_ipc(pid: Pid) -> Result<OwnedFd, NamespaceError> {
    open_ns(&format!("/proc/{pid}/ns/ipc"))
}

/// The cgroup namespace of a task.
pub fn open_cgroup(pid: Pid) -> Result<OwnedFd, NamespaceError> {
    open_ns(&format!("/proc/{pid}/ns/cgroup"))
}

/// What distinguishes a namespace from all others.
pub fn inode_of(ns: impl AsFd) -> Result<u64, NamespaceError> {
    let stat = fstat(ns).map_err(NamespaceError::call("fstat", "namespace"))?;
    Ok(stat.st_ino)
}

/// Inode number of the user namespace that owns a namespace; `None` above the host's.
pub fn owner_of(ns: &OwnedFd) -> Result<Option<u64>, NamespaceError> {
    match ns_relative(ns, NsRelation::Owner) {
        Ok(fd) => inode(&fd, "namespace").map(Some),
        Err(Errno::PERM) => Ok(None),
        Err(e) => Err(NamespaceError::call("ioctl NS_GET_USERNS", "namespace")(e)),
    }
}

/// Inode number of the parent of the task's user namespace; `None` above the host's.
fn parent_user(pid: Pid) -> Result<Option<u64>, NamespaceError> {
    let path = format!("/proc/{pid}/ns/user");
    match ns_relative(open_ns(&path)?, NsRelation::Parent) {
        Ok(fd) => inode(&fd, &path).map(Some),
        Err(Errno::PERM) => Ok(None),
        Err(e) => Err(NamespaceError::call("ioctl NS_GET_PARENT", path)(e)),
    }
}

pub(super) fn open_ns(path: &str) -> Result<OwnedFd, NamespaceError> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(NamespaceError::call("open", path))
}

fn inode(fd: &OwnedFd, path: &str) -> Result<u64, NamespaceError> {
    Ok(fstat(fd)
        .map_err(NamespaceError::call("fstat", path))?
        .st_ino)
}

fn threads(pid: Pid) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// The task's name, for messages.
pub fn comm(pid: Pid) -> String {
    let name = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_of_the_host_is_not_refused() {
        let me = nix::unistd::gettid();
        assert!(check_namespaces(me).unwrap().is_empty());
        assert_eq!(NsIds::of(me).unwrap(), NsIds::own().unwrap());
        assert_eq!(mount_owner(me).unwrap(), Owner::Host);
    }

    #[test]
    fn namespaces_that_are_carried_are_not_refused() {
        use nix::sched::{CloneFlags, unshare};
        let (tid, _keep) = crate::namespace::mnt::testing::parked(|| {
            let flags = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWCGROUP;
            unshare(flags | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNS).unwrap();
        });
        assert_eq!(check_namespaces(tid).unwrap(), []);
    }
}
