//! Namespaces of a service: saved, refused, built again.
//!
//! | kind | carried |
//! |---|---|
//! | mount | rebuilt mount by mount ([`mnt`]) |
//! | UTS | host and domain name ([`uts`]) |
//! | user | one level below the initial one: id maps ([`user`]) |
//! | network | devices, addresses, routes, filters, settings ([`net`]) |
//! | IPC | System V objects and limits ([`ipc`]) |
//! | PID | ids in every namespace ([`pid`]); made with its first process |
//! | cgroup | made by the first process of the tree that is in it ([`cgroup`]) |
//! | time | by whoever restores the clocks |
//!
//! "The host" is the calling thread's own namespaces throughout.

mod cgroup;
mod error;
mod ids;
pub mod ipc;
mod make;
pub mod mnt;
pub mod net;
pub mod pid;
mod sys;
pub mod user;
pub mod uts;
mod view;

pub use cgroup::check_cgroup;
pub use error::NamespaceError;
pub use ids::{
    NsIds, NsKind, Owner, Remembered, check_namespaces, comm, inode_of, mount_owner, open_cgroup,
    open_ipc, open_net, owner_of, uts_owner,
};
pub(crate) use ipc::as_creator;
pub use ipc::{IpcNamespace, build_ipc, foreign_segments, save_ipc, semaphore_sets};
pub use mnt::{
    Beside, HostEnv, MountNamespace, MountPolicy, Proc, RootShown, build_mounts, check_mounts,
    estimate_mounts, prepare_host, root_shown, save_host, save_mounts,
};
pub use net::{NetNamespace, NetSource, VethEnd, build_nets, check_nets, save_nets};
pub use user::{UserNamespace, build_user, save_user, write_maps};
pub use uts::{UtsNamespace, restore_uts, save_uts};
pub use view::MountView;
