//! What sock_diag(7) says about TCP sockets that the socket itself does not.

use std::os::fd::{AsFd, BorrowedFd};

use super::lock::inside;
use super::tcp::SYN_SENT;
use super::wire::{self, Messages, NLM_F_DUMP, word};
use crate::file::sys;
use crate::sys::SysResult;

/// linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Where a TCP socket in state SYN-SENT is connecting to, as a raw address.
pub(super) fn connecting_to(
    netns: Option<BorrowedFd<'_>>,
    family: i32,
    ino: u32,
) -> SysResult<Option<Vec<u8>>> {
    let make = || sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG);
    let fd = inside(netns, make)?;
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states, id.
    let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend_from_slice(&(1u32 << SYN_SENT).to_ne_bytes());
    request.resize(56, 0);
    let mut messages = Messages::default();
    messages.message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 1, &request);
    let mut found = None;
    wire::converse(
        fd.as_fd(),
        "TCP socket diagnosis",
        &messages.finish(),
        |m| {
            if word(m, 68)? == ino {
                found = Some(peer(m, family)?);
            }
            Some(())
        },
    )?;
    Ok(found)
}

/// The other end in a `struct inet_diag_msg`.
pub(super) fn peer(message: &[u8], family: i32) -> Option<Vec<u8>> {
    let mut raw = (family as u16).to_ne_bytes().to_vec();
    raw.extend_from_slice(message.get(6..8)?);
    if family == libc::AF_INET {
        raw.extend_from_slice(message.get(24..28)?);
        raw.extend_from_slice(&[0; 8]);
    } else {
        raw.extend_from_slice(&[0; 4]);
        raw.extend_from_slice(message.get(24..40)?);
        // The scope of a link-local address.
        raw.extend_from_slice(message.get(40..44)?);
    }
    Some(raw)
}
