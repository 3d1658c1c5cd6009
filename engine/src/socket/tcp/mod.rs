//! TCP connections that go on, by way of `TCP_REPAIR` (tcp(7)).
//!
//! ```text
//!   frozen ─► packets locked out ─► repair on, state and queues read, off ─► thaw: lock gone
//!                                                                      └─► kill: lock stays,
//!                                                                          closed without a word
//!   restore ─► sockets in repair: sequence numbers, queues, state ─► all stand ─► lock gone
//!           ─► repair off, what was never sent is sent
//! ```
//! The kernel has no call that takes a FIN into a socket's state. Ours is made by
//! shutdown(2) in repair mode; the peer's, and the acknowledgement of ours, by a
//! packet of our own ([`segment`]) that the lock lets pass.

mod back;
mod examine;
mod save;
mod segment;

pub(crate) use back::Connections;
pub(crate) use examine::{LISTEN, Look, MPTCP, drop_unaccepted, look};
pub(crate) use save::{Held, Stream, settle};

use std::os::fd::BorrowedFd;

use crate::file::sys;
use crate::sys::SysResult;

// net/tcp_states.h
pub(crate) const ESTABLISHED: u32 = 1;
pub(crate) const SYN_SENT: u32 = 2;
pub(crate) const FIN_WAIT1: u32 = 4;
pub(crate) const FIN_WAIT2: u32 = 5;
pub(crate) const CLOSE_WAIT: u32 = 8;
pub(crate) const LAST_ACK: u32 = 9;
pub(crate) const CLOSING: u32 = 11;

// linux/tcp.h
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Off, and tell the peer where we are.
const REPAIR_OFF: i32 = 0;
const REPAIR_ON: i32 = 1;
/// Off without a packet.
const REPAIR_OFF_SILENT: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// Bits of `tcpi_options` and of [`crate::image::schema::TcpStreamEntry::opt_mask`].
const TIMESTAMPS: u32 = 1;
const SACK: u32 = 2;
const WINDOW_SCALE: u32 = 4;

/// Whether a socket in this state is a connection that can go on.
pub(crate) fn goes_on(state: u32) -> bool {
    matches!(
        state,
        ESTABLISHED | SYN_SENT | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING
    )
}

/// We have shut our side down.
fn fin_ours(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
}

/// We have, and the peer has not acknowledged it.
fn fin_pending(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | CLOSING | LAST_ACK)
}

/// The peer has shut its side down.
fn fin_theirs(state: u32) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
}

fn repair(fd: BorrowedFd<'_>, how: i32) -> SysResult<()> {
    set(fd, TCP_REPAIR, how)
}

fn set(fd: BorrowedFd<'_>, name: i32, value: i32) -> SysResult<()> {
    sys::set_socket_option(fd, libc::IPPROTO_TCP, name, &value.to_ne_bytes())
}

fn get(fd: BorrowedFd<'_>, name: i32) -> SysResult<u32> {
    sys::socket_option_int(fd, libc::IPPROTO_TCP, name).map(|v| v as u32)
}

/// `tcpi_state`, `tcpi_options` and the two window scales (sender's, receiver's).
fn info(fd: BorrowedFd<'_>) -> SysResult<(u32, u32, u32, u32)> {
    let b = sys::socket_option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 8)?;
    let at = |i: usize| u32::from(b.get(i).copied().unwrap_or(0));
    Ok((at(0), at(5), at(6) & 15, at(6) >> 4))
}
