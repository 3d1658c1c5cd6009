//! Namespaces: mounts, network, IPC, names, clocks.

#![allow(missing_docs)]

/// An autofs mount's daemon side.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct AutofsEntry {
    #[prost(int32, required, tag = "1")]
    pub fd: i32,
    #[prost(int32, required, tag = "2")]
    pub pgrp: i32,
    #[prost(int32, required, tag = "3")]
    pub timeout: i32,
    #[prost(int32, required, tag = "4")]
    pub minproto: i32,
    #[prost(int32, required, tag = "5")]
    pub maxproto: i32,
    #[prost(int32, required, tag = "6")]
    pub mode: i32,
    #[prost(int32, optional, tag = "7")]
    pub uid: Option<i32>,
    #[prost(int32, optional, tag = "8")]
    pub gid: Option<i32>,
    #[prost(int32, optional, tag = "9")]
    pub read_fd: Option<i32>,
}

/// One registered binary format.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BinfmtMiscEntry {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(bool, required, tag = "2")]
    pub enabled: bool,
    #[prost(string, required, tag = "3")]
    pub interpreter: String,
    #[prost(string, optional, tag = "4")]
    pub flags: Option<String>,
    #[prost(string, optional, tag = "5")]
    pub extension: Option<String>,
    #[prost(string, optional, tag = "6")]
    pub magic: Option<String>,
    #[prost(string, optional, tag = "7")]
    pub mask: Option<String>,
    #[prost(int32, optional, tag = "8")]
    pub offset: Option<i32>,
}

/// Key, owner and mode of a System V object.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct IpcDescEntry {
    #[prost(uint32, required, tag = "1")]
    pub key: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint32, required, tag = "4")]
    pub cuid: u32,
    #[prost(uint32, required, tag = "5")]
    pub cgid: u32,
    #[prost(uint32, required, tag = "6")]
    pub mode: u32,
    #[prost(uint32, required, tag = "7")]
    pub id: u32,
}

/// One System V message.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct IpcMsg {
    #[prost(uint64, required, tag = "1")]
    pub mtype: u64,
    #[prost(uint32, required, tag = "2")]
    pub msize: u32,
}

/// A System V message queue; its messages follow.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcMsgEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint32, required, tag = "2")]
    pub qbytes: u32,
    #[prost(uint32, required, tag = "3")]
    pub qnum: u32,
}

/// A System V semaphore set; its values follow.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcSemEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint32, required, tag = "2")]
    pub nsems: u32,
}

/// A System V shared memory segment.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcShmEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint64, required, tag = "2")]
    pub size: u64,
    #[prost(bool, optional, tag = "3")]
    pub in_pagemaps: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub hugetlb_flag: Option<u32>,
}

/// Limits of an IPC namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcVarEntry {
    #[prost(uint32, repeated, packed = "false", tag = "1")]
    pub sem_ctls: Vec<u32>,
    #[prost(uint32, required, tag = "2")]
    pub msg_ctlmax: u32,
    #[prost(uint32, required, tag = "3")]
    pub msg_ctlmnb: u32,
    #[prost(uint32, required, tag = "4")]
    pub msg_ctlmni: u32,
    #[prost(uint32, required, tag = "5")]
    pub auto_msgmni: u32,
    #[prost(uint64, required, tag = "6")]
    pub shm_ctlmax: u64,
    #[prost(uint64, required, tag = "7")]
    pub shm_ctlall: u64,
    #[prost(uint32, required, tag = "8")]
    pub shm_ctlmni: u32,
    #[prost(uint32, required, tag = "9")]
    pub shm_rmid_forced: u32,
    #[prost(uint32, required, tag = "10")]
    pub mq_queues_max: u32,
    #[prost(uint32, required, tag = "11")]
    pub mq_msg_max: u32,
    #[prost(uint32, required, tag = "12")]
    pub mq_msgsize_max: u32,
    #[prost(uint32, optional, tag = "13")]
    pub mq_msg_default: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub mq_msgsize_default: Option<u32>,
    #[prost(uint32, optional, tag = "15")]
    pub msg_next_id: Option<u32>,
    #[prost(uint32, optional, tag = "16")]
    pub sem_next_id: Option<u32>,
    #[prost(uint32, optional, tag = "17")]
    pub shm_next_id: Option<u32>,
}

/// A macvlan device.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MacvlanLinkEntry {
    #[prost(uint32, required, tag = "1")]
    pub mode: u32,
    #[prost(uint32, optional, tag = "2")]
    pub flags: Option<u32>,
}

/// One mount of a mount namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MntEntry {
    #[prost(uint32, required, tag = "1")]
    pub fstype: u32,
    #[prost(uint32, required, tag = "2")]
    pub mnt_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub root_dev: u32,
    #[prost(uint32, required, tag = "4")]
    pub parent_mnt_id: u32,
    #[prost(uint32, required, tag = "5")]
    pub flags: u32,
    #[prost(string, required, tag = "6")]
    pub root: String,
    #[prost(string, required, tag = "7")]
    pub mountpoint: String,
    #[prost(string, required, tag = "8")]
    pub source: String,
    #[prost(string, required, tag = "9")]
    pub options: String,
    #[prost(uint32, optional, tag = "10")]
    pub shared_id: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    pub master_id: Option<u32>,
    #[prost(bool, optional, tag = "12")]
    pub with_plugin: Option<bool>,
    #[prost(bool, optional, tag = "13")]
    pub ext_mount: Option<bool>,
    #[prost(string, optional, tag = "14")]
    pub fsname: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub internal_sharing: Option<bool>,
    #[prost(bool, optional, tag = "16")]
    pub deleted: Option<bool>,
    #[prost(uint32, optional, tag = "17")]
    pub sb_flags: Option<u32>,
    #[prost(string, optional, tag = "18")]
    pub ext_key: Option<String>,
}

/// One network device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NetDeviceEntry {
    #[prost(enumeration = "NdType", required, tag = "1")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "2")]
    pub ifindex: u32,
    #[prost(uint32, required, tag = "3")]
    pub mtu: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags: u32,
    #[prost(string, required, tag = "5")]
    pub name: String,
    #[prost(message, optional, tag = "6")]
    pub tun: Option<TunLinkEntry>,
    #[prost(bytes = "vec", optional, tag = "7")]
    pub address: Option<Vec<u8>>,
    #[prost(int32, repeated, packed = "false", tag = "8")]
    pub conf: Vec<i32>,
    #[prost(message, repeated, tag = "9")]
    pub conf4: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "10")]
    pub conf6: Vec<SysctlEntry>,
    #[prost(message, optional, tag = "11")]
    pub macvlan: Option<MacvlanLinkEntry>,
    #[prost(uint32, optional, tag = "12")]
    pub peer_ifindex: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    pub peer_nsid: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub master: Option<u32>,
    #[prost(message, optional, tag = "15")]
    pub sit: Option<SitEntry>,
}

/// A network namespace's settings.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NetnsEntry {
    #[prost(int32, repeated, packed = "false", tag = "1")]
    pub def_conf: Vec<i32>,
    #[prost(int32, repeated, packed = "false", tag = "2")]
    pub all_conf: Vec<i32>,
    #[prost(message, repeated, tag = "3")]
    pub def_conf4: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "4")]
    pub all_conf4: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "5")]
    pub def_conf6: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "6")]
    pub all_conf6: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "7")]
    pub nsids: Vec<NetnsId>,
    #[prost(string, optional, tag = "8")]
    pub ext_key: Option<String>,
    #[prost(message, repeated, tag = "9")]
    pub unix_conf: Vec<SysctlEntry>,
    #[prost(message, repeated, tag = "10")]
    pub ipv4_sysctl: Vec<SysctlEntry>,
}

/// The number one network namespace gives another.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct NetnsId {
    #[prost(uint32, required, tag = "1")]
    pub target_ns_id: u32,
    #[prost(int32, required, tag = "2")]
    pub netnsid_value: i32,
}

/// A PID namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidnsEntry {
    #[prost(string, optional, tag = "1")]
    pub ext_key: Option<String>,
}

/// A sit tunnel.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SitEntry {
    #[prost(uint32, optional, tag = "1")]
    pub link: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "2")]
    pub local: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "3")]
    pub remote: Vec<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub ttl: Option<u32>,
    #[prost(uint32, optional, tag = "5")]
    pub tos: Option<u32>,
    #[prost(bool, optional, tag = "6")]
    pub pmtudisc: Option<bool>,
    #[prost(uint32, optional, tag = "7")]
    pub proto: Option<u32>,
    #[prost(uint32, optional, tag = "8")]
    pub flags: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    pub encap_type: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    pub encap_flags: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    pub encap_sport: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    pub encap_dport: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    pub rd_prefixlen: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "14")]
    pub rd_prefix: Vec<u32>,
    #[prost(uint32, optional, tag = "15")]
    pub relay_prefixlen: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "16")]
    pub relay_prefix: Vec<u32>,
}

/// One sysctl's value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SysctlEntry {
    #[prost(enumeration = "SysctlType", required, tag = "1")]
    pub r#type: i32,
    #[prost(int32, optional, tag = "2")]
    pub iarg: Option<i32>,
    #[prost(string, optional, tag = "3")]
    pub sarg: Option<String>,
}

/// Clock readings of a time namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TimensEntry {
    #[prost(message, required, tag = "1")]
    pub monotonic: Timespec,
    #[prost(message, required, tag = "2")]
    pub boottime: Timespec,
}

/// Seconds and nanoseconds.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Timespec {
    #[prost(uint64, required, tag = "1")]
    pub tv_sec: u64,
    #[prost(uint64, required, tag = "2")]
    pub tv_nsec: u64,
}

/// A tun or tap device.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct TunLinkEntry {
    #[prost(uint32, required, tag = "1")]
    pub flags: u32,
    #[prost(int32, required, tag = "2")]
    pub owner: i32,
    #[prost(int32, required, tag = "3")]
    pub group: i32,
    #[prost(uint32, required, tag = "4")]
    pub vnethdr: u32,
    #[prost(uint32, required, tag = "5")]
    pub sndbuf: u32,
}

/// A descriptor of a tun device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TunfileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(string, optional, tag = "2")]
    pub netdev: Option<String>,
    #[prost(bool, optional, tag = "3")]
    pub detached: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub ns_id: Option<u32>,
}

/// One range of an id map.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct UidGidExtent {
    #[prost(uint32, required, tag = "1")]
    pub first: u32,
    #[prost(uint32, required, tag = "2")]
    pub lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    pub count: u32,
}

/// A user namespace's id maps.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UsernsEntry {
    #[prost(message, repeated, tag = "1")]
    pub uid_map: Vec<UidGidExtent>,
    #[prost(message, repeated, tag = "2")]
    pub gid_map: Vec<UidGidExtent>,
    #[prost(message, repeated, tag = "3")]
    pub binfmt_misc: Vec<BinfmtMiscEntry>,
}

/// Host and domain name of a UTS namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UtsnsEntry {
    #[prost(string, required, tag = "1")]
    pub nodename: String,
    #[prost(string, required, tag = "2")]
    pub domainname: String,
}

/// Type of a sysctl's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SysctlType {
    CtlStr = 5,
    Ctl32 = 6,
}

/// Filesystem type of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Fstype {
    Unsupported = 0,
    Proc = 1,
    Sysfs = 2,
    Devtmpfs = 3,
    BinfmtMisc = 4,
    Tmpfs = 5,
    Devpts = 6,
    Simfs = 7,
    Pstore = 8,
    Securityfs = 9,
    Fusectl = 10,
    Debugfs = 11,
    Cgroup = 12,
    Aufs = 13,
    Mqueue = 14,
    Fuse = 15,
    Auto = 16,
    Overlayfs = 17,
    Autofs = 18,
    Tracefs = 19,
    Cgroup2 = 23,
}

/// Kind of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NdType {
    Loopback = 1,
    Veth = 2,
    Tun = 3,
    Extlink = 4,
    Venet = 5,
    Bridge = 6,
    Macvlan = 7,
    Sit = 8,
}
