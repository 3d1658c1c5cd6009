//! The messages of a tree's image.

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NodeKind {
    /// Nothing known.
    Unset = 0,
    /// Regular file.
    File = 1,
    /// Directory.
    Dir = 2,
    /// Symbolic link.
    Symlink = 3,
    /// Named pipe.
    Fifo = 4,
    /// Character device.
    Char = 5,
    /// Block device.
    Block = 6,
    /// Socket; not made again.
    Socket = 7,
    /// Another name of the node at `link`.
    Hardlink = 8,
}

/// Bytes of a file that are not a hole.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ExtentEntry {
    /// Where in the file, in bytes.
    #[prost(uint64, tag = "1")]
    pub file_offset: u64,
    /// Where in the tree's data, in bytes.
    #[prost(uint64, tag = "2")]
    pub data_offset: u64,
    /// How many bytes.
    #[prost(uint64, tag = "3")]
    pub len: u64,
}

/// One extended attribute.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct XattrEntry {
    /// Full name (`user.x`).
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Value.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// One node of a tree; parents stand before their children.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NodeEntry {
    /// Path relative to the tree's root; empty is the root itself.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// What it is.
    #[prost(enumeration = "NodeKind", tag = "2")]
    pub kind: i32,
    /// Permission bits with setuid, setgid and sticky.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// Owner, as the initial user namespace counts.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// Group, as the initial user namespace counts.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// Major number of a device.
    #[prost(uint32, tag = "6")]
    pub major: u32,
    /// Minor number of a device.
    #[prost(uint32, tag = "7")]
    pub minor: u32,
    /// Size of a file in bytes.
    #[prost(uint64, tag = "8")]
    pub size: u64,
    /// Time of last access, seconds of the real-time clock.
    #[prost(int64, tag = "9")]
    pub atime_sec: i64,
    /// Its nanoseconds.
    #[prost(uint32, tag = "10")]
    pub atime_nsec: u32,
    /// Time of last change of the content, seconds of the real-time clock.
    #[prost(int64, tag = "11")]
    pub mtime_sec: i64,
    /// Its nanoseconds.
    #[prost(uint32, tag = "12")]
    pub mtime_nsec: u32,
    /// Target of a symbolic link; for [`NodeKind::Hardlink`] the path of the other name.
    #[prost(bytes = "vec", tag = "13")]
    pub link: Vec<u8>,
    /// Extended attributes.
    #[prost(message, repeated, tag = "14")]
    pub xattrs: Vec<XattrEntry>,
    /// Data of a file.
    #[prost(message, repeated, tag = "15")]
    pub extents: Vec<ExtentEntry>,
    /// Directories that only lead to what is carried: made where missing, else left alone.
    #[prost(bool, tag = "16")]
    pub on_the_way: bool,
}

/// A tree.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TreeEntry {
    /// All nodes.
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NodeEntry>,
    /// Length of the data image in bytes.
    #[prost(uint64, tag = "2")]
    pub data_bytes: u64,
}
