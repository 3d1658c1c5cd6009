//! Mount namespaces: saved as where each mount came from, built again over a
//! host that has just booted.
//!
//! ```text
//! save   service's mountinfo + host's mountinfo ─► plan ─► rcr-mounts-ID.img, trees of content
//! build  host: mount what early boot lacks, make the sources of binds
//!        new namespace: every host mount and own file system staged once,
//!        each saved mount a clone of its part; attached; peer groups joined
//! ```
//! What early boot does not have and the service sees exactly as the host does
//! is left out: it reaches the service later by propagation, as on any boot.

mod assembly;
mod build;
pub mod compare;
mod create;
mod host;
pub mod mountinfo;
mod nodes;
mod plan;
mod procs;
mod propagation;
mod save;
pub(crate) mod schema;
mod sources;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use build::build_mounts;
pub use host::{prepare_host, save_host};
pub use plan::{RootShown, root_shown};
pub use procs::{Proc, Unfinished};
pub use save::{check_mounts, estimate_mounts, save_mounts};
pub use schema::{
    HostMountEntry, HostMountsEntry, MountEntry, MountsEntry, OwnFsEntry, TreeRefEntry, WayEntry,
};

use super::NamespaceError;

/// Under this name the root directory of a tree is external.
pub const ROOT: &str = "/";

/// What a save may take for granted about the host.
#[derive(Debug, Clone)]
pub struct MountPolicy {
    /// Host mounts below these belong to other units or to sessions: whoever
    /// owns them mounts them again, and they reach the service by propagation.
    pub transient: Vec<PathBuf>,
    /// Mounts that are not saved, by their places: whoever restores binds
    /// something there, which has this name.
    pub external: BTreeMap<PathBuf, String>,
    /// Whoever restores gives the root directory; `None`: it is where it was.
    pub root: Option<RootShown>,
}

impl Default for MountPolicy {
    fn default() -> Self {
        Self {
            transient: vec!["/run/credentials".into(), "/run/user".into()],
            external: BTreeMap::new(),
            root: None,
        }
    }
}

/// The host that a namespace is built on.
#[derive(Debug, Clone)]
pub struct HostEnv {
    /// This boot, 32 hexadecimal digits: part of the names of private directories.
    pub boot_id: String,
    /// What the root directory shows instead of what it did: a mount point.
    pub root: Option<PathBuf>,
    /// Whether that is so although the root directory was not saved as external.
    pub root_anyway: bool,
    /// What is bound for mounts that were not saved, by their names.
    pub external: BTreeMap<String, PathBuf>,
    /// Nothing is mounted on the host itself: what it lacks is an error.
    pub as_it_is: bool,
}

/// The other namespaces of a mount namespace's tasks, where they are not the
/// host's: some file systems show that in which they are mounted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Beside<'a> {
    /// Shown by sysfs.
    pub net: Option<BorrowedFd<'a>>,
    /// Shown by mqueue.
    pub ipc: Option<BorrowedFd<'a>>,
}

impl HostEnv {
    /// The running host.
    pub fn current() -> Result<Self, NamespaceError> {
        let path = "/proc/sys/kernel/random/boot_id";
        let id = std::fs::read_to_string(path).map_err(NamespaceError::call("read", path))?;
        Ok(Self {
            boot_id: id.trim().replace('-', ""),
            root: None,
            root_anyway: false,
            external: BTreeMap::new(),
            as_it_is: false,
        })
    }
}

/// A mount namespace that no task needs to be in.
#[derive(Debug)]
pub struct MountNamespace {
    ns: OwnedFd,
    root: OwnedFd,
    /// What waits for processes.
    rest: RefCell<Option<Unfinished>>,
}

impl MountNamespace {
    /// What cannot be mounted before there are processes, to be given to
    /// [`Unfinished::finish`].
    pub fn take_unfinished(&self) -> Option<Unfinished> {
        self.rest.take()
    }

    /// For setns(2) with `CLONE_NEWNS`, by a task that shares its root directory with none.
    pub fn ns(&self) -> BorrowedFd<'_> {
        self.ns.as_fd()
    }

    /// Its root directory (`O_PATH`).
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Name of a namespace's image.
fn image_name(ns_id: u32) -> String {
    format!("rcr-mounts-{ns_id}.img")
}
