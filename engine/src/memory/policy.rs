//! NUMA policies of mappings and threads (mbind(2), set_mempolicy(2)).

use crate::remote::{DataRef, OpId, Outcome, Program};

use super::extra::VmaPolicy;

/// Bytes of the sets of nodes we ask with: as many nodes as any kernel knows.
const NODES_BYTES: usize = 128;
const NODES_BITS: u64 = NODES_BYTES as u64 * 8;
const MPOL_F_ADDR: i32 = 2;
const MPOL_MF_MOVE: i32 = 2;

/// A policy that is not the default one.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Policy {
    /// `MPOL_*` with its flags.
    #[prost(int32, required, tag = "1")]
    pub mode: i32,
    /// The set of nodes, without zeros at its end.
    #[prost(bytes, required, tag = "2")]
    pub nodes: Vec<u8>,
}

/// A question for a policy.
#[derive(Debug, Clone, Copy)]
pub struct Question(OpId, DataRef);

fn ask(p: &mut Program, what: &str, address: u64, flags: i32) -> Question {
    let out = p.zeroed(8 + NODES_BYTES);
    let nodes = p.part(out, 8, NODES_BYTES);
    let args = [
        out.into(),
        nodes.into(),
        NODES_BITS.into(),
        address.into(),
        flags.into(),
    ];
    // Kernels without NUMA have no such call.
    Question(p.try_call(libc::SYS_get_mempolicy, what, &args), out)
}

/// Asks for the policy of the mapping at an address.
pub fn query_mapping(p: &mut Program, address: u64) -> Question {
    ask(p, "read a mapping's memory policy", address, MPOL_F_ADDR)
}

/// Asks for the thread's own policy.
pub fn query_thread(p: &mut Program) -> Question {
    ask(p, "read the memory policy", 0, 0)
}

/// The answer; `None` for the default policy.
pub fn answer(out: &Outcome, Question(op, data): Question) -> Option<Policy> {
    let bytes = out.data(data);
    let mode = i32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"));
    if out.result(op) < 0 || mode == 0 {
        return None;
    }
    let nodes = &bytes[8..];
    let end = nodes.iter().rposition(|&b| b != 0).map_or(0, |n| n + 1);
    Some(Policy {
        mode,
        nodes: nodes[..end].to_vec(),
    })
}

fn nodes(p: &mut Program, policy: &Policy) -> DataRef {
    let mut nodes = policy.nodes.clone();
    nodes.resize(NODES_BYTES, 0);
    p.bytes(&nodes)
}

/// Adds the call that gives a mapping its policy.
pub fn restore_mapping(p: &mut Program, v: &VmaPolicy) {
    let nodes = nodes(p, &v.policy);
    let args = [
        v.start.into(),
        (v.end - v.start).into(),
        v.policy.mode.into(),
        nodes.into(),
        (NODES_BITS + 1).into(),
        MPOL_MF_MOVE.into(),
    ];
    let what = format!("set the memory policy of {:x}-{:x}", v.start, v.end);
    p.call(libc::SYS_mbind, what, &args);
}

/// Adds the call that gives a thread its policy.
pub fn restore_thread(p: &mut Program, policy: &Policy) {
    let nodes = nodes(p, policy);
    let args = [policy.mode.into(), nodes.into(), (NODES_BITS + 1).into()];
    p.call(libc::SYS_set_mempolicy, "set the memory policy", &args);
}
