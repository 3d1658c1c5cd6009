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
    /// Features with a large state that it may use (`ARCH_GET_XCOMP_PERM`).
    #[prost(uint64, required, tag = "32")]
    pub xstate_permitted: u64,
    /// Whether it chooses the ids of new timers
    /// (`PR_TIMER_CREATE_RESTORE_IDS`).
    #[prost(bool, required, tag = "33")]
    pub timer_ids: bool,
    /// `PR_GET_THP_DISABLE` with its flags.
    #[prost(uint32, required, tag = "34")]
    pub thp_disabled: u32,
    /// Nice value of its autogroup, `/proc/PID/autogroup`.
    #[prost(int32, optional, tag = "35")]
    pub autogroup_nice: Option<i32>,
    /// What its time namespace adds to the clocks, where that is another one
    /// than the first process's, and for future children.
    #[prost(message, optional, tag = "36")]
    pub time: Option<RcrTime>,
    /// See `time`: children made from now on.
    #[prost(message, optional, tag = "37")]
    pub time_for_children: Option<RcrTime>,
    /// Wait status of its first thread, where that has ended before the others.
    #[prost(int32, optional, tag = "31")]
    pub dead_leader: Option<i32>,
    /// PID namespace its children are born into, where not its own: the id of
    /// its first process, 0 for one that has none yet.
    #[prost(int32, optional, tag = "40")]
    pub pid_ns_of_children: Option<i32>,
    /// Names given to private mappings (`PR_SET_VMA_ANON_NAME`).
    #[prost(message, repeated, tag = "6")]
    pub vma_names: Vec<VmaName>,
    /// What is undone of semaphores when it ends (`SEM_UNDO`).
    #[prost(message, repeated, tag = "41")]
    pub undo: Vec<RcrUndo>,
}

/// What is undone of a set of semaphores.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RcrUndo {
    /// The set.
    #[prost(int32, required, tag = "1")]
    pub id: i32,
    /// What is added to each semaphore.
    #[prost(sint32, repeated, tag = "2")]
    pub values: Vec<i32>,
}

/// Offsets of a time namespace (time_namespaces(7)) from those of the
/// inventory, nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Message)]
pub struct RcrTime {
    /// For CLOCK_MONOTONIC.
    #[prost(int64, required, tag = "1")]
    pub monotonic_ns: i64,
    /// For CLOCK_BOOTTIME.
    #[prost(int64, required, tag = "2")]
    pub boottime_ns: i64,
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
    /// Settings of prctl(2).
    #[prost(message, optional, tag = "31")]
    pub knobs: Option<RcrKnobs>,
    /// System calls given to the program itself, where they are
    /// (`PR_SET_SYSCALL_USER_DISPATCH`).
    #[prost(message, optional, tag = "32")]
    pub dispatch: Option<RcrDispatch>,
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

/// What a thread has set for itself.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RcrKnobs {
    /// `PR_GET_TSC`; 0 where unknown.
    #[prost(int32, required, tag = "1")]
    pub tsc_mode: i32,
    /// What it has chosen of each kind of speculation, 0 for nothing.
    #[prost(int64, repeated, packed = "false", tag = "2")]
    pub speculation: Vec<i64>,
    /// CPUID faults (`ARCH_SET_CPUID`).
    #[prost(bool, required, tag = "3")]
    pub cpuid_faults: bool,
    /// personality(2).
    #[prost(uint32, required, tag = "4")]
    pub personality: u32,
    /// `PR_SET_IO_FLUSHER`.
    #[prost(bool, required, tag = "5")]
    pub io_flusher: bool,
}

/// `struct ptrace_sud_config` (linux/ptrace.h).
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrDispatch {
    /// `PR_SYS_DISPATCH_*`.
    #[prost(uint64, required, tag = "1")]
    pub mode: u64,
    /// Address of the selector byte.
    #[prost(uint64, required, tag = "2")]
    pub selector: u64,
    /// Start of the code whose calls go through.
    #[prost(uint64, required, tag = "3")]
    pub offset: u64,
    /// Its length.
    #[prost(uint64, required, tag = "4")]
    pub len: u64,
}

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
