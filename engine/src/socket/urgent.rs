//! The byte of a unix stream that was sent with MSG_OOB.
//!
//! There is one at most; its place is not told by any call, but a look that
//! begins before it ends there. Looks end behind descriptors, too.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::sys;
use super::unix_queue::Packet;
use crate::file::sys as file_sys;
use crate::sys::SysResult;

/// The byte, which stays.
pub(super) fn look(fd: BorrowedFd<'_>) -> SysResult<Option<u8>> {
    let (sol, name) = (libc::SOL_SOCKET, libc::SO_OOBINLINE);
    let before = file_sys::socket_option_int(fd, sol, name)?;
    let set = |on: i32| file_sys::set_socket_option(fd, sol, name, &on.to_ne_bytes());
    if before != 0 {
        set(0)?;
    }
    let mut byte = [0];
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let seen = sys::receive_with(fd, &mut byte, flags);
    if before != 0 {
        set(before)?;
    }
    match seen {
        Ok(1) => Ok(Some(byte[0])),
        Ok(_) => Ok(None),
        // None, not connected, or a kernel without them.
        Err(e) if matches!(e.errno, Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether it is the first of the queue.
pub(super) fn first(fd: BorrowedFd<'_>) -> SysResult<bool> {
    sys::at_mark(fd)
}

/// The packets with the urgent byte in one of its own. `pieces` are those of a
/// look that does not ask for credentials.
pub(super) fn mark(
    packets: Vec<Packet>,
    pieces: &[Packet],
    byte: u8,
    first: bool,
) -> Option<Vec<Packet>> {
    let at = if first { 0 } else { place(pieces, byte)? };
    let mut marked = Vec::new();
    let mut before = 0;
    let mut done = false;
    for mut packet in packets {
        let here = before == at && !done;
        before += packet.data.len();
        if !here {
            marked.push(packet);
            continue;
        }
        if packet.data.first() != Some(&byte) {
            return None;
        }
        done = true;
        let rest = packet.data.split_off(1);
        if rest.is_empty() {
            packet.urgent = true;
            marked.push(packet);
            continue;
        }
        // Descriptors came with the last of the bytes.
        marked.push(Packet {
            data: packet.data,
            urgent: true,
            sender: packet.sender,
            ..Packet::default()
        });
        packet.data = rest;
        marked.push(packet);
    }
    done.then_some(marked)
}

/// How many bytes are before it, where something is.
fn place(pieces: &[Packet], byte: u8) -> Option<usize> {
    let mut plain = Vec::new();
    let mut others = Vec::new();
    let mut before = 0;
    for pair in pieces.windows(2) {
        before += pair[0].data.len();
        if pair[1].data.first() != Some(&byte) {
            continue;
        }
        match pair[0].files.is_empty() && pair[0].data.len() < super::unix_queue::PIECE {
            true => plain.push(before),
            false => others.push(before),
        }
    }
    match (plain.as_slice(), others.as_slice()) {
        ([at], _) | ([], [at]) => Some(*at),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use super::super::unix_queue::read;

    #[test]
    fn an_urgent_byte_is_found_wherever_it_stands() {
        for (before, after) in [
            ("", ""),
            ("", "xx"),
            ("abx", "xx"),
            ("xabc", ""),
            ("x", "x"),
        ] {
            let (a, b) = file_sys::socket_pair(libc::SOCK_STREAM).unwrap();
            let send = |text: &str, urgent| {
                let along = sys::Ancillary {
                    urgent,
                    ..sys::Ancillary::default()
                };
                if !text.is_empty() {
                    sys::send_with(a.as_fd(), text.as_bytes(), &along, None).unwrap();
                }
            };
            send(before, false);
            send("x", true);
            send(after, false);
            for _ in 0..2 {
                let packets = read(b.as_fd(), libc::SOCK_STREAM).unwrap().unwrap();
                let urgent = packets.iter().position(|p| p.urgent).unwrap();
                let text =
                    |p: &[Packet]| -> Vec<u8> { p.iter().flat_map(|p| p.data.clone()).collect() };
                assert_eq!(text(&packets[..urgent]), before.as_bytes());
                assert_eq!(packets[urgent].data, b"x");
                assert_eq!(text(&packets[urgent + 1..]), after.as_bytes());
            }
        }
    }
}
