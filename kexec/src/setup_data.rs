//! The chain of extra data behind boot_params (`struct setup_data` of
//! arch/x86/include/uapi/asm/setup_data.h).

/// More memory map entries than boot_params holds.
pub(crate) const E820_EXT: u32 = 1;
/// What a kernel started from another needs to know of EFI.
pub(crate) const EFI: u32 = 4;
/// Entropy.
pub(crate) const RNG_SEED: u32 = 9;

const HEADER_LEN: usize = 16;
const ALIGN: usize = 16;

/// Nodes that are linked when their place is known.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    nodes: Vec<(u32, Vec<u8>)>,
}

impl Chain {
    /// Appends a node.
    pub fn push(&mut self, kind: u32, data: Vec<u8>) {
        self.nodes.push((kind, data));
    }

    /// Bytes of the chain.
    pub fn len(&self) -> usize {
        self.nodes.iter().map(|(_, data)| node_len(data)).sum()
    }

    /// The chain's bytes for physical address `at`, where the first node is.
    pub fn encode(&self, at: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len());
        for (number, (kind, data)) in self.nodes.iter().enumerate() {
            let start = out.len();
            let end = start + node_len(data);
            let next = if number + 1 == self.nodes.len() {
                0
            } else {
                at + end as u64
            };
            out.extend(next.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u32).to_le_bytes());
            out.extend(data);
            out.resize(end, 0);
        }
        out
    }
}

fn node_len(data: &[u8]) -> usize {
    (HEADER_LEN + data.len()).next_multiple_of(ALIGN)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Follows a chain as the kernel does.
    pub(crate) fn follow(memory: &[u8], base: u64, mut at: u64) -> Vec<(u32, Vec<u8>)> {
        let mut nodes = Vec::new();
        while at != 0 {
            let node = &memory[(at - base) as usize..];
            at = u64::from_le_bytes(node[..8].try_into().unwrap());
            let kind = u32::from_le_bytes(node[8..12].try_into().unwrap());
            let len = u32::from_le_bytes(node[12..16].try_into().unwrap()) as usize;
            nodes.push((kind, node[16..16 + len].to_vec()));
        }
        nodes
    }

    #[test]
    fn nodes_are_found_by_following_the_links() {
        let mut chain = Chain::default();
        chain.push(9, vec![1; 32]);
        chain.push(77, vec![2; 5]);
        chain.push(1, vec![]);
        let bytes = chain.encode(0x5000);
        assert_eq!(bytes.len(), chain.len());
        let nodes = follow(&bytes, 0x5000, 0x5000);
        assert_eq!(nodes, [(9, vec![1; 32]), (77, vec![2; 5]), (1, vec![])]);
    }
}
