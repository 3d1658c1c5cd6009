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

mod build;
pub mod compare;
mod create;
mod host;
pub mod mountinfo;
mod nodes;
mod plan;
mod save;
pub(crate) mod schema;
mod sources;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use build::build_mounts;
pub use host::{prepare_host, save_host};
pub use save::{check_mounts, estimate_mounts, save_mounts};
pub use schema::{
    HostMountEntry, HostMountsEntry, MountEntry, MountsEntry, OwnFsEntry, TreeRefEntry, WayEntry,
};

use super::NamespaceError;

/// What a save may take for granted about the host.
#[derive(Debug, Clone)]
pub struct MountPolicy {
    /// Host mounts below these belong to other units or to sessions: whoever
    /// owns them mounts them again, and they reach the service by propagation.
    pub transient: Vec<PathBuf>,
}

impl Default for MountPolicy {
    fn default() -> Self {
        Self {
            transient: vec!["/run/credentials".into(), "/run/user".into()],
        }
    }
}

/// The host that a namespace is built on.
#[derive(Debug, Clone)]
pub struct HostEnv {
    /// This boot, 32 hexadecimal digits: part of the names of private directories.
    pub boot_id: String,
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
        })
    }
}

/// A mount namespace that no task needs to be in.
#[derive(Debug)]
pub struct MountNamespace {
    ns: OwnedFd,
    root: OwnedFd,
}

impl MountNamespace {
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
