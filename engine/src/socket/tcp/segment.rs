//! Segments of our own making, as if the peer had sent them.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::super::lock::{Ends, MARK};
use super::super::sys::send_to;
use crate::file::sys;
use crate::sys::{SysError, SysResult};

pub(super) const FIN: u8 = 1;
pub(super) const ACK: u8 = 16;

/// A segment without data, from the peer to us.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
}

impl Segment {
    /// Hands it to the kernel as if it came from the peer. `local` is our
    /// address as the socket knows it: the scope of a link-local one counts.
    pub(super) fn arrive(&self, ends: &Ends, local: &[u8]) -> SysResult<()> {
        let v4 = ends.local.len() == 4;
        let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
        let fd = sys::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        let mark = MARK.to_ne_bytes();
        sys::set_socket_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &mark)?;
        let tcp = self.tcp(ends);
        let mut to = (family as u16).to_ne_bytes().to_vec();
        to.extend_from_slice(&[0; 2]);
        let packet = if v4 {
            to.extend_from_slice(&ends.local);
            to.extend_from_slice(&[0; 8]);
            // The kernel fills in length, id and checksum.
            let mut head = vec![
                0x45,
                0,
                0,
                0,
                0,
                0,
                0x40,
                0,
                64,
                libc::IPPROTO_TCP as u8,
                0,
                0,
            ];
            head.extend_from_slice(&ends.peer);
            head.extend_from_slice(&ends.local);
            [head, tcp].concat()
        } else {
            to.extend_from_slice(&[0; 4]);
            to.extend_from_slice(&ends.local);
            let scope = local.get(24..28).unwrap_or(&[0; 4]);
            to.extend_from_slice(scope);
            let len = tcp.len() as u8;
            let mut head = vec![0x60, 0, 0, 0, 0, len, libc::IPPROTO_TCP as u8, 64];
            head.extend_from_slice(&ends.peer);
            head.extend_from_slice(&ends.local);
            [head, tcp].concat()
        };
        send_to(fd.as_fd(), &packet, &to)
            .map_err(|e| SysError::new("sendto", sys::show_address(local), e.errno))
    }

    fn tcp(&self, ends: &Ends) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20);
        tcp.extend_from_slice(&ends.peer_port);
        tcp.extend_from_slice(&ends.local_port);
        tcp.extend_from_slice(&self.sequence.to_be_bytes());
        tcp.extend_from_slice(&self.acknowledged.to_be_bytes());
        tcp.extend_from_slice(&[5 << 4, self.flags]);
        tcp.extend_from_slice(&self.window.to_be_bytes());
        tcp.extend_from_slice(&[0; 4]);
        let mut pseudo = [&ends.peer[..], &ends.local].concat();
        pseudo.extend_from_slice(&(tcp.len() as u32).to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, libc::IPPROTO_TCP as u8]);
        let sum = checksum(&[pseudo, tcp.clone()].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

/// The internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A state that did not come about.
pub(super) fn not_reached(state: u32, is: u32) -> SysError {
    let on = format!("a segment to state {state}: the socket is in state {is}");
    SysError::new("TCP_REPAIR", on, Errno::EPROTO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_nothing() {
        let ends = Ends {
            local: vec![127, 0, 0, 1],
            local_port: [0, 80],
            peer: vec![127, 0, 0, 2],
            peer_port: [200, 1],
        };
        let segment = Segment {
            sequence: 0x8765_4321,
            acknowledged: 0xffff_fff0,
            flags: FIN | ACK,
            window: 0xffff,
        };
        let tcp = segment.tcp(&ends);
        let pseudo = [127, 0, 0, 2, 127, 0, 0, 1, 0, 0, 0, 20, 0, 0, 0, 6];
        assert_eq!(checksum(&[&pseudo[..], &tcp].concat()), 0);
    }
}
