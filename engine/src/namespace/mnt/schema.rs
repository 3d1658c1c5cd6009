//! The messages of `rcr-mounts-ID.img` and `rcr-host-mounts.img`.

/// A mount of the host that a service's mounts derive from.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HostMountEntry {
    /// Where it is mounted on the host.
    #[prost(bytes = "vec", tag = "1")]
    pub mountpoint: Vec<u8>,
    /// Type of its file system.
    #[prost(string, tag = "2")]
    pub fstype: String,
    /// What was mounted.
    #[prost(bytes = "vec", tag = "3")]
    pub source: Vec<u8>,
    /// Options of the file system.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub options: Vec<Vec<u8>>,
    /// Flags of the mount (`MOUNT_ATTR_*`).
    #[prost(uint64, tag = "5")]
    pub attrs: u64,
    /// Whether it was shared.
    #[prost(bool, tag = "6")]
    pub shared: bool,
    /// Whether it is mounted early if it is not there yet.
    #[prost(bool, tag = "7")]
    pub create: bool,
    /// Names of a block device that do not depend on the order of discovery.
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub links: Vec<Vec<u8>>,
}

/// A saved tree of a file system.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TreeRefEntry {
    /// The directory in the file system.
    #[prost(bytes = "vec", tag = "1")]
    pub root: Vec<u8>,
    /// The tree's name for [`crate::content`].
    #[prost(string, tag = "2")]
    pub tree: String,
}

/// A file system that only the service has.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct OwnFsEntry {
    /// Its type.
    #[prost(string, tag = "1")]
    pub fstype: String,
    /// What was mounted.
    #[prost(bytes = "vec", tag = "2")]
    pub source: Vec<u8>,
    /// Its options.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub options: Vec<Vec<u8>>,
    /// Its content.
    #[prost(message, repeated, tag = "4")]
    pub trees: Vec<TreeRefEntry>,
    /// Of a proc that shows a PID namespace of the tree: a process in it, by the
    /// images' ids. It is made there, when that process has been born.
    #[prost(int32, optional, tag = "5")]
    pub pid_ns_of: Option<i32>,
}

/// One name on the way to a bind's source on the host.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct WayEntry {
    /// Type and permission bits.
    #[prost(uint32, tag = "1")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "2")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "3")]
    pub gid: u32,
    /// Major number of a device.
    #[prost(uint32, tag = "4")]
    pub major: u32,
    /// Minor number of a device.
    #[prost(uint32, tag = "5")]
    pub minor: u32,
}

/// One mount of the service's namespace.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MountEntry {
    /// Place in the list of the mount it is on; none for the root.
    #[prost(uint32, optional, tag = "1")]
    pub parent: Option<u32>,
    /// Where it is mounted.
    #[prost(bytes = "vec", tag = "2")]
    pub mountpoint: Vec<u8>,
    /// What is mounted, relative to the host mount's or the file system's root; empty is that root.
    #[prost(bytes = "vec", tag = "3")]
    pub root: Vec<u8>,
    /// Flags (`MOUNT_ATTR_*`).
    #[prost(uint64, tag = "4")]
    pub attrs: u64,
    /// It shows a host mount (place in that list).
    #[prost(uint32, optional, tag = "5")]
    pub host: Option<u32>,
    /// It shows a file system of the service's own (place in that list).
    #[prost(uint32, optional, tag = "6")]
    pub own: Option<u32>,
    /// Number of its peer group within this namespace.
    #[prost(uint32, optional, tag = "7")]
    pub group: Option<u32>,
    /// It is in the host mount's peer group.
    #[prost(bool, tag = "8")]
    pub host_peer: bool,
    /// It receives from the host mount's peer group.
    #[prost(bool, tag = "9")]
    pub host_slave: bool,
    /// It receives from this peer group of the namespace.
    #[prost(uint32, optional, tag = "10")]
    pub master: Option<u32>,
    /// It may not be bound.
    #[prost(bool, tag = "11")]
    pub unbindable: bool,
    /// It is left out where the host mount is not there.
    #[prost(bool, tag = "12")]
    pub optional: bool,
    /// The names of `root` one by one, to make those that are missing.
    #[prost(message, repeated, tag = "13")]
    pub way: Vec<WayEntry>,
    /// Content to be brought back into `root`, or the file itself, as a tree of that name.
    #[prost(string, optional, tag = "14")]
    pub tree: Option<String>,
    /// The names from its parent's root to its place one by one, to make those that are missing.
    #[prost(message, repeated, tag = "15")]
    pub place_way: Vec<WayEntry>,
    /// It is not saved: whoever restores says what is bound there under this
    /// name. [`super::ROOT`] is the root directory.
    #[prost(string, optional, tag = "16")]
    pub external: Option<String>,
}

/// A mount namespace.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MountsEntry {
    /// The boot that it comes from, 32 hexadecimal digits.
    #[prost(string, tag = "1")]
    pub boot_id: String,
    /// Host mounts, parents first.
    #[prost(message, repeated, tag = "2")]
    pub hosts: Vec<HostMountEntry>,
    /// The service's own file systems.
    #[prost(message, repeated, tag = "3")]
    pub owns: Vec<OwnFsEntry>,
    /// The mounts, parents first, else in the kernel's order.
    #[prost(message, repeated, tag = "4")]
    pub mounts: Vec<MountEntry>,
}

/// Host mounts that are mounted early for everybody.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HostMountsEntry {
    /// In the host's order.
    #[prost(message, repeated, tag = "1")]
    pub hosts: Vec<HostMountEntry>,
}
