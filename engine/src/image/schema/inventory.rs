//! What a dump holds as a whole: its version, the process tree, figures.

#![allow(missing_docs)]

use super::core::TaskKobjIdsEntry;

/// Head of a dump: format version and what holds for all tasks.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InventoryEntry {
    #[prost(uint32, required, tag = "1")]
    pub img_version: u32,
    #[prost(bool, optional, tag = "2")]
    pub fdinfo_per_id: Option<bool>,
    #[prost(message, optional, tag = "3")]
    pub root_ids: Option<TaskKobjIdsEntry>,
    #[prost(bool, optional, tag = "4")]
    pub ns_per_id: Option<bool>,
    #[prost(uint32, optional, tag = "5")]
    pub root_cg_set: Option<u32>,
    #[prost(enumeration = "Lsmtype", optional, tag = "6")]
    pub lsmtype: Option<i32>,
    #[prost(uint64, optional, tag = "8")]
    pub dump_uptime: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pub pre_dump_mode: Option<u32>,
    #[prost(bool, optional, tag = "10")]
    pub tcp_close: Option<bool>,
    #[prost(uint32, optional, tag = "11")]
    pub network_lock_method: Option<u32>,
    #[prost(message, optional, tag = "12")]
    pub plugins_entry: Option<PluginsEntry>,
    #[prost(string, optional, tag = "13")]
    pub dump_criu_run_id: Option<String>,
    #[prost(bool, optional, tag = "14")]
    pub allow_uprobes: Option<bool>,
    #[prost(uint32, optional, tag = "15")]
    pub compress: Option<u32>,
    #[prost(uint32, optional, tag = "16")]
    pub compress_block_size: Option<u32>,
}

/// Names of the plugins that took part in the dump.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PluginsEntry {
    #[prost(string, repeated, tag = "12")]
    pub plugins: Vec<String>,
}

/// One task of the tree: its ids and threads.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    #[prost(uint32, required, tag = "2")]
    pub ppid: u32,
    #[prost(uint32, required, tag = "3")]
    pub pgid: u32,
    #[prost(uint32, required, tag = "4")]
    pub sid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// The security module whose labels were dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Lsmtype {
    NoLsm = 0,
    Selinux = 1,
    Apparmor = 2,
}

/// Figures of a dump or a restore.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    pub dump: Option<DumpStatsEntry>,
    #[prost(message, optional, tag = "2")]
    pub restore: Option<RestoreStatsEntry>,
}

/// Figures of a dump; times in microseconds.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct DumpStatsEntry {
    #[prost(uint32, required, tag = "1")]
    pub freezing_time: u32,
    #[prost(uint32, required, tag = "2")]
    pub frozen_time: u32,
    #[prost(uint32, required, tag = "3")]
    pub memdump_time: u32,
    #[prost(uint32, required, tag = "4")]
    pub memwrite_time: u32,
    #[prost(uint64, required, tag = "5")]
    pub pages_scanned: u64,
    #[prost(uint64, required, tag = "6")]
    pub pages_skipped_parent: u64,
    #[prost(uint64, required, tag = "7")]
    pub pages_written: u64,
    #[prost(uint32, optional, tag = "8")]
    pub irmap_resolve: Option<u32>,
    #[prost(uint64, required, tag = "9")]
    pub pages_lazy: u64,
    #[prost(uint64, optional, tag = "10")]
    pub page_pipes: Option<u64>,
    #[prost(uint64, optional, tag = "11")]
    pub page_pipe_bufs: Option<u64>,
    #[prost(uint64, optional, tag = "12")]
    pub shpages_scanned: Option<u64>,
    #[prost(uint64, optional, tag = "13")]
    pub shpages_skipped_parent: Option<u64>,
    #[prost(uint64, optional, tag = "14")]
    pub shpages_written: Option<u64>,
}

/// Figures of a restore; times in microseconds.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RestoreStatsEntry {
    #[prost(uint64, required, tag = "1")]
    pub pages_compared: u64,
    #[prost(uint64, required, tag = "2")]
    pub pages_skipped_cow: u64,
    #[prost(uint32, required, tag = "3")]
    pub forking_time: u32,
    #[prost(uint32, required, tag = "4")]
    pub restore_time: u32,
    #[prost(uint64, optional, tag = "5")]
    pub pages_restored: Option<u64>,
}

/// The processor the dump was made on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuinfoEntry {
    #[prost(message, repeated, tag = "1")]
    pub x86_entry: Vec<CpuinfoX86Entry>,
    #[prost(message, repeated, tag = "2")]
    pub ppc64_entry: Vec<CpuinfoPpc64Entry>,
    #[prost(message, repeated, tag = "3")]
    pub s390_entry: Vec<CpuinfoS390Entry>,
}

/// A ppc64 processor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuinfoPpc64Entry {
    #[prost(enumeration = "Endianness", required, tag = "1")]
    pub endian: i32,
    #[prost(uint64, repeated, packed = "false", tag = "2")]
    pub hwcap: Vec<u64>,
}

/// An s390 processor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuinfoS390Entry {
    #[prost(uint64, repeated, packed = "false", tag = "2")]
    pub hwcap: Vec<u64>,
}

/// An x86 processor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuinfoX86Entry {
    #[prost(enumeration = "Vendor", required, tag = "1")]
    pub vendor_id: i32,
    #[prost(uint32, required, tag = "2")]
    pub cpu_family: u32,
    #[prost(uint32, required, tag = "3")]
    pub model: u32,
    #[prost(uint32, required, tag = "4")]
    pub stepping: u32,
    #[prost(uint32, required, tag = "5")]
    pub capability_ver: u32,
    #[prost(uint32, repeated, packed = "false", tag = "6")]
    pub capability: Vec<u32>,
    #[prost(string, optional, tag = "7")]
    pub model_id: Option<String>,
    #[prost(uint64, optional, tag = "8")]
    pub xfeatures_mask: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pub xsave_size: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    pub xsave_size_max: Option<u32>,
}

/// Answer of an image streamer.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ImgStreamerReplyEntry {
    #[prost(bool, required, tag = "1")]
    pub exists: bool,
}

/// Question to an image streamer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImgStreamerRequestEntry {
    #[prost(string, required, tag = "1")]
    pub filename: String,
}

/// Byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Endianness {
    Bigendian = 0,
    Littleendian = 1,
}

/// Maker of an x86 processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Vendor {
    Unknown = 0,
    Intel = 1,
    Amd = 2,
}
