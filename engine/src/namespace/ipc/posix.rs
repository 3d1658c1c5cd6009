//! POSIX message queues: those of an IPC namespace by their names, and single
//! ones. Their messages are read from the kernel's own structures
//! ([`crate::sys::kernel`]): taking them out and putting them back would wake
//! who waits, and tell who asked to be told.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, fchown};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::{failed, inside};
use crate::namespace::NamespaceError;
use crate::sys::kernel::{Object, Window};
use crate::sys::mqueue::{self, Attributes};
use crate::sys::{SysError, SysResult};

const PAGE: u64 = 4096;
/// Messages of one queue: the kernel has a lower limit.
const MESSAGES_MAX: i64 = 1 << 20;

/// A POSIX message queue.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PosixQueue {
    /// Its name without the slash.
    #[prost(bytes = "vec", required, tag = "1")]
    pub name: Vec<u8>,
    /// Permission bits.
    #[prost(uint32, required, tag = "2")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, required, tag = "3")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, required, tag = "4")]
    pub gid: u32,
    /// Messages it has room for.
    #[prost(int64, required, tag = "5")]
    pub messages_max: i64,
    /// Bytes of the longest message.
    #[prost(int64, required, tag = "6")]
    pub bytes_max: i64,
    /// What is in it, in the order in which it is received.
    #[prost(message, repeated, tag = "7")]
    pub messages: Vec<PosixMessage>,
}

/// A message in a queue.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PosixMessage {
    /// Its priority.
    #[prost(uint32, required, tag = "1")]
    pub priority: u32,
    /// Its bytes.
    #[prost(bytes = "vec", required, tag = "2")]
    pub data: Vec<u8>,
}

/// The file system of the queues of the calling thread's namespace.
fn file_system() -> Result<Option<OwnedFd>, NamespaceError> {
    let err = |call| NamespaceError::call(call, "mqueue");
    let fs = match fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC) {
        // A kernel without such queues.
        Err(rustix::io::Errno::NODEV) => return Ok(None),
        fs => fs.map_err(err("fsopen"))?,
    };
    fsconfig_create(&fs).map_err(err("fsconfig"))?;
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    Ok(Some(
        fsmount(&fs, flags, attributes).map_err(err("fsmount"))?,
    ))
}

/// Device number of the queues of an IPC namespace; without one, of our own.
pub fn device(ns: Option<BorrowedFd<'_>>) -> Result<Option<u64>, NamespaceError> {
    let look = || {
        let Some(root) = file_system()? else {
            return Ok(None);
        };
        let stat = fstat(&root).map_err(|e| failed(SysError::new("fstat", "mqueue", e)))?;
        Ok(Some(stat.st_dev))
    };
    match ns {
        Some(ns) => inside(ns, look),
        None => look(),
    }
}

/// All of them, where the calling thread is.
pub(super) fn list() -> Result<Vec<PosixQueue>, NamespaceError> {
    let Some(root) = file_system()? else {
        return Ok(Vec::new());
    };
    let path = format!("/proc/self/fd/{}/.", root.as_raw_fd());
    let io = |e: std::io::Error| {
        let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        failed(SysError::new("read", "mqueue", errno))
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(io)? {
        let name = std::os::unix::ffi::OsStringExt::into_vec(entry.map_err(io)?.file_name());
        names.extend(CString::new(name).ok());
    }
    names.sort();
    let mut window = None;
    let mut all = Vec::new();
    for name in names {
        let queue = mqueue::open(&name, libc::O_RDONLY).map_err(failed)?;
        let window = match &window {
            Some(w) => w,
            None => window.insert(Window::open().map_err(failed)?),
        };
        all.push(look(window, queue.as_fd(), name.into_bytes(), true).map_err(failed)?);
    }
    Ok(all)
}

/// A queue of which we have a descriptor, with what is in it if that is asked for.
pub fn look(
    window: &Window,
    queue: BorrowedFd<'_>,
    name: Vec<u8>,
    content: bool,
) -> SysResult<PosixQueue> {
    let room = mqueue::attributes(queue)?;
    let stat = fstat(queue).map_err(|e| SysError::new("fstat", "message queue", e))?;
    let mut found = PosixQueue {
        name,
        mode: stat.st_mode & 0o777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        messages_max: room.messages_max,
        bytes_max: room.bytes_max,
        messages: Vec::new(),
    };
    if content && room.messages > 0 {
        let info = info(window, queue)?;
        messages(window, &info, &mut found.messages)?;
    }
    if content && found.messages.len() as i64 != room.messages {
        return Err(SysError::new("messages", "message queue", Errno::EAGAIN));
    }
    Ok(found)
}

/// The kernel's structure of a queue of which we have a descriptor.
pub fn info<'w>(window: &'w Window, queue: BorrowedFd<'_>) -> SysResult<Object<'w>> {
    let files = window.files(std::process::id() as i32)?;
    let fd = queue.as_raw_fd() as u32;
    let file = files.iter().find(|f| f.fd == fd);
    let lost = || SysError::new("BPF iterator", format!("fd {fd}"), Errno::EBADF);
    let file = window.object("file", file.ok_or_else(lost)?.file);
    let inode = file.number("f_inode")?;
    // The inode is part of it.
    let of_inode = window.object("mqueue_inode_info", 0).address("vfs_inode")?;
    Ok(window.object("mqueue_inode_info", inode.wrapping_sub(of_inode)))
}

/// Walks the tree of priorities, the highest first.
fn messages(window: &Window, info: &Object<'_>, out: &mut Vec<PosixMessage>) -> SysResult<()> {
    enum Visit {
        Node(u64),
        Messages { first: u64, end: u64, priority: u32 },
    }
    let torn = || SysError::new("messages", "message queue", Errno::EAGAIN);
    let mut todo = vec![Visit::Node(info.number("msg_tree.rb_node")?)];
    while let Some(visit) = todo.pop() {
        if todo.len() as i64 > MESSAGES_MAX || out.len() as i64 > MESSAGES_MAX {
            return Err(torn());
        }
        match visit {
            Visit::Node(0) => {}
            Visit::Node(at) => {
                let node = window.object("posix_msg_tree_node", at);
                let [low, high, priority, first] = node.numbers([
                    "rb_node.rb_left",
                    "rb_node.rb_right",
                    "priority",
                    "msg_list.next",
                ])?;
                let own = Visit::Messages {
                    first,
                    end: node.address("msg_list")?,
                    priority: priority as u32,
                };
                // What is put last is looked at first.
                todo.extend([Visit::Node(low), own, Visit::Node(high)]);
            }
            Visit::Messages { first, end, .. } if first == end => {}
            Visit::Messages {
                first,
                end,
                priority,
            } => {
                let message = window.object("msg_msg", first);
                let [next, bytes, more] = message.numbers(["m_list.next", "m_ts", "next"])?;
                let data = text(window, first, bytes, more)?;
                out.push(PosixMessage { priority, data });
                todo.push(Visit::Messages {
                    first: next,
                    end,
                    priority,
                });
            }
        }
    }
    Ok(())
}

/// A message's bytes: behind its head, then in further pages behind theirs.
fn text(window: &Window, at: u64, bytes: u64, mut more: u64) -> SysResult<Vec<u8>> {
    const MESSAGE_MAX: u64 = 1 << 24;
    let torn = || SysError::new("messages", "message queue", Errno::EAGAIN);
    if bytes > MESSAGE_MAX {
        return Err(torn());
    }
    let head = window.size("msg_msg")?;
    let rest_head = window.size("msg_msgseg")?;
    let first = bytes.min(PAGE - head);
    let mut parts = vec![(at + head, first as usize)];
    let mut left = bytes - first;
    while left > 0 {
        if more == 0 {
            return Err(torn());
        }
        let now = left.min(PAGE - rest_head);
        parts.push((more + rest_head, now as usize));
        left -= now;
        more = window.object("msg_msgseg", more).number("next")?;
    }
    Ok(window.copy(&parts)?.concat())
}

impl PosixQueue {
    /// Makes it where the calling thread is, under a name that is free there.
    pub fn make(&self, name: &CString) -> SysResult<OwnedFd> {
        let room = Attributes {
            messages_max: self.messages_max,
            bytes_max: self.bytes_max,
            messages: 0,
        };
        let queue = mqueue::create(name, 0o600, &room)?;
        let made = (|| {
            for m in &self.messages {
                mqueue::send(queue.as_fd(), &m.data, m.priority)?;
            }
            let failed = |call, e| SysError::new(call, name.to_string_lossy(), e);
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            fchown(&queue, Some(uid), Some(gid)).map_err(|e| failed("fchown", e))?;
            let mode = Mode::from_bits_truncate(self.mode);
            fchmod(&queue, mode).map_err(|e| failed("fchmod", e))
        })();
        match made {
            Ok(()) => Ok(queue),
            Err(e) => {
                mqueue::unlink(name)?;
                Err(e)
            }
        }
    }
}

/// Makes them, where the calling thread is.
pub(super) fn make(all: &[PosixQueue]) -> Result<(), NamespaceError> {
    for queue in all {
        let torn = |_| failed(SysError::new("mq_open", "a name with NUL", Errno::EINVAL));
        let name = CString::new(queue.name.clone()).map_err(torn)?;
        queue.make(&name).map_err(failed)?;
    }
    Ok(())
}

/// Does something where the queues of an IPC namespace are.
pub fn there<T: Send>(
    ns: Option<BorrowedFd<'_>>,
    work: impl FnOnce() -> SysResult<T> + Send,
) -> Result<T, NamespaceError> {
    match ns {
        Some(ns) => inside(ns, || work().map_err(failed)),
        None => work().map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_in_their_order_and_stay() {
        let Ok(window) = Window::open() else { return };
        if window.files(std::process::id() as i32).is_err() {
            return; // Without CAP_BPF nothing can be seen.
        }
        let name = format!("rcr-test-{}", std::process::id());
        let name = CString::new(name).unwrap();
        let message = |priority: u32, len: usize| PosixMessage {
            priority,
            data: (0..len)
                .map(|n| (n * 7 + priority as usize) as u8)
                .collect(),
        };
        let queue = PosixQueue {
            name: name.as_bytes().to_vec(),
            mode: 0o640,
            messages_max: 8,
            bytes_max: 8192,
            messages: vec![
                message(9, 8192),
                message(9, 1),
                message(4, 4048),
                message(4, 4049),
                message(0, 0),
            ],
            ..PosixQueue::default()
        };
        let mut wild = queue.clone();
        // Any order in which equal ones follow each other.
        wild.messages.swap(0, 4);
        wild.messages.rotate_left(1);
        let fd = wild.make(&name);
        mqueue::unlink(&name).unwrap();
        let fd = fd.unwrap();
        let found = look(&window, fd.as_fd(), queue.name.clone(), true).unwrap();
        let mut sorted = wild.messages.clone();
        sorted.sort_by_key(|m| std::cmp::Reverse(m.priority));
        assert_eq!(found.messages, sorted);
        assert_eq!((found.mode, found.bytes_max), (0o640, 8192));
        assert_eq!(mqueue::attributes(fd.as_fd()).unwrap().messages, 5);
    }
}
