//! Sockets: what they are, and how they come back.
//!
//! Each kind has one file with its `save`, what it refuses, and its `restore`.
//! Sockets are examined through duplicates of the task's descriptors and made
//! again by the controller; see [`crate::file`].

pub(crate) mod credentials;
mod datagram;
pub(crate) mod device;
mod diag;
mod footing;
pub(crate) mod fuzzing;
pub(crate) mod home;
pub(crate) mod inet;
mod inet_diag;
pub(crate) mod lock;
mod multicast;
pub(crate) mod netlink;
pub(crate) mod opts;
pub(crate) mod packet;
pub(crate) mod peer;
mod steer;
pub(crate) mod sys;
pub(crate) mod tcp;
pub(crate) mod unix;
pub(crate) mod unix_back;
pub(crate) mod unix_queue;
mod urgent;
mod wire;

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::sys as file_sys;
use crate::sys::{SysError, SysResult};

/// The three numbers that socket(2) takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub domain: i32,
    pub kind: i32,
    pub protocol: i32,
}

impl Kind {
    pub(crate) fn of(fd: BorrowedFd<'_>) -> SysResult<Self> {
        let get = |name| file_sys::socket_option_int(fd, libc::SOL_SOCKET, name);
        Ok(Self {
            domain: get(libc::SO_DOMAIN)?,
            kind: get(libc::SO_TYPE)?,
            protocol: get(libc::SO_PROTOCOL)?,
        })
    }
}

/// Saves a socket, or says why not.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    unix: &mut unix::Table,
) -> Result<(), Stop> {
    let kind = Kind::of(file.fd)?;
    match kind.domain {
        libc::AF_INET | libc::AF_INET6 => inet::save(file, saved, kind),
        libc::AF_UNIX => unix::save(file, saved, kind, unix),
        libc::AF_NETLINK => netlink::save(file, saved, kind),
        libc::AF_PACKET => packet::save(file, saved, kind),
        other => refuse(
            format!("{} socket", family(other)),
            "sockets of this family are not carried",
            "untag the unit",
        ),
    }
}

/// A family's name for messages.
fn family(number: i32) -> String {
    let name = match number {
        libc::AF_ALG => "kernel crypto",
        libc::AF_BLUETOOTH => "Bluetooth",
        libc::AF_CAN => "CAN",
        libc::AF_PPPOX => "PPP",
        libc::AF_RDS => "RDS",
        libc::AF_TIPC => "TIPC",
        libc::AF_VSOCK => "virtual machine",
        libc::AF_XDP => "XDP",
        AF_SMC => "SMC",
        AF_KCM => "KCM",
        AF_QIPCRTR => "Qualcomm router",
        _ => return format!("family {number}"),
    };
    name.into()
}

// linux/socket.h
const AF_KCM: i32 = 41;
const AF_QIPCRTR: i32 = 42;
const AF_SMC: i32 = 43;

/// Makes a socket. Ping sockets are for members of certain groups only, of which
/// `gid`, the group that made the old one, was one.
pub(crate) fn make(kind: Kind, gid: Option<u32>) -> SysResult<OwnedFd> {
    let make = || file_sys::socket(kind.domain, kind.kind, kind.protocol);
    let ping = [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&kind.protocol);
    match gid {
        Some(gid) if ping && kind.kind == libc::SOCK_DGRAM => sys::as_group(gid, make),
        _ => make(),
    }
}

/// Gives the socket's inode its owner, which the kernel uses as the socket's.
pub(crate) fn set_owner(
    fd: BorrowedFd<'_>,
    uid: Option<u32>,
    gid: Option<u32>,
) -> Result<(), BuildError> {
    use nix::unistd::{Gid, Uid, fchown};
    if uid.unwrap_or(0) != 0 || gid.unwrap_or(0) != 0 {
        fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw))
            .map_err(|e| SysError::new("fchown", "socket", e))?;
    }
    Ok(())
}
