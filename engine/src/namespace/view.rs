//! Looking at another task's mount namespace from outside.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::unistd::Pid;
use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::NamespaceError;
use super::ids::open_ns;
use super::mnt::mountinfo::{self, MountInfo};
use super::sys::unshare;

/// A mount namespace as one of its tasks' kin sees it: from its root, not from
/// whatever a task has made its root directory.
#[derive(Debug)]
pub struct MountView {
    /// The namespace itself.
    pub ns: OwnedFd,
    /// Its root directory (`O_PATH`).
    pub root: OwnedFd,
    /// Its mounts, in the kernel's order.
    pub mounts: Vec<MountInfo>,
}

impl MountView {
    /// The namespace that task is in.
    pub fn of(pid: Pid) -> Result<Self, NamespaceError> {
        Self::at(open_ns(&format!("/proc/{pid}/ns/mnt"))?)
    }

    /// The calling thread's own.
    pub fn own() -> Result<Self, NamespaceError> {
        Self::at(open_ns("/proc/thread-self/ns/mnt")?)
    }

    /// That one.
    pub fn at(ns: OwnedFd) -> Result<Self, NamespaceError> {
        // The namespace's own /proc may hide us or be absent, so the host's is used.
        let proc = open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(NamespaceError::call("open", "/proc"))?;
        let (root, text) = inside(&ns, "mount namespace", || {
            let root = open(
                "/",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(NamespaceError::call("open", "/"))?;
            let name = "thread-self/mountinfo";
            let file = openat(&proc, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(NamespaceError::call("open", name))?;
            let mut text = Vec::new();
            std::fs::File::from(file)
                .read_to_end(&mut text)
                .map_err(NamespaceError::call("read", name))?;
            Ok((root, text))
        })?;
        let mounts = mountinfo::parse(&text).map_err(|line| NamespaceError::Format {
            path: "mountinfo".into(),
            line,
        })?;
        Ok(Self { ns, root, mounts })
    }
}

/// Does something in a mount namespace, on a thread of its own that ends there.
pub(super) fn inside<T: Send>(
    ns: &OwnedFd,
    what: &'static str,
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    on_own_thread(what, || {
        // A thread that shares its root directory with others may not change namespace.
        unshare(UnshareFlags::FS).map_err(NamespaceError::call("unshare", what))?;
        move_into_link_name_space(ns.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(NamespaceError::call("setns", what))?;
        work()
    })
}

/// Does something in a namespace of that kind, on a thread of its own that
/// ends there; without one, where the caller is.
pub(super) fn within<T: Send>(
    ns: Option<BorrowedFd<'_>>,
    kind: LinkNameSpaceType,
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    let Some(ns) = ns else { return work() };
    on_own_thread("namespace", || {
        move_into_link_name_space(ns, Some(kind))
            .map_err(NamespaceError::call("setns", "namespace"))?;
        work()
    })
}

/// Runs `work` on a new thread that inherits the caller's namespaces, and waits.
pub(super) fn on_own_thread<T: Send>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    std::thread::scope(|s| {
        s.spawn(work)
            .join()
            .unwrap_or(Err(NamespaceError::Helper { what }))
    })
}

/// Opens a directory or file of the calling thread, for its place alone.
pub(super) fn open_path(path: impl AsRef<Path>) -> Result<OwnedFd, NamespaceError> {
    let path = path.as_ref();
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(NamespaceError::call("open", path))
}
