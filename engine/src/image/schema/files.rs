//! Descriptor tables and what the descriptors refer to.

#![allow(missing_docs)]

use super::fsnotify::{FanotifyFileEntry, InotifyFileEntry};
use super::ns::TunfileEntry;
use super::sockets::{InetSkEntry, NetlinkSkEntry, PacketSockEntry, UnixSkEntry};
use super::tty::TtyFileEntry;

/// Kind of an open file; says which field of [`FileEntry`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FdTypes {
    Und = 0,
    Reg = 1,
    Pipe = 2,
    Fifo = 3,
    Inetsk = 4,
    Unixsk = 5,
    Eventfd = 6,
    Eventpoll = 7,
    Inotify = 8,
    Signalfd = 9,
    Packetsk = 10,
    Tty = 11,
    Fanotify = 12,
    Netlinksk = 13,
    Ns = 14,
    Tunf = 15,
    Ext = 16,
    Timerfd = 17,
    Memfd = 18,
    Bpfmap = 19,
    Pidfd = 20,
    CtlTty = 65534,
    AutofsPipe = 65535,
}

/// One slot of a descriptor table.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FdinfoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(enumeration = "FdTypes", required, tag = "3")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "4")]
    pub fd: u32,
    #[prost(string, optional, tag = "5")]
    pub xattr_security_selinux: Option<String>,
}

/// One open file description; `type` says which other field is set.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FileEntry {
    #[prost(enumeration = "FdTypes", required, tag = "1")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
    #[prost(message, optional, tag = "3")]
    pub reg: Option<RegFileEntry>,
    #[prost(message, optional, boxed, tag = "4")]
    pub isk: Option<Box<InetSkEntry>>,
    #[prost(message, optional, tag = "5")]
    pub nsf: Option<NsFileEntry>,
    #[prost(message, optional, boxed, tag = "6")]
    pub psk: Option<Box<PacketSockEntry>>,
    #[prost(message, optional, boxed, tag = "7")]
    pub nlsk: Option<Box<NetlinkSkEntry>>,
    #[prost(message, optional, tag = "8")]
    pub efd: Option<EventfdFileEntry>,
    #[prost(message, optional, tag = "9")]
    pub epfd: Option<EventpollFileEntry>,
    #[prost(message, optional, tag = "10")]
    pub sgfd: Option<SignalfdEntry>,
    #[prost(message, optional, boxed, tag = "11")]
    pub tunf: Option<Box<TunfileEntry>>,
    #[prost(message, optional, tag = "12")]
    pub tfd: Option<TimerfdEntry>,
    #[prost(message, optional, boxed, tag = "13")]
    pub ify: Option<Box<InotifyFileEntry>>,
    #[prost(message, optional, boxed, tag = "14")]
    pub ffy: Option<Box<FanotifyFileEntry>>,
    #[prost(message, optional, tag = "15")]
    pub ext: Option<ExtFileEntry>,
    #[prost(message, optional, boxed, tag = "16")]
    pub usk: Option<Box<UnixSkEntry>>,
    #[prost(message, optional, tag = "17")]
    pub fifo: Option<FifoEntry>,
    #[prost(message, optional, tag = "18")]
    pub pipe: Option<PipeEntry>,
    #[prost(message, optional, boxed, tag = "19")]
    pub tty: Option<Box<TtyFileEntry>>,
    #[prost(message, optional, boxed, tag = "20")]
    pub memfd: Option<Box<MemfdFileEntry>>,
    #[prost(message, optional, boxed, tag = "21")]
    pub bpf: Option<Box<BpfmapFileEntry>>,
    #[prost(message, optional, tag = "22")]
    pub pidfd: Option<PidfdEntry>,
}

/// Who gets SIGIO for a file (`F_SETOWN`).
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FownEntry {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub euid: u32,
    #[prost(uint32, required, tag = "3")]
    pub signum: u32,
    #[prost(uint32, required, tag = "4")]
    pub pid_type: u32,
    #[prost(uint32, required, tag = "5")]
    pub pid: u32,
}

/// A file opened by path: regular, directory, device or a mapped file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
    #[prost(string, required, tag = "6")]
    pub name: String,
    #[prost(sint32, optional, tag = "7", default = "-1")]
    pub mnt_id: Option<i32>,
    #[prost(uint64, optional, tag = "8")]
    pub size: Option<u64>,
    #[prost(bool, optional, tag = "9")]
    pub ext: Option<bool>,
    #[prost(uint32, optional, tag = "10")]
    pub mode: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    pub build_id: Vec<u32>,
    #[prost(uint32, optional, tag = "12")]
    pub checksum: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    pub checksum_config: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub checksum_parameter: Option<u32>,
}

/// A task's working directory, root and umask.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FsEntry {
    #[prost(uint32, required, tag = "1")]
    pub cwd_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub root_id: u32,
    #[prost(uint32, optional, tag = "3")]
    pub umask: Option<u32>,
}

/// A descriptor of a namespace.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct NsFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ns_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub ns_cflag: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags: u32,
}

/// A file whose recorded path no longer leads to it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemapFilePathEntry {
    #[prost(uint32, required, tag = "1")]
    pub orig_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub remap_id: u32,
    #[prost(enumeration = "RemapType", optional, tag = "3")]
    pub remap_type: Option<i32>,
}

/// An unlinked file carried by content; the content follows the record.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GhostFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub gid: u32,
    #[prost(uint32, required, tag = "3")]
    pub mode: u32,
    #[prost(uint32, optional, tag = "4")]
    pub dev: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub ino: Option<u64>,
    #[prost(uint32, optional, tag = "6")]
    pub rdev: Option<u32>,
    #[prost(message, optional, tag = "7")]
    pub atim: Option<Timeval>,
    #[prost(message, optional, tag = "8")]
    pub mtim: Option<Timeval>,
    #[prost(bool, optional, tag = "9")]
    pub chunks: Option<bool>,
    #[prost(uint64, optional, tag = "10")]
    pub size: Option<u64>,
    #[prost(string, optional, tag = "11")]
    pub symlnk_target: Option<String>,
}

/// A piece of a sparse ghost file; `len` bytes follow.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct GhostChunkEntry {
    #[prost(uint64, required, tag = "1")]
    pub len: u64,
    #[prost(uint64, required, tag = "2")]
    pub off: u64,
}

/// One end of a pipe; equal `pipe_id`, same pipe.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PipeEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, optional, tag = "5")]
    pub uid: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    pub gid: Option<u32>,
}

/// What was buffered in a pipe; `bytes` bytes follow.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PipeDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub bytes: u32,
    #[prost(uint32, optional, tag = "3")]
    pub size: Option<u32>,
}

/// A named pipe; its path is the file `regf_id`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FifoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, optional, tag = "3")]
    pub regf_id: Option<u32>,
    #[prost(bool, optional, tag = "4")]
    pub wait_writer: Option<bool>,
}

/// An eventfd and its count.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EventfdFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint64, required, tag = "4")]
    pub counter: u64,
}

/// An epoll instance and what it watches.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EventpollFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(message, repeated, tag = "4")]
    pub tfd: Vec<EventpollTfdEntry>,
}

/// One file watched by an epoll instance.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct EventpollTfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub tfd: u32,
    #[prost(uint32, required, tag = "3")]
    pub events: u32,
    #[prost(uint64, required, tag = "4")]
    pub data: u64,
    #[prost(uint32, optional, tag = "5")]
    pub dev: Option<u32>,
    #[prost(uint64, optional, tag = "6")]
    pub inode: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    pub pos: Option<u64>,
}

/// A timerfd and its setting.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TimerfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "4")]
    pub clockid: u32,
    #[prost(uint64, required, tag = "5")]
    pub ticks: u64,
    #[prost(uint32, required, tag = "6")]
    pub settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    pub vsec: u64,
    #[prost(uint64, required, tag = "8")]
    pub vnsec: u64,
    #[prost(uint64, required, tag = "9")]
    pub isec: u64,
    #[prost(uint64, required, tag = "10")]
    pub insec: u64,
}

/// A signalfd and its mask.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SignalfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint64, required, tag = "4")]
    pub sigmask: u64,
}

/// A descriptor of a memfd.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemfdFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "5")]
    pub inode_id: u32,
}

/// A memfd itself; its content is the shared memory `shmid`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemfdInodeEntry {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint64, required, tag = "4")]
    pub size: u64,
    #[prost(uint32, required, tag = "5")]
    pub shmid: u32,
    #[prost(uint32, required, tag = "6")]
    pub seals: u32,
    #[prost(uint64, required, tag = "7")]
    pub inode_id: u64,
    #[prost(uint32, optional, tag = "8")]
    pub hugetlb_flag: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    pub mode: Option<u32>,
}

/// A pidfd.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(int32, required, tag = "4")]
    pub nspid: i32,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
}

/// A file that the restoring side brings along.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExtFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
}

/// A lock held on a file.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FileLockEntry {
    #[prost(uint32, required, tag = "1")]
    pub flag: u32,
    #[prost(uint32, required, tag = "2")]
    pub r#type: u32,
    #[prost(int32, required, tag = "3")]
    pub pid: i32,
    #[prost(int32, required, tag = "4")]
    pub fd: i32,
    #[prost(int64, required, tag = "5")]
    pub start: i64,
    #[prost(int64, required, tag = "6")]
    pub len: i64,
}

/// How a file without a path comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RemapType {
    Linked = 0,
    Ghost = 1,
    Procfs = 2,
}

/// Content of a BPF map; keys and values follow.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct BpfmapDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub map_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub keys_bytes: u32,
    #[prost(uint32, required, tag = "3")]
    pub values_bytes: u32,
    #[prost(uint32, required, tag = "4")]
    pub count: u32,
}

/// A descriptor of a BPF map.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BpfmapFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "5")]
    pub map_type: u32,
    #[prost(uint32, required, tag = "6")]
    pub key_size: u32,
    #[prost(uint32, required, tag = "7")]
    pub value_size: u32,
    #[prost(uint32, required, tag = "8")]
    pub map_id: u32,
    #[prost(uint32, required, tag = "9")]
    pub max_entries: u32,
    #[prost(uint32, required, tag = "10")]
    pub map_flags: u32,
    #[prost(uint64, required, tag = "11")]
    pub memlock: u64,
    #[prost(bool, required, tag = "12")]
    pub frozen: bool,
    #[prost(string, required, tag = "13")]
    pub map_name: String,
    #[prost(uint32, required, tag = "14")]
    pub ifindex: u32,
    #[prost(sint32, optional, tag = "15")]
    pub mnt_id: Option<i32>,
    #[prost(uint64, optional, tag = "16")]
    pub map_extra: Option<u64>,
}

/// Seconds and microseconds.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Timeval {
    #[prost(uint64, required, tag = "1")]
    pub tv_sec: u64,
    #[prost(uint64, required, tag = "2")]
    pub tv_usec: u64,
}
