//! Raw calls on sockets, with typed edges.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::{SysError, SysResult};

/// `SIOCGSKNS`, linux/sockios.h: a descriptor of a socket's network namespace.
const SIOCGSKNS: u64 = 0x894c;
/// `SIOCOUTQNSD`, linux/sockios.h: bytes not sent yet.
const SIOCOUTQNSD: u64 = 0x894b;

/// The network namespace of a socket.
pub(crate) fn socket_netns(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _, 0) };
    if r < 0 {
        return Err(SysError::last("ioctl(SIOCGSKNS)", fd.as_raw_fd()));
    }
    // SAFETY: just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

fn count(fd: BorrowedFd<'_>, call: &'static str, request: u64) -> SysResult<u32> {
    let mut n: libc::c_int = 0;
    // SAFETY: the ioctl writes one int, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut n) };
    if r < 0 {
        return Err(SysError::last(call, fd.as_raw_fd()));
    }
    Ok(n as u32)
}

/// Bytes in a stream's send queue that the peer has not acknowledged.
pub(crate) fn bytes_unacknowledged(fd: BorrowedFd<'_>) -> SysResult<u32> {
    count(fd, "ioctl(SIOCOUTQ)", libc::TIOCOUTQ)
}

/// Bytes in a stream's send queue that were not sent yet.
pub(crate) fn bytes_unsent(fd: BorrowedFd<'_>) -> SysResult<u32> {
    count(fd, "ioctl(SIOCOUTQNSD)", SIOCOUTQNSD)
}

/// Receives with flags; the bytes that came.
pub(crate) fn receive_with(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> SysResult<usize> {
    // SAFETY: the buffer has the length given and lives across the call.
    let r = unsafe {
        libc::recv(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            flags,
        )
    };
    if r < 0 {
        return Err(SysError::last("recv", format!("{} bytes", buffer.len())));
    }
    Ok(r as usize)
}

/// Sends one packet to an address.
pub(crate) fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], address: &[u8]) -> SysResult<()> {
    // SAFETY: both slices live across the call and have the lengths given.
    let r = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    if r < 0 {
        return Err(SysError::last(
            "sendto",
            crate::file::sys::show_address(address),
        ));
    }
    Ok(())
}
