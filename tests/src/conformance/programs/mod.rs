//! The programs, by area.

pub mod aio;
pub mod backing;
pub mod blocked;
pub mod bpf;
pub mod cgroups;
pub mod clocks;
pub mod cow;
pub mod creds;
pub mod datagrams;
pub mod executables;
pub mod files;
pub mod filters;
pub mod held;
pub mod hugetlb;
pub mod ipc;
pub mod leaders;
pub mod many;
pub mod mappings;
pub mod memory;
pub mod nameless;
pub mod namespaces;
pub mod naps;
pub mod network;
pub mod notify;
pub mod peers;
pub mod pid_namespaces;
pub mod pidfds;
pub mod pipes;
pub mod predump;
pub mod process;
pub mod procs;
pub mod queues;
pub mod random;
pub mod refusals;
pub mod registers;
pub mod rings;
pub mod roots;
pub mod seccomp;
pub mod settings;
pub mod sharing;
pub mod signals;
pub mod sockets;
pub mod sockets_inet;
pub mod sockets_unix;
pub mod special;
pub mod tcp;
pub mod tcp_states;
pub mod terminals;
pub mod threads;
pub mod timens;
pub mod timers;

use super::Case;

/// All of them.
pub const ALL: &[&[Case]] = &[
    memory::CASES,
    cow::CASES,
    mappings::CASES,
    backing::CASES,
    executables::CASES,
    hugetlb::CASES,
    aio::CASES,
    predump::CASES,
    random::CASES,
    threads::CASES,
    leaders::CASES,
    registers::CASES,
    blocked::CASES,
    signals::CASES,
    timers::CASES,
    naps::CASES,
    timens::CASES,
    clocks::CASES,
    process::CASES,
    sharing::CASES,
    settings::CASES,
    creds::CASES,
    seccomp::CASES,
    namespaces::CASES,
    cgroups::CASES,
    network::CASES,
    ipc::CASES,
    pid_namespaces::CASES,
    procs::CASES,
    filters::CASES,
    roots::CASES,
    files::CASES,
    pipes::CASES,
    many::CASES,
    nameless::CASES,
    special::CASES,
    bpf::CASES,
    rings::CASES,
    queues::CASES,
    notify::CASES,
    pidfds::CASES,
    sockets::CASES,
    sockets_inet::CASES,
    sockets_unix::CASES,
    datagrams::CASES,
    peers::CASES,
    held::CASES,
    tcp::CASES,
    tcp_states::CASES,
    terminals::CASES,
    refusals::CASES,
];
