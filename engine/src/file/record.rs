//! What `rcr-files.img` records beyond CRIU's schema.
//!
//! The image holds one [`RcrFilesHead`], then one [`RcrFile`] for each file that
//! has something to add. Field numbers are never reused; readers skip unknown
//! fields and take absent ones as "nothing special".

use super::mqueue::RcrQueue;
use super::uring::RcrUring;
use crate::image::schema::FownEntry;

/// First record of `rcr-files.img`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RcrFilesHead {
    /// CLOCK_REALTIME of the dump, nanoseconds.
    #[prost(uint64, required, tag = "1")]
    pub saved_realtime_ns: u64,
}

/// Additions to one `FileEntry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrFile {
    /// The entry's id in `files.img`.
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    /// Mount namespace in which the path was found; 0 is the controller's own.
    #[prost(uint32, optional, tag = "2")]
    pub mnt_ns: Option<u32>,
    /// The task that does what only a holder of the file can do.
    #[prost(int32, optional, tag = "3")]
    pub late_pid: Option<i32>,
    /// That task's number for the file.
    #[prost(uint32, optional, tag = "4")]
    pub late_fd: Option<u32>,
    /// Device number of a device node.
    #[prost(uint64, optional, tag = "5")]
    pub rdev: Option<u64>,
    /// A mapped file: its size must be what it was.
    #[prost(bool, optional, tag = "6")]
    pub exact_size: Option<bool>,
    /// For epoll: the file ids watched, in the order of `tfd`.
    #[prost(uint32, repeated, packed = "false", tag = "7")]
    pub epoll_targets: Vec<u32>,
    /// For eventfd: each read takes one (EFD_SEMAPHORE).
    #[prost(bool, optional, tag = "8")]
    pub semaphore: Option<bool>,
    /// For sockets.
    #[prost(message, optional, boxed, tag = "9")]
    pub socket: Option<Box<RcrSocket>>,
    /// `flock(2)` state: `LOCK_SH` or `LOCK_EX`.
    #[prost(uint32, optional, tag = "10")]
    pub flock: Option<u32>,
    /// Record locks that belong to tasks.
    #[prost(message, repeated, tag = "11")]
    pub locks: Vec<RcrLock>,
    /// For named pipes: status flags.
    #[prost(uint32, optional, tag = "12")]
    pub fifo_flags: Option<u32>,
    /// For named pipes: who gets SIGIO.
    #[prost(message, optional, tag = "13")]
    pub fifo_fown: Option<FownEntry>,
    /// For inotify and fanotify: where what is watched is, in the order of the
    /// entry's list.
    #[prost(message, repeated, tag = "30")]
    pub watched: Vec<RcrWatched>,
    /// For inotify: events waited to be read. They cannot be carried; the
    /// instance comes back saying that some were lost (IN_Q_OVERFLOW).
    #[prost(bool, optional, tag = "31")]
    pub events_lost: Option<bool>,
    /// For pidfds.
    #[prost(message, optional, tag = "32")]
    pub pidfd: Option<RcrPidfd>,
    /// For fanotify: marks on whole file systems are told from those on
    /// mounts by their place in the entry's list.
    #[prost(uint32, repeated, packed = "false", tag = "33")]
    pub filesystem_marks: Vec<u32>,
    /// For the first file of a pipe: lengths of the packets in it.
    #[prost(uint32, repeated, tag = "34")]
    pub packets: Vec<u32>,
    /// For unlinked files: it was opened without ever having a name (O_TMPFILE).
    #[prost(bool, optional, tag = "35")]
    pub nameless: Option<bool>,
    /// For files that live on under another name, the one in their entry: the
    /// name they were opened by, which they have no more.
    #[prost(string, optional, tag = "36")]
    pub former_name: Option<String>,
    /// A lease: `F_RDLCK` or `F_WRLCK`.
    #[prost(uint32, optional, tag = "37")]
    pub lease: Option<u32>,
    /// For descriptors of namespaces.
    #[prost(message, optional, tag = "38")]
    pub namespace: Option<RcrNamespaceFd>,
    /// For pipes: the other end is outside, and whoever restores gives this one.
    #[prost(bool, optional, tag = "39")]
    pub outside: Option<bool>,
    /// For sockets: the network namespace, if it is not the controller's own.
    #[prost(uint32, optional, tag = "40")]
    pub net_ns: Option<u32>,
    /// For POSIX message queues.
    #[prost(message, optional, boxed, tag = "71")]
    pub queue: Option<Box<RcrQueue>>,
    /// For io_urings.
    #[prost(message, optional, boxed, tag = "70")]
    pub uring: Option<Box<RcrUring>>,
    /// For terminals.
    #[prost(message, optional, boxed, tag = "50")]
    pub terminal: Option<Box<RcrTerminal>>,
}

/// One end of a pseudo terminal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrTerminal {
    /// Device number of the devpts it is in: ends of the same and of the same
    /// index belong together.
    #[prost(uint64, required, tag = "1")]
    pub instance: u64,
    /// Its number there.
    #[prost(uint32, required, tag = "2")]
    pub index: u32,
    /// Which end.
    #[prost(enumeration = "TerminalEnd", required, tag = "3")]
    pub end: i32,
    /// For masters: what the slave has to read, in canonical mode by lines.
    #[prost(message, repeated, tag = "4")]
    pub input: Vec<RcrLine>,
    /// For masters: what it has to read itself.
    #[prost(bytes = "vec", optional, tag = "5")]
    pub output: Option<Vec<u8>>,
    /// For masters: permission bits of the slave's node.
    #[prost(uint32, optional, tag = "6")]
    pub slave_mode: Option<u32>,
    /// For masters: what the slave has exclusive use of (TIOCEXCL).
    #[prost(bool, optional, tag = "7")]
    pub slave_exclusive: Option<bool>,
}

/// How a file is connected with a pseudo terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum TerminalEnd {
    /// Opened as `ptmx`.
    Master = 0,
    /// Opened by its name.
    Slave = 1,
    /// Opened as `/dev/tty`.
    Controlling = 2,
    /// A slave that was hung up.
    HungUp = 3,
    /// A slave whose master is elsewhere: the terminal of whoever restores
    /// takes its place.
    Outside = 4,
}

/// What a terminal gives to one read(2).
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrLine {
    /// The bytes, with the one that ended the line.
    #[prost(bytes = "vec", required, tag = "1")]
    pub data: Vec<u8>,
    /// What ended it.
    #[prost(enumeration = "LineEnd", required, tag = "2")]
    pub end: i32,
}

/// What ended a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum LineEnd {
    /// Nothing yet, or there are no lines in this mode.
    Open = 0,
    /// Its last byte.
    LastByte = 1,
    /// The end-of-file character, which is not read.
    EndOfFile = 2,
}

/// A namespace that a descriptor stands for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrNamespaceFd {
    /// As `/proc/PID/ns` calls it.
    #[prost(string, required, tag = "1")]
    pub kind: String,
    /// It is the host's.
    #[prost(bool, required, tag = "2")]
    pub host: bool,
    /// Else: a process of the tree that lives in it.
    #[prost(int32, optional, tag = "3")]
    pub pid: Option<i32>,
}

/// Where a watched inode is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrWatched {
    /// Its path.
    #[prost(string, optional, tag = "1")]
    pub path: Option<String>,
    /// The mount namespace the path is of; 0 is the controller's own.
    #[prost(uint32, optional, tag = "2")]
    pub mnt_ns: Option<u32>,
    /// Instead of a path: the carried file that has no name.
    #[prost(uint32, optional, tag = "3")]
    pub file: Option<u32>,
}

/// What a pidfd stands for.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RcrPidfd {
    /// A process, or a thread, of the tree; absent if it is gone.
    #[prost(int32, optional, tag = "1")]
    pub pid: Option<i32>,
    /// Wait status of one that is gone, where the kernel told it.
    #[prost(int32, optional, tag = "2")]
    pub exit_status: Option<i32>,
    /// It is a thread, but not its process's first: opened by the process
    /// itself when its threads are there.
    #[prost(bool, optional, tag = "3")]
    pub thread: Option<bool>,
}

/// A POSIX record lock.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RcrLock {
    /// Who holds it.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// `F_RDLCK` or `F_WRLCK`.
    #[prost(uint32, required, tag = "2")]
    pub kind: u32,
    /// First byte.
    #[prost(uint64, required, tag = "3")]
    pub start: u64,
    /// Length; 0: to the end of the file, wherever that is.
    #[prost(uint64, required, tag = "4")]
    pub len: u64,
}

/// Additions to a socket's entry.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrSocket {
    /// `sockaddr` it is bound to, family included; absent if unbound.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub local: Option<Vec<u8>>,
    /// `sockaddr` it is connected to.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub peer: Option<Vec<u8>>,
    /// Options that differ from those of a fresh socket.
    #[prost(message, repeated, tag = "3")]
    pub options: Vec<RcrSocketOption>,
    /// What becomes of its connection.
    #[prost(enumeration = "Fate", optional, tag = "4")]
    pub fate: Option<i32>,
    /// Owner of the socket's inode.
    #[prost(uint32, optional, tag = "5")]
    pub uid: Option<u32>,
    /// Group of the socket's inode.
    #[prost(uint32, optional, tag = "6")]
    pub gid: Option<u32>,
    /// Path of the socket's file inside the mount namespace, if it has one.
    #[prost(string, optional, tag = "7")]
    pub path: Option<String>,
    /// The entry of the other end.
    #[prost(uint32, optional, tag = "8")]
    pub peer_id: Option<u32>,
    /// Listening socket through which the pair was made; this end was accepted.
    #[prost(uint32, optional, tag = "9")]
    pub accepted_by: Option<u32>,
    /// Listening socket that has not accepted its connection yet.
    #[prost(uint32, optional, tag = "10")]
    pub pending_on: Option<u32>,
    /// Its place among those who wait there.
    #[prost(uint32, optional, tag = "11")]
    pub pending_place: Option<u32>,
    /// Its file was removed.
    #[prost(bool, optional, tag = "12")]
    pub deleted: Option<bool>,
    /// For UDP and UDP-Lite: what nobody has read yet.
    #[prost(message, repeated, tag = "13")]
    pub datagrams: Vec<RcrDatagram>,
    /// For unix streams: how many bytes of the queue stand before the one that
    /// was sent with MSG_OOB.
    #[prost(uint64, optional, tag = "14")]
    pub urgent_at: Option<u64>,
    /// For unix sockets: whom it sees at the other end (SO_PEERCRED).
    #[prost(message, optional, tag = "15")]
    pub peer_cred: Option<RcrPeer>,
    /// The devices whose numbers stand in addresses and options.
    #[prost(message, repeated, tag = "16")]
    pub devices: Vec<RcrDevice>,
}

/// A network device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrDevice {
    /// Its number at the dump.
    #[prost(uint32, required, tag = "1")]
    pub number: u32,
    /// Its name, by which it is found again.
    #[prost(string, required, tag = "2")]
    pub name: String,
}

/// A process as its peers see it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrPeer {
    /// A process of the tree; 0 for others.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// Its effective user when it made the socket.
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    /// Its effective group.
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    /// Its supplementary groups.
    #[prost(uint32, repeated, tag = "4")]
    pub groups: Vec<u32>,
}

/// A datagram that waits to be read.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrDatagram {
    /// `sockaddr` it came from.
    #[prost(bytes = "vec", required, tag = "1")]
    pub source: Vec<u8>,
    /// `sockaddr` it was sent to.
    #[prost(bytes = "vec", required, tag = "2")]
    pub target: Vec<u8>,
    /// The bytes.
    #[prost(bytes = "vec", required, tag = "3")]
    pub data: Vec<u8>,
    /// Hops it had left (TTL).
    #[prost(uint32, optional, tag = "4")]
    pub hops: Option<u32>,
    /// Its traffic class (TOS).
    #[prost(uint32, optional, tag = "5")]
    pub class: Option<u32>,
}

/// What becomes of a connection that does not lead to another carried file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Fate {
    /// There is nothing to decide.
    Kept = 0,
    /// It comes back as if the peer had gone.
    Closed = 1,
    /// It led to the journal; a plain file stands in until it is reconnected.
    Journal = 2,
}

/// One socket option.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrSocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP`, …
    #[prost(int32, required, tag = "1")]
    pub level: i32,
    /// Number of the option.
    #[prost(int32, required, tag = "2")]
    pub name: i32,
    /// The value as setsockopt(2) takes it.
    #[prost(bytes = "vec", required, tag = "3")]
    pub value: Vec<u8>,
}
