//! Unix sockets as they come back.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{FchmodatFlags, SFlag, lstat};
use nix::sys::stat::{Mode, fchmodat, umask};
use nix::unistd::{Gid, Uid, chdir, chroot, fchdir, fchownat, unlink};

use super::unix::LISTEN;
use super::unix_queue::{Later, Queues};
use super::{credentials, opts, set_owner};
use crate::file::error::BuildError;
use crate::file::record::{Fate, RcrFile, RcrSocket};
use crate::file::{RestoreEnv, sys};
use crate::image::schema::{SkShutdown, UnixSkEntry};
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
    pending_on: None,
    pending_place: None,
    deleted: None,
    datagrams: Vec::new(),
    urgent_at: None,
    peer_cred: None,
    devices: Vec::new(),
};

impl<'a> Record<'a> {
    pub(crate) fn more(&self) -> &'a RcrSocket {
        self.extra
            .and_then(|e| e.socket.as_deref())
            .unwrap_or(&PLAIN)
    }

    fn kind(&self) -> i32 {
        self.usk.r#type as i32
    }
}

/// A socket without a living peer: listening, unconnected, or left alone.
pub(crate) fn single(
    env: &dyn RestoreEnv,
    r: Record<'_>,
    root: Option<BorrowedFd<'_>>,
    queues: &Queues,
    later: &mut Later,
) -> Result<OwnedFd, BuildError> {
    let seen = r.more().peer_cred.as_ref();
    if r.more().fate() == Fate::Closed {
        let (fd, peer) = credentials::pair(env, r.kind(), seen)?;
        prepare(r, fd.as_fd(), root)?;
        later.send((r.usk.id, r.usk.ino), queues, peer.as_fd())?;
        finish(r, fd.as_fd(), later)?;
        return Ok(fd);
    }
    let fd = sys::socket(libc::AF_UNIX, r.kind(), 0)?;
    prepare(r, fd.as_fd(), root)?;
    if r.usk.state == LISTEN {
        credentials::listen(env, fd.as_fd(), r.usk.backlog as i32, seen)?;
        return Ok(fd);
    }
    if let Some(local) = &r.more().local
        && queues.contains_key(&r.usk.ino)
    {
        let sender = sys::socket(libc::AF_UNIX, r.kind(), 0)?;
        reach(r, sender.as_fd(), local, root)?;
        later.send((r.usk.id, r.usk.ino), queues, sender.as_fd())?;
    }
    finish(r, fd.as_fd(), later)?;
    Ok(fd)
}

/// Both ends of a connection inside the service. With `listener` the second
/// end is one that was accepted from it.
pub(crate) fn pair(
    env: &dyn RestoreEnv,
    a: Record<'_>,
    b: Record<'_>,
    roots: (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>),
    listener: Option<(Record<'_>, BorrowedFd<'_>)>,
    queues: &Queues,
    later: &mut Later,
) -> Result<(OwnedFd, OwnedFd), BuildError> {
    let (fd_a, fd_b) = match listener {
        None => {
            let (fd_a, fd_b) = credentials::pair(env, a.kind(), a.more().peer_cred.as_ref())?;
            prepare(a, fd_a.as_fd(), roots.0)?;
            prepare(b, fd_b.as_fd(), roots.1)?;
            (fd_a, fd_b)
        }
        Some((server, server_fd)) => {
            let client = sys::socket(libc::AF_UNIX, a.kind(), 0)?;
            prepare(a, client.as_fd(), roots.0)?;
            let name = server.more().local.as_deref().unwrap_or_default();
            let stand_in = match (&server.more().path, server.more().deleted) {
                (Some(path), Some(true)) => Some(stand_in(a.kind(), path, name)?),
                _ => None,
            };
            let at = stand_in.as_ref().map_or(server_fd, AsFd::as_fd);
            // What the client sees is whoever listened last.
            let backlog = server.usk.backlog as i32;
            credentials::listen(env, at, backlog, a.more().peer_cred.as_ref())?;
            let maker = b.more().peer_cred.as_ref();
            credentials::connect(env, client.as_fd(), (at, name), maker)?;
            let accepted = sys::accept(at)?;
            set_owner(accepted.as_fd(), b.more().uid, b.more().gid)?;
            opts::restore(accepted.as_fd(), &b.more().options, &b.usk.opts)?;
            (client, accepted)
        }
    };
    later.send((a.usk.id, a.usk.ino), queues, fd_b.as_fd())?;
    later.send((b.usk.id, b.usk.ino), queues, fd_a.as_fd())?;
    finish(a, fd_a.as_fd(), later)?;
    finish(b, fd_b.as_fd(), later)?;
    Ok((fd_a, fd_b))
}

/// A listener of the name of one whose file was removed.
fn stand_in(kind: i32, path: &str, name: &[u8]) -> Result<OwnedFd, BuildError> {
    let listener = sys::socket(libc::AF_UNIX, kind, 0)?;
    at_hidden_path(path, name, || sys::bind(listener.as_fd(), name))?;
    Ok(listener)
}

/// A datagram socket that sends to another one, which does not send back.
pub(crate) fn sender(
    env: &dyn RestoreEnv,
    r: Record<'_>,
    to: Record<'_>,
    roots: (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>),
    queues: &Queues,
    later: &mut Later,
) -> Result<OwnedFd, BuildError> {
    let fd = single(env, r, roots.0, queues, later)?;
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
    if more.deleted == Some(true) {
        return at_hidden_path(path, local, move || sys::bind(fd, local));
    }
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

/// The directory that the name which the service used is relative to.
fn base<'a>(path: &'a str, address: &[u8]) -> Result<&'a str, BuildError> {
    let used = sys::show_address(address);
    if used.starts_with('/') {
        return Ok("/");
    }
    path.strip_suffix(&used).ok_or_else(|| {
        BuildError::Images(format!(
            "a socket at {path} cannot have been bound as {used}"
        ))
    })
}

/// Runs `f`, which makes a file at `path`, where nobody else sees it, and takes
/// the file away again: on an empty filesystem that is mounted nowhere.
///
/// Root and working directory belong to a thread that ends with the call.
fn at_hidden_path(
    path: &str,
    address: &[u8],
    f: impl FnOnce() -> SysResult<()> + Send,
) -> Result<(), BuildError> {
    let base = base(path, address)?;
    let empty = empty_filesystem().map_err(|e| {
        let errno = Errno::from_raw(e.raw_os_error());
        SysError::new("fsmount", path, errno)
    })?;
    std::thread::scope(|scope| {
        let work = || {
            let failed = |call, e| SysError::new(call, path, e);
            unshare(CloneFlags::CLONE_FS).map_err(|e| failed("unshare", e))?;
            fchdir(&empty).map_err(|e| failed("fchdir", e))?;
            chroot(".").map_err(|e| failed("chroot", e))?;
            let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
            std::fs::create_dir_all(parent).map_err(|e| {
                let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
                failed("mkdir", errno)
            })?;
            chdir(base).map_err(|e| failed("chdir", e))?;
            f()?;
            unlink(path).map_err(|e| failed("unlink", e))
        };
        scope
            .spawn(work)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(())
}

fn empty_filesystem() -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    use rustix::mount::{fsconfig_create, fsmount, fsopen};
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&fs)?;
    let attributes = MountAttrFlags::empty();
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
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
    let dir = base(path, address)?;
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

/// A connection that its listener has not accepted yet.
pub(crate) fn pending(
    r: Record<'_>,
    listener: Record<'_>,
    roots: (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>),
) -> Result<OwnedFd, BuildError> {
    let fd = sys::socket(libc::AF_UNIX, r.kind(), 0)?;
    prepare(r, fd.as_fd(), roots.0)?;
    let name = listener.more().local.as_deref().unwrap_or_default();
    reach(listener, fd.as_fd(), name, roots.1)?;
    finish(r, fd.as_fd(), &mut Later::default())?;
    Ok(fd)
}

/// Sends a packet to a named socket of the service.
pub(crate) fn send_to(
    to: Record<'_>,
    root: Option<BorrowedFd<'_>>,
    f: impl FnOnce(&[u8]) -> SysResult<()> + Send,
) -> Result<(), BuildError> {
    let name = to.more().local.as_deref();
    let name = name.ok_or_else(|| BuildError::Images("the receiver has no name".into()))?;
    match &to.more().path {
        None => Ok(f(name)?),
        Some(path) => at_path(root, path, name, move |_| f(name)),
    }
}

/// Directions that were shut down; behind packets that are still to come.
fn finish(r: Record<'_>, fd: BorrowedFd<'_>, later: &mut Later) -> Result<(), BuildError> {
    let how = match r.usk.shutdown() {
        SkShutdown::None => return Ok(()),
        SkShutdown::Read => libc::SHUT_RD,
        SkShutdown::Write => libc::SHUT_WR,
        SkShutdown::Both => libc::SHUT_RDWR,
    };
    let peer = r.more().peer_id.unwrap_or(r.usk.id);
    if later.awaits(&[r.usk.id, peer]) {
        later.shutdowns.push((sys::dup(fd)?, how));
        return Ok(());
    }
    Ok(sys::shutdown(fd, how)?)
}
