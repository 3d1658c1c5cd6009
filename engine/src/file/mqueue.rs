//! Descriptors of POSIX message queues.
//!
//! A queue of an IPC namespace of the tree comes back with the namespace. One
//! of the host's is its system's as a file is: it is opened where it still is,
//! and made with what was in it where not. One whose name is gone lives by its
//! descriptors alone.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::identity::Descriptions;
use super::reg::DELETED;
use super::{RestoreEnv, sys};
use crate::image::schema::{ExtFileEntry, FdTypes};
use crate::namespace::ipc::posix::{self, PosixQueue};
use crate::remote::{Arg, Program};
use crate::sys::kernel::Window;
use crate::sys::{SysError, SysResult, mqueue};

const KIND: &str = "message queue";
/// glibc starts a thread: a socket of its own is told.
const SIGEV_THREAD: i32 = 2;

/// A descriptor of a queue.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrQueue {
    /// Number of the queue: descriptors with equal ones are of the same.
    #[prost(uint64, required, tag = "1")]
    pub inode: u64,
    /// Status flags.
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    /// Its name is gone.
    #[prost(bool, required, tag = "3")]
    pub removed: bool,
    /// A process that lives in its IPC namespace, where that is not the host's.
    #[prost(int32, optional, tag = "4")]
    pub pid: Option<i32>,
    /// The queue; what is in it stands with its first descriptor.
    #[prost(message, required, tag = "5")]
    pub queue: PosixQueue,
    /// Who is told of the next message.
    #[prost(message, optional, tag = "6")]
    pub notify: Option<RcrQueueNotify>,
}

/// Who is told of the next message (mq_notify(3)).
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrQueueNotify {
    /// The process.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// `SIGEV_SIGNAL` or `SIGEV_NONE`.
    #[prost(int32, required, tag = "2")]
    pub how: i32,
    /// The signal.
    #[prost(int32, required, tag = "3")]
    pub signal: i32,
    /// What comes with it.
    #[prost(uint64, required, tag = "4")]
    pub value: u64,
}

/// Saves a descriptor, and the queue at its first.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    window: &mut Option<Window>,
    seen: &mut BTreeMap<(u64, u64), u32>,
) -> Result<(), Stop> {
    let id = saved.entry.id;
    let first = *seen.entry(file.inode()).or_insert(id) == id;
    let looked = look(file, window, first && file.policy.payload);
    let mut queue = match looked {
        Err(Stop::Sys(e)) if e.errno == Errno::EAGAIN => {
            return refuse(KIND, "others change it meanwhile", "try again");
        }
        Err(Stop::Sys(e)) => {
            let reason = format!("the kernel does not tell what is in it ({e})");
            return refuse(KIND, reason, "untag the unit");
        }
        looked => looked?,
    };
    let path = file.link.strip_suffix(DELETED);
    let removed = path.is_some();
    let name = path.unwrap_or(file.link).rsplit('/').next();
    queue.name = name.unwrap_or_default().as_bytes().to_vec();
    saved.entry.r#type = FdTypes::Ext.into();
    saved.entry.ext = Some(ExtFileEntry {
        id,
        fown: file.fown()?,
    });
    saved.extra.queue = Some(Box::new(RcrQueue {
        inode: file.stat.st_ino,
        flags: file.flags(),
        removed,
        pid: home(file)?,
        queue,
        notify: None,
    }));
    Ok(())
}

/// A process that lives in the queue's namespace; none for the host's.
fn home(file: &Examined<'_>) -> Result<Option<i32>, Stop> {
    let failed = |_| SysError::new("mount", KIND, Errno::ENODEV);
    let device = file.stat.st_dev;
    if posix::device(None).map_err(failed)? == Some(device) {
        return Ok(None);
    }
    let path = format!("/proc/{}/ns/ipc", file.task.voice);
    let ns = std::fs::File::open(&path).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        SysError::new("open", path, Errno::from_raw(errno))
    })?;
    match posix::device(Some(ns.as_fd())).map_err(failed)? == Some(device) {
        true => Ok(Some(file.task.pid)),
        false => {
            let reason = "it is of an IPC namespace that its process does not live in";
            refuse(KIND, reason, "untag the unit")
        }
    }
}

/// The queue; whoever is told of messages is found when all are known.
fn look(
    file: &Examined<'_>,
    window: &mut Option<Window>,
    content: bool,
) -> Result<PosixQueue, Stop> {
    let window = match window {
        Some(w) => w,
        None => window.insert(Window::open()?),
    };
    Ok(posix::look(window, file.fd, Vec::new(), content)?)
}

/// The process behind a `struct pid`, if it is that one.
fn told(window: &Window, owner: u64, pid: i32) -> SysResult<Option<i32>> {
    let task = window.task(pid)?;
    let own = window.object("task_struct", task).number("thread_pid")?;
    Ok((own == owner).then_some(pid))
}

/// Finds out who of the tree is told of messages.
pub(crate) fn settle(
    files: &mut BTreeMap<u32, Saved>,
    descriptions: &Descriptions,
    window: Option<&Window>,
    pids: &[i32],
) -> SysResult<Vec<(u32, Stop)>> {
    let mut refusals = Vec::new();
    let Some(window) = window else {
        return Ok(refusals);
    };
    let mut known = BTreeSet::new();
    let files = files.iter_mut();
    let queues = files.filter_map(|(id, s)| Some((*id, s.extra.queue.as_mut()?)));
    for (id, queue) in queues {
        let Some(held) = descriptions.get(id) else {
            continue;
        };
        let info = posix::info(window, held.fd.as_fd())?;
        let owner = info.number("notify_owner")?;
        let mut who = None;
        for &pid in pids.iter().filter(|_| owner != 0) {
            // One that ends meanwhile is told nothing.
            who = who.or(told(window, owner, pid).unwrap_or_default());
        }
        // Somebody outside goes on waiting.
        let Some(who) = who else { continue };
        if known.contains(&queue.inode) {
            continue;
        }
        let event = Event(info.bytes("notify")?);
        let reason = match event.word(12) {
            SIGEV_THREAD => "a thread is to be started at the next message".into(),
            _ if !held.slots.iter().any(|s| s.pid == who) => {
                format!("process {who} is told of messages by another descriptor")
            }
            how => {
                known.insert(queue.inode);
                queue.notify = Some(RcrQueueNotify {
                    pid: who,
                    how,
                    signal: event.word(8),
                    value: event.value(),
                });
                continue;
            }
        };
        let stop = refuse::<()>(KIND, reason, "untag the unit");
        refusals.extend(stop.err().map(|s| (id, s)));
    }
    Ok(refusals)
}

/// `struct sigevent`.
struct Event(Vec<u8>);

impl Event {
    fn word(&self, at: usize) -> i32 {
        let word = self.0.get(at..at + 4).and_then(|w| w.try_into().ok());
        word.map_or(0, i32::from_le_bytes)
    }

    fn value(&self) -> u64 {
        let word = self.0.get(..8).and_then(|w| w.try_into().ok());
        word.map_or(0, u64::from_le_bytes)
    }
}

/// Queues without a name as they come back.
#[derive(Debug, Default)]
pub(crate) struct QueuesBack {
    nameless: BTreeMap<u64, OwnedFd>,
}

impl QueuesBack {
    /// Opens a descriptor. `first` has what was in the queue.
    pub(crate) fn open(
        &mut self,
        queue: &RcrQueue,
        first: &PosixQueue,
        env: &dyn RestoreEnv,
    ) -> Result<OwnedFd, BuildError> {
        let ns = match queue.pid {
            None => None,
            pid => Some(
                env.namespace("ipc", pid)
                    .map_err(|source| BuildError::Env {
                        what: "IPC namespace".into(),
                        source,
                    })?,
            ),
        };
        let flags = queue.flags as i32 & (libc::O_ACCMODE | libc::O_NONBLOCK);
        let torn = |_| BuildError::Images("NUL in a queue's name".into());
        let name = CString::new(first.name.clone()).map_err(torn)?;
        let work = |e: crate::namespace::NamespaceError| BuildError::Env {
            what: format!("message queue {}", name.to_string_lossy()),
            source: std::io::Error::other(e),
        };
        let ns: Option<BorrowedFd<'_>> = ns.as_ref().map(|n| n.as_fd());
        if queue.removed {
            let known = match self.nameless.entry(queue.inode) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    let made = posix::there(ns, || nameless(first, &name)).map_err(work)?;
                    place.insert(made)
                }
            };
            return Ok(sys::reopen(known.as_fd(), flags)?);
        }
        posix::there(ns, || match mqueue::open(&name, flags) {
            Err(e) if e.errno == Errno::ENOENT => {
                first.make(&name)?;
                mqueue::open(&name, flags)
            }
            opened => opened,
        })
        .map_err(work)
    }
}

/// Makes a queue and takes its name away, which others may have by now.
fn nameless(queue: &PosixQueue, name: &CString) -> SysResult<OwnedFd> {
    let other = format!("rcr-{}", std::process::id());
    let other = CString::new(other).unwrap_or_default();
    let (made, name) = match queue.make(name) {
        Err(e) if e.errno == Errno::EEXIST => (queue.make(&other)?, &other),
        made => (made?, name),
    };
    mqueue::unlink(name)?;
    Ok(made)
}

/// Adds the call by which a process asks to be told.
pub(crate) fn ask(notify: &RcrQueueNotify, fd: u32, program: &mut Program) {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&notify.value.to_le_bytes());
    event[8..12].copy_from_slice(&notify.signal.to_le_bytes());
    event[12..16].copy_from_slice(&notify.how.to_le_bytes());
    let event = program.bytes(&event);
    let args = [Arg::Imm(fd.into()), event.into()];
    let what = format!("ask to be told of messages of fd {fd}");
    program.call(libc::SYS_mq_notify, what, &args);
}
