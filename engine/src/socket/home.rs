//! The network namespaces that sockets belong to, whatever those of the tasks
//! that hold them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::fstat;

use crate::file::sys;
use crate::namespace::net::inside_net;
use crate::namespace::{NsIds, NsKind};
use crate::sys::{SysError, SysResult};

/// Namespaces met with sockets, and which socket is in which.
#[derive(Debug, Default)]
pub(crate) struct Homes {
    /// By inode number.
    seen: BTreeMap<u64, OwnedFd>,
    /// By file id.
    of: BTreeMap<u32, u64>,
}

impl Homes {
    /// Notes where a socket is at home.
    pub(crate) fn note(&mut self, id: u32, fd: BorrowedFd<'_>) -> SysResult<()> {
        let (inode, ns) = home(fd)?;
        if inode != own()? {
            self.seen.entry(inode).or_insert(ns);
            self.of.insert(id, inode);
        }
        Ok(())
    }

    /// Where a socket is at home, by inode number; none: in our own namespace.
    pub(crate) fn of(&self, id: u32) -> Option<u64> {
        self.of.get(&id).copied()
    }

    /// Every namespace that is not our own, with one of its sockets.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, u32)> {
        self.seen.iter().filter_map(|(&inode, ns)| {
            let id = self.of.iter().find(|(_, i)| **i == inode)?.0;
            Some((inode, ns.as_fd(), *id))
        })
    }
}

fn own() -> SysResult<u64> {
    let ids = NsIds::own().map_err(|_| SysError::new("stat", "own namespaces", Errno::ESRCH))?;
    Ok(ids.get(NsKind::Net))
}

fn home(fd: BorrowedFd<'_>) -> SysResult<(u64, OwnedFd)> {
    let ns = sys::socket_net(fd)?;
    let stat = fstat(&ns).map_err(|e| SysError::new("fstat", "network namespace", e))?;
    Ok((stat.st_ino, ns))
}

/// Does something in the network namespace of a socket.
pub(crate) fn at_home<T: Send>(
    fd: BorrowedFd<'_>,
    work: impl FnOnce() -> SysResult<T> + Send,
) -> SysResult<T> {
    let (inode, ns) = home(fd)?;
    if inode == own()? {
        return work();
    }
    let entered = inside_net(ns.as_fd(), || Ok(work()));
    entered.map_err(|e| {
        let errno = e.errno().map_or(Errno::EIO, Errno::from_raw);
        SysError::new("setns", "network namespace of a socket", errno)
    })?
}
