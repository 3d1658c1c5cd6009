//! Raw calls on sockets.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{done, owned};
use crate::sys::{SysError, SysResult};

/// `SIOCUNIXFILE`, linux/un.h: an O_PATH descriptor of a bound unix socket's file.
const SIOCUNIXFILE: u64 = 0x89e0;

/// The file a unix socket is bound to, as an O_PATH descriptor.
pub(crate) fn unix_socket_file(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    owned("ioctl(SIOCUNIXFILE)", fd.as_raw_fd(), r.into())
}

/// The network namespace a socket belongs to.
pub(crate) fn socket_net(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // linux/sockios.h
    const SIOCGSKNS: u64 = 0x894c;
    // SAFETY: the ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _, 0) };
    owned("ioctl(SIOCGSKNS)", fd.as_raw_fd(), r.into())
}

/// A socket option's bytes, at most `max` of them.
pub(crate) fn socket_option(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    max: usize,
) -> SysResult<Vec<u8>> {
    let mut bytes = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    // SAFETY: the buffer has `len` bytes; the kernel writes no more and says how many.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    done(
        "getsockopt",
        format!("level {level}, option {name}"),
        r.into(),
    )?;
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// A socket option that is an int.
pub(crate) fn socket_option_int(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> SysResult<i32> {
    let b = socket_option(fd, level, name, 4)?;
    match b.as_slice() {
        // Some options write a single byte.
        [b] => Ok(i32::from(*b)),
        &[a, b, c, d] => Ok(i32::from_ne_bytes([a, b, c, d])),
        _ => Err(SysError::new(
            "getsockopt",
            format!("option {name}"),
            Errno::EINVAL,
        )),
    }
}

/// Sets a socket option.
pub(crate) fn set_socket_option(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    bytes: &[u8],
) -> SysResult<()> {
    // SAFETY: the kernel reads `bytes.len()` bytes of a live slice.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            bytes.as_ptr().cast(),
            bytes.len() as libc::socklen_t,
        )
    };
    done(
        "setsockopt",
        format!("level {level}, option {name}"),
        r.into(),
    )
    .map(drop)
}

/// Installs a classic BPF filter of 8-byte instructions.
pub(crate) fn attach_filter(fd: BorrowedFd<'_>, insns: &[u64]) -> SysResult<()> {
    let prog = libc::sock_fprog {
        len: insns.len() as u16,
        filter: insns.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `prog` and the instructions live across the call; the kernel only reads them.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const prog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    done("setsockopt(SO_ATTACH_FILTER)", insns.len(), r.into()).map(drop)
}

/// The classic BPF filter of a socket.
pub(crate) fn socket_filter(fd: BorrowedFd<'_>) -> SysResult<Vec<u64>> {
    let mut insns = vec![0u64; 4096]; // BPF_MAXINSNS
    let mut len = insns.len() as libc::socklen_t;
    // SAFETY: for this option the length counts instructions of 8 bytes, of which the
    // buffer has `len`.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            insns.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    done("getsockopt(SO_GET_FILTER)", "", r.into())?;
    insns.truncate(len as usize);
    Ok(insns)
}

/// Makes a socket.
pub(crate) fn socket(family: c_int, kind: c_int, protocol: c_int) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    let r = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    owned(
        "socket",
        format!("family {family}, type {kind}, protocol {protocol}"),
        r.into(),
    )
}

/// Makes a pair of connected unix sockets.
pub(crate) fn socket_pair(kind: c_int) -> SysResult<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the call writes two ints, alive across the call.
    let r = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    done("socketpair", format!("type {kind}"), r.into())?;
    Ok((
        owned("socketpair", "", fds[0].into())?,
        owned("socketpair", "", fds[1].into())?,
    ))
}

type AddressCall = unsafe extern "C" fn(c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> c_int;

fn address(fd: BorrowedFd<'_>, call: &'static str, f: AddressCall) -> SysResult<Vec<u8>> {
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = bytes.len() as libc::socklen_t;
    // SAFETY: `f` is getsockname or getpeername; the buffer has `len` bytes.
    let r = unsafe { f(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) };
    done(call, fd.as_raw_fd(), r.into())?;
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// The raw address a socket is bound to (`sockaddr` with its family).
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> SysResult<Vec<u8>> {
    address(fd, "getsockname", libc::getsockname)
}

/// The raw address of a socket's peer, or `None` if it has none.
pub(crate) fn peer_address(fd: BorrowedFd<'_>) -> SysResult<Option<Vec<u8>>> {
    match address(fd, "getpeername", libc::getpeername) {
        Ok(a) => Ok(Some(a)),
        Err(e) if e.errno == Errno::ENOTCONN => Ok(None),
        Err(e) => Err(e),
    }
}

/// Binds a socket to a raw address.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> SysResult<()> {
    // SAFETY: the kernel reads `address.len()` bytes of a live slice.
    let r = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done("bind", show_address(address), r.into()).map(drop)
}

/// Connects a socket to a raw address.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> SysResult<()> {
    // SAFETY: the kernel reads `address.len()` bytes of a live slice.
    let r = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done("connect", show_address(address), r.into()).map(drop)
}

/// Makes a socket listen.
pub(crate) fn listen(fd: BorrowedFd<'_>, backlog: c_int) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::listen(fd.as_raw_fd(), backlog) };
    done("listen", format!("backlog {backlog}"), r.into()).map(drop)
}

/// Takes a connection from a listening socket.
pub(crate) fn accept(fd: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // SAFETY: no address is asked for.
    let r = unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    owned("accept4", fd.as_raw_fd(), r.into())
}

/// Shuts a socket down; whether it was connected makes no difference.
///
/// The kernel marks an unconnected stream socket as shut down all the same and
/// then says ENOTCONN.
pub(crate) fn shutdown(fd: BorrowedFd<'_>, how: c_int) -> SysResult<()> {
    // SAFETY: numbers only.
    let r = unsafe { libc::shutdown(fd.as_raw_fd(), how) };
    match done("shutdown", how, r.into()) {
        Err(e) if e.errno == Errno::ENOTCONN => Ok(()),
        other => other.map(drop),
    }
}

/// Sends bytes without waiting; says how many the socket took.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> SysResult<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes of a live slice.
    let r = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    done("send", format!("{} bytes", bytes.len()), r as i64).map(|n| n as usize)
}

/// Receives bytes; waits as long as the socket's timeout says.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> SysResult<usize> {
    // SAFETY: the buffer has the length given and lives across the call.
    let r = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    done("recv", fd.as_raw_fd(), r as i64).map(|n| n as usize)
}

/// Whether a socket's peer sends nothing more, or it takes nothing more.
pub(crate) fn hung_up(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut one = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call; no waiting.
    let r = unsafe { libc::poll(&raw mut one, 1, 0) };
    done("poll", fd.as_raw_fd(), i64::from(r))?;
    Ok(one.revents & libc::POLLRDHUP != 0)
}

/// Whether something waits to be read.
pub(crate) fn readable(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut one = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call; no waiting.
    let r = unsafe { libc::poll(&raw mut one, 1, 0) };
    done("poll", fd.as_raw_fd(), i64::from(r))?;
    Ok(one.revents & libc::POLLIN != 0)
}

/// A raw address for messages.
pub(crate) fn show_address(address: &[u8]) -> String {
    let family = address
        .get(..2)
        .map(|b| i32::from(u16::from_ne_bytes([b[0], b[1]])));
    match (family, address.len()) {
        (Some(libc::AF_UNIX), 2) => "unnamed".into(),
        (Some(libc::AF_UNIX), _) if address[2] == 0 => {
            format!("@{}", String::from_utf8_lossy(&address[3..]))
        }
        (Some(libc::AF_UNIX), _) => String::from_utf8_lossy(&address[2..])
            .trim_end_matches('\0')
            .to_owned(),
        (Some(libc::AF_INET), 16..) => {
            let port = u16::from_be_bytes([address[2], address[3]]);
            let ip = std::net::Ipv4Addr::new(address[4], address[5], address[6], address[7]);
            format!("{ip}:{port}")
        }
        (Some(libc::AF_INET6), 24..) => {
            let port = u16::from_be_bytes([address[2], address[3]]);
            let ip: [u8; 16] = address[8..24].try_into().expect("16 bytes");
            format!("[{}]:{port}", std::net::Ipv6Addr::from(ip))
        }
        _ => format!("{address:02x?}"),
    }
}
