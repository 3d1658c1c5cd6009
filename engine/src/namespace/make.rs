//! New namespaces that nobody is in, owned by whichever user namespace.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::ids::{NsKind, open_ns};
use super::sys::{spawn_with_namespaces, unshare};
use super::view::on_own_thread;
use super::{NamespaceError, UserNamespace};

/// Makes a namespace. `owner` is none for the caller's own user namespace.
pub(super) fn make(kind: NsKind, owner: Option<&UserNamespace>) -> Result<OwnedFd, NamespaceError> {
    let flag = match kind {
        NsKind::Net => UnshareFlags::NEWNET,
        NsKind::Ipc => UnshareFlags::NEWIPC,
        NsKind::Uts => UnshareFlags::NEWUTS,
        NsKind::Mnt => UnshareFlags::NEWNS,
        NsKind::Cgroup => UnshareFlags::NEWCGROUP,
        _ => return Err(NamespaceError::call("unshare", kind.file())(Errno::INVAL)),
    };
    match owner {
        None => on_own_thread("new namespace", || {
            unshare(flag).map_err(NamespaceError::call("unshare", kind.file()))?;
            open_ns(&format!("/proc/thread-self/ns/{}", kind.file()))
        }),
        Some(user) => {
            let helper = Helper::in_user_namespace(user.ns(), flag.bits() as i32)?;
            open_ns(&format!("/proc/{}/ns/{}", helper.0, kind.file()))
        }
    }
}

/// A child of ours, ended on drop.
pub(super) struct Helper(pub Pid);

impl Helper {
    /// One that has entered a user namespace and made namespaces there.
    fn in_user_namespace(user: BorrowedFd<'_>, kinds: i32) -> Result<Self, NamespaceError> {
        Self::start("namespace", |ready| {
            spawn_with_namespaces(user, kinds, ready)
        })
    }

    /// Starts one that reports an error number, 0 for none, when it is set up.
    pub(super) fn start(
        what: &'static str,
        spawn: impl FnOnce(&OwnedFd) -> Result<libc::pid_t, Errno>,
    ) -> Result<Self, NamespaceError> {
        let err = |call| NamespaceError::call(call, what);
        let (read, write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(err("pipe"))?;
        let child = Self(Pid::from_raw(spawn(&write).map_err(err("fork"))?));
        drop(write);
        let mut status = [0; 4];
        if rustix::io::read(&read, &mut status).map_err(err("read"))? != status.len() {
            return Err(NamespaceError::Helper { what });
        }
        match i32::from_ne_bytes(status) {
            0 => Ok(child),
            errno => Err(err("unshare")(Errno::from_raw_os_error(errno))),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Both can only fail if the child is gone, which is what is wanted.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}
