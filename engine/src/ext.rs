//! What we record about tasks beyond CRIU's schema, in images of our own that
//! its readers never open.

use crate::memory::policy::Policy;

/// Once per dump: `rcr-inventory.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrInventory {
    /// Version of our own images; see [`VERSION`].
    #[prost(uint32, required, tag = "1")]
    pub version: u32,
    /// CLOCK_REALTIME of the freeze, nanoseconds.
    #[prost(int64, required, tag = "2")]
    pub realtime_ns: i64,
    /// CLOCK_MONOTONIC as the tasks saw it at the freeze, nanoseconds.
    #[prost(int64, required, tag = "3")]
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME as the tasks saw it at the freeze, nanoseconds.
    #[prost(int64, required, tag = "4")]
    pub boottime_ns: i64,
    /// `/proc/sys/kernel/random/boot_id` of the dumping kernel.
    #[prost(string, required, tag = "5")]
    pub boot_id: String,
    /// `uname -r` of the dumping kernel.
    #[prost(string, required, tag = "6")]
    pub kernel_release: String,
    /// Offsets of the time namespace the tasks were in, nanoseconds.
    #[prost(int64, required, tag = "7")]
    pub monotonic_offset_ns: i64,
    /// See `monotonic_offset_ns`.
    #[prost(int64, required, tag = "8")]
    pub boottime_offset_ns: i64,
}

/// Version of our own images. Readers accept exactly this one.
pub const VERSION: u32 = 1;

/// Once per process: `rcr-task-PID.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrTask {
    /// Job-control signal that had stopped it, 0 for none.
    #[prost(int32, required, tag = "1")]
    pub stop_signal: i32,
    /// Wait status, for zombies.
    #[prost(int32, required, tag = "2")]
    pub exit_status: i32,
    /// Whether it is a zombie.
    #[prost(bool, required, tag = "3")]
    pub zombie: bool,
    /// Cgroup v2 path, as in `/proc/PID/cgroup`.
    #[prost(string, required, tag = "4")]
    pub cgroup: String,
    /// `/proc/PID/coredump_filter`.
    #[prost(uint32, optional, tag = "5")]
    pub coredump_filter: Option<u32>,
    /// `PR_GET_MDWE`: executable memory it may not gain, 0 for none.
    #[prost(uint32, required, tag = "7")]
    pub mdwe: u32,
    /// Signal its parent gets when it ends (clone(2)).
    #[prost(int32, optional, tag = "30")]
    pub exit_signal: Option<i32>,
    /// Wait status of its first thread, where that has ended before the others.
    #[prost(int32, optional, tag = "31")]
    pub dead_leader: Option<i32>,
    /// Names given to private mappings (`PR_SET_VMA_ANON_NAME`).
    #[prost(message, repeated, tag = "6")]
    pub vma_names: Vec<VmaName>,
}

/// A named private mapping.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmaName {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// The name.
    #[prost(bytes, required, tag = "3")]
    pub name: Vec<u8>,
}

/// Once per thread: `rcr-thread-TID.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrThread {
    /// The XSAVE area as `NT_X86_XSTATE` gives it.
    #[prost(bytes, required, tag = "1")]
    pub xstate: Vec<u8>,
    /// I/O priority, ioprio_get(2).
    #[prost(int32, required, tag = "2")]
    pub ioprio: i32,
    /// CPU affinity mask, sched_getaffinity(2).
    #[prost(bytes, required, tag = "3")]
    pub affinity: Vec<u8>,
    /// `SCHED_FLAG_*`, and deadline parameters in ns.
    #[prost(uint64, required, tag = "4")]
    pub sched_flags: u64,
    /// Deadline runtime, ns.
    #[prost(uint64, required, tag = "5")]
    pub sched_runtime: u64,
    /// Deadline, ns.
    #[prost(uint64, required, tag = "6")]
    pub sched_deadline: u64,
    /// Deadline period, ns.
    #[prost(uint64, required, tag = "7")]
    pub sched_period: u64,
    /// An interrupted call with what is left of its timeout.
    #[prost(message, optional, tag = "30")]
    pub nap: Option<RcrNap>,
    /// NUMA memory policy, unless it is the default one.
    #[prost(message, optional, tag = "20")]
    pub memory_policy: Option<Policy>,
    /// Chain of seccomp filters: indexes into `seccomp.img`, oldest first.
    #[prost(uint32, repeated, tag = "8")]
    pub seccomp_chain: Vec<u32>,
}

/// Once per dump with connections that go on: `rcr-network.img`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RcrNetwork {
    /// Name of the nftables table that keeps packets away meanwhile.
    #[prost(string, optional, tag = "1")]
    pub lock: Option<String>,
}

/// Name of [`RcrNetwork`]'s image.
pub const NETWORK: &str = "rcr-network.img";

/// A system call that the kernel would have gone on with by itself.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrNap {
    /// Its number.
    #[prost(int64, required, tag = "1")]
    pub call: i64,
    /// What is left of its relative timeout, nanoseconds.
    #[prost(int64, optional, tag = "2")]
    pub left_ns: Option<i64>,
}

/// Name of [`RcrInventory`]'s image.
pub const INVENTORY: &str = "rcr-inventory.img";

/// Name of a [`RcrTask`]'s image.
pub fn task_image(pid: i32) -> String {
    format!("rcr-task-{pid}.img")
}

/// Name of a [`RcrThread`]'s image.
pub fn thread_image(tid: i32) -> String {
    format!("rcr-thread-{tid}.img")
}
