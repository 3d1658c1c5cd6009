//! Unix sockets as they come back.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{FchmodatFlags, SFlag, lstat};
use nix::sys::stat::{Mode, fchmodat, umask};
use nix::unistd::{Gid, Uid, chdir, chroot, fchdir, fchownat, unlink};

use super::unix::LISTEN;
use super::{opts, set_owner};
use crate::file::error::BuildError;
use crate::file::record::{Fate, RcrFile, RcrSocket};
use crate::file::sys;
use crate::image::schema::{SkPacketEntry, SkShutdown, UnixSkEntry};
use crate::image::{ImageError, ImageSource, Kind as ImageKind, get_reader, names};
use crate::sys::{SysError, SysResult};

/// One socket's records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    pub usk: &'a UnixSkEntry,
    pub extra: Option<&'a RcrFile>,
}

static PLAIN: RcrSocket = RcrSocket {
    local: None,
    peer: None,
    options: Vec::new(),
    fate: None,
    uid: None,
    gid: None,
    path: None,
    peer_id: None,
    accepted_by: None,
};

impl<'a> Record<'a> {
    pub(crate) fn more(&self) -> &'a RcrSocket {
        self.extra.and_then(|e| e.socket.as_ref()).unwrap_or(&PLAIN)
    }

    fn kind(&self) -> i32 {
        self.usk.r#type as i32
    }
}

/// Unread data by socket inode.
pub(crate) type Queues = BTreeMap<u32, Vec<Vec<u8>>>;

/// Reads the queues.
pub(crate) fn load_queues(source: &dyn ImageSource) -> Result<Queues, ImageError> {
    let mut queues = Queues::new();
    let Some(mut reader) = get_reader(source, ImageKind::SkQueues, names::SK_QUEUES)? else {
        return Ok(queues);
    };
    while let Some(head) = reader.record::<SkPacketEntry>()? {
        let data = reader.payload(head.length.into())?.to_vec();
        queues.entry(head.id_for).or_default().push(data);
    }
    Ok(queues)
}

/// A socket without a living peer: listening, unconnected, or left alone.
pub(crate) fn single(
    r: Record<'_>,
    root: Option<BorrowedFd<'_>>,
    queues: &Queues,
) -> Result<OwnedFd, BuildError> {
    if r.more().fate() == Fate::Closed {
        let (fd, peer) = sys::socket_pair(r.kind())?;
        prepare(r, fd.as_fd(), root)?;
        send_queue(r, queues, peer.as_fd())?;
        finish(r, fd.as_fd())?;
        return Ok(fd);
    }
    let fd = sys::socket(libc::AF_UNIX, r.kind(), 0)?;
    prepare(r, fd.as_fd(), root)?;
    if r.usk.state == LISTEN {
        sys::listen(fd.as_fd(), r.usk.backlog as i32)?;
        return Ok(fd);
    }
    if let Some(local) = &r.more().local
        && queues.contains_key(&r.usk.ino)
    {
        let sender = sys::socket(libc::AF_UNIX, r.kind(), 0)?;
        reach(r, sender.as_fd(), local, root)?;
        send_queue(r, queues, sender.as_fd())?;
    }
    finish(r, fd.as_fd())?;
    Ok(fd)
}

/// Both ends of a connection inside the service. With `listener` the second
/// end is one that was accepted from it.
pub(crate) fn pair(
    a: Record<'_>,
    b: Record<'_>,
    roots: (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>),
    listener: Option<(Record<'_>, BorrowedFd<'_>)>,
    queues: &Queues,
) -> Result<(OwnedFd, OwnedFd), BuildError> {
    let (fd_a, fd_b) = match listener {
        None => {
            let (fd_a, fd_b) = sys::socket_pair(a.kind())?;
            prepare(a, fd_a.as_fd(), roots.0)?;
            prepare(b, fd_b.as_fd(), roots.1)?;
            (fd_a, fd_b)
        }
        Some((server, server_fd)) => {
            let client = sys::socket(libc::AF_UNIX, a.kind(), 0)?;
            prepare(a, client.as_fd(), roots.0)?;
            let name = server.more().local.as_deref().unwrap_or_default();
            reach(server, client.as_fd(), name, roots.1)?;
            let accepted = sys::accept(server_fd)?;
            set_owner(accepted.as_fd(), b.more().uid, b.more().gid)?;
            opts::restore(accepted.as_fd(), &b.more().options, &b.usk.opts)?;
            (client, accepted)
        }
    };
    send_queue(a, queues, fd_b.as_fd())?;
    send_queue(b, queues, fd_a.as_fd())?;
    finish(a, fd_a.as_fd())?;
    finish(b, fd_b.as_fd())?;
    Ok((fd_a, fd_b))
}

/// A datagram socket that sends to another one, which does not send back.
pub(crate) fn sender(
    r: Record<'_>,
    to: Record<'_>,
    roots: (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>),
    queues: &Queues,
) -> Result<OwnedFd, BuildError> {
    let fd = single(r, roots.0, queues)?;
    let name = to.more().local.as_deref();
    let name = name.ok_or_else(|| BuildError::Images("the peer has no name".into()))?;
    reach(to, fd.as_fd(), name, roots.1)?;
    Ok(fd)
}

/// Owner, options and name.
fn prepare(
    r: Record<'_>,
    fd: BorrowedFd<'_>,
    root: Option<BorrowedFd<'_>>,
) -> Result<(), BuildError> {
    let more = r.more();
    set_owner(fd, more.uid, more.gid)?;
    opts::restore(fd, &more.options, &r.usk.opts)?;
    let Some(local) = &more.local else {
        return Ok(());
    };
    let Some(path) = &more.path else {
        // An abstract name.
        sys::bind(fd, local)?;
        return Ok(());
    };
    if more.accepted_by.is_some() {
        return Ok(());
    }
    let perms = r.usk.file_perms.unwrap_or_default();
    at_path(root, path, local, move |path| {
        remove_stale(path)?;
        umask(Mode::from_bits_truncate(!perms.mode & 0o777));
        sys::bind(fd, local)?;
        let failed = |call, e| SysError::new(call, path.to_string_lossy(), e);
        let cwd = nix::fcntl::AT_FDCWD;
        let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
        fchownat(
            cwd,
            path.as_c_str(),
            Some(uid),
            Some(gid),
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|e| failed("fchownat", e))?;
        let mode = Mode::from_bits_truncate(perms.mode & 0o7777);
        fchmodat(cwd, path.as_c_str(), mode, FchmodatFlags::FollowSymlink)
            .map_err(|e| failed("fchmodat", e))
    })
}

/// Connects to a named socket of the service.
fn reach(
    to: Record<'_>,
    fd: BorrowedFd<'_>,
    name: &[u8],
    root: Option<BorrowedFd<'_>>,
) -> Result<(), BuildError> {
    match &to.more().path {
        None => Ok(sys::connect(fd, name)?),
        Some(path) => at_path(root, path, name, move |_| sys::connect(fd, name)),
    }
}

/// A socket that a former run left at this path is in the way of bind(2).
fn remove_stale(path: &CString) -> SysResult<()> {
    let failed = |call, e| SysError::new(call, path.to_string_lossy(), e);
    match lstat(path.as_c_str()) {
        Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(failed("lstat", e)),
        Ok(s) if s.st_mode & libc::S_IFMT == SFlag::S_IFSOCK.bits() => {
            unlink(path.as_c_str()).map_err(|e| failed("unlink", e))
        }
        Ok(_) => Err(failed("bind", Errno::EEXIST)),
    }
}

/// Runs `f` where the root directory is `root` and the name that the service
/// used leads to `path`. The name may be relative: the working directory is
/// then what it was relative to.
///
/// Root and working directory belong to a thread that ends with the call.
fn at_path(
    root: Option<BorrowedFd<'_>>,
    path: &str,
    address: &[u8],
    f: impl FnOnce(&CString) -> SysResult<()> + Send,
) -> Result<(), BuildError> {
    let used = sys::show_address(address);
    let dir = if used.starts_with('/') {
        "/"
    } else {
        path.strip_suffix(&used).ok_or_else(|| {
            BuildError::Images(format!(
                "a socket at {path} cannot have been bound as {used}"
            ))
        })?
    };
    let nul = |_| BuildError::Images("a path contains NUL".into());
    let dir = CString::new(dir).map_err(nul)?;
    let path = CString::new(path).map_err(nul)?;
    std::thread::scope(|scope| {
        let work = || {
            let failed = |call, e| SysError::new(call, path.to_string_lossy(), e);
            unshare(CloneFlags::CLONE_FS).map_err(|e| failed("unshare", e))?;
            if let Some(root) = root {
                fchdir(root).map_err(|e| failed("fchdir", e))?;
                chroot(".").map_err(|e| failed("chroot", e))?;
            }
            chdir(dir.as_c_str()).map_err(|e| failed("chdir", e))?;
            f(&path)
        };
        scope
            .spawn(work)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(())
}

/// Sends what the socket had not read, through its peer.
fn send_queue(r: Record<'_>, queues: &Queues, peer: BorrowedFd<'_>) -> Result<(), BuildError> {
    let Some(packets) = queues.get(&r.usk.ino) else {
        return Ok(());
    };
    let before = sys::socket_option_int(peer, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    let locked = sys::socket_option_int(peer, libc::SOL_SOCKET, opts::SO_BUF_LOCK)?;
    let total: usize = packets.iter().map(|p| p.len() + 4096).sum();
    let force = |n: usize| {
        let n = i32::try_from(n).unwrap_or(i32::MAX / 2).to_ne_bytes();
        sys::set_socket_option(peer, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &n)
    };
    force(total.max(before as usize / 2))?;
    for packet in packets {
        let mut rest = packet.as_slice();
        loop {
            let n = sys::send(peer, rest)?;
            rest = &rest[n..];
            if rest.is_empty() {
                break;
            }
        }
    }
    force(before as usize / 2)?;
    // The size is no more the user's choice than it was.
    sys::set_socket_option(
        peer,
        libc::SOL_SOCKET,
        opts::SO_BUF_LOCK,
        &locked.to_ne_bytes(),
    )?;
    Ok(())
}

/// Directions that were shut down.
fn finish(r: Record<'_>, fd: BorrowedFd<'_>) -> Result<(), BuildError> {
    let how = match r.usk.shutdown() {
        SkShutdown::None => return Ok(()),
        SkShutdown::Read => libc::SHUT_RD,
        SkShutdown::Write => libc::SHUT_WR,
        SkShutdown::Both => libc::SHUT_RDWR,
    };
    Ok(sys::shutdown(fd, how)?)
}
