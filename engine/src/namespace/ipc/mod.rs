//! IPC namespaces: System V shared memory, message queues and semaphores with
//! their ids and keys, POSIX message queues, and the limits of all of them.
//!
//! Everything is looked at and made by a thread inside of the namespace.

pub mod posix;
mod queues;
mod segments;
mod semaphores;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::Pid;
use rustix::thread::LinkNameSpaceType;

use super::ids::{NsIds, NsKind, open_ns};
use super::make::make;
use super::view::within;
use super::{NamespaceError, UserNamespace};
use crate::image::schema::IpcDescEntry;
use crate::image::{ImageError, ImageSink, ImageSource, Kind, get_record, put_records};
use crate::sys::SysError;

/// An IPC namespace that no task needs to be in.
#[derive(Debug)]
pub struct IpcNamespace {
    ns: OwnedFd,
}

impl IpcNamespace {
    /// For setns(2) with `CLONE_NEWIPC`.
    pub fn ns(&self) -> BorrowedFd<'_> {
        self.ns.as_fd()
    }

    /// Removes what is to go with its last user; to be called when all users are there.
    pub fn settle(&self, source: &dyn ImageSource, ns_id: u32) -> Result<(), NamespaceError> {
        let ids = segments::doomed(source, ns_id)?;
        inside(self.ns(), || segments::remove(&ids))
    }
}

/// What an IPC namespace has beyond the common images.
#[derive(Clone, PartialEq, prost::Message)]
struct IpcEntry {
    /// Number of the user namespace that owns it; 0 is the host's.
    #[prost(uint32, tag = "1")]
    owner: u32,
    /// Its limits: paths below `/proc/sys` and what reading them gave.
    #[prost(message, repeated, tag = "2")]
    limits: Vec<LimitEntry>,
    /// POSIX message queues.
    #[prost(message, repeated, tag = "3")]
    queues: Vec<posix::PosixQueue>,
}

/// A limit.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct LimitEntry {
    /// Path below `/proc/sys`.
    #[prost(string, tag = "1")]
    path: String,
    /// Its value.
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

const LIMITS: [&str; 13] = [
    "kernel/sem",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

fn image_name(ns_id: u32) -> String {
    format!("rcr-ipcns-{ns_id}.img")
}

fn inside<T: Send>(
    ns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    within(Some(ns), LinkNameSpaceType::InterProcessCommunication, work)
}

/// Saves the IPC namespace a task is in. `owner` is the number of the user
/// namespace that owns it, 0 for the host's.
pub fn save_ipc(
    pid: Pid,
    ns_id: u32,
    owner: u32,
    sink: &mut dyn ImageSink,
) -> Result<(), NamespaceError> {
    let ns = open_ns(&format!("/proc/{pid}/ns/ipc"))?;
    let (limits, segments, queues, semaphores, posix) = inside(ns.as_fd(), || {
        Ok((
            limits(),
            segments::list()?,
            queues::list()?,
            semaphores::list()?,
            posix::list()?,
        ))
    })?;
    let entry = IpcEntry {
        owner,
        limits,
        queues: posix,
    };
    put_records(sink, Kind::RcrNamespaces, &image_name(ns_id), &[entry])?;
    segments::put(sink, ns_id, &segments)?;
    queues::put(sink, ns_id, &queues)?;
    Ok(semaphores::put(sink, ns_id, &semaphores)?)
}

/// The bytes of all shared memory segments of a task's IPC namespace, by id;
/// none if it is our own.
pub fn foreign_segments(pid: i32) -> Result<Option<BTreeMap<i32, u64>>, NamespaceError> {
    let task = NsIds::of(Pid::from_raw(pid))?;
    if task.same(&NsIds::own()?, NsKind::Ipc) {
        return Ok(None);
    }
    let ns = open_ns(&format!("/proc/{pid}/ns/ipc"))?;
    inside(ns.as_fd(), || segments::sizes().map(Some))
}

/// How many semaphores each set has in the IPC namespace of a task, and whether
/// that is another one than ours.
pub fn semaphore_sets(pid: i32) -> Result<(BTreeMap<i32, usize>, bool), NamespaceError> {
    let task = NsIds::of(Pid::from_raw(pid))?;
    if task.same(&NsIds::own()?, NsKind::Ipc) {
        return Ok((semaphores::sizes()?, false));
    }
    let ns = open_ns(&format!("/proc/{pid}/ns/ipc"))?;
    inside(ns.as_fd(), || Ok((semaphores::sizes()?, true)))
}

/// Runs what makes an object as its creator, who is told from its owner.
pub(crate) fn as_creator<T: Send>(
    desc: &IpcDescEntry,
    make: impl FnOnce() -> Result<T, SysError> + Send,
) -> Result<T, SysError> {
    match (desc.cuid, desc.cgid) {
        (0, 0) => make(),
        (uid, gid) => crate::socket::sys::as_ids(uid, gid, &[], make),
    }
}

fn limits() -> Vec<LimitEntry> {
    let read = |path: &&str| {
        let value = std::fs::read(format!("/proc/sys/{path}")).ok()?;
        Some(LimitEntry {
            path: (*path).to_owned(),
            value,
        })
    };
    // A kernel without POSIX queues has no limits for them.
    LIMITS.iter().filter_map(read).collect()
}

/// Builds a saved IPC namespace.
pub fn build_ipc(
    source: &dyn ImageSource,
    ns_id: u32,
    users: &BTreeMap<u32, UserNamespace>,
) -> Result<IpcNamespace, NamespaceError> {
    let name = image_name(ns_id);
    let entry: IpcEntry = get_record(source, Kind::RcrNamespaces, &name)?;
    let content = |what: String| ImageError::Content {
        name: name.clone(),
        what,
    };
    let owner = match entry.owner {
        0 => None,
        n => Some(users.get(&n).ok_or_else(|| {
            content(format!(
                "it belongs to user namespace {n}, which is not there"
            ))
        })?),
    };
    if let Some(l) = entry
        .limits
        .iter()
        .find(|l| !LIMITS.contains(&l.path.as_str()))
    {
        return Err(content(format!("{:?} is no limit of its", l.path)).into());
    }
    let ns = make(NsKind::Ipc, owner)?;
    let segments = segments::get(source, ns_id)?;
    let queues = queues::get(source, ns_id)?;
    let semaphores = semaphores::get(source, ns_id)?;
    inside(ns.as_fd(), || {
        for l in &entry.limits {
            let path = format!("/proc/sys/{}", l.path);
            match std::fs::read(&path) {
                Ok(now) if now == l.value => {}
                _ => {
                    std::fs::write(&path, &l.value).map_err(NamespaceError::call("write", path))?
                }
            }
        }
        segments::make(&segments)?;
        queues::make(&queues)?;
        semaphores::make(&semaphores)?;
        posix::make(&entry.queues)
    })?;
    Ok(IpcNamespace { ns })
}

/// Reads what is to be made, and makes nothing.
pub(crate) fn read(source: &dyn ImageSource, ns_id: u32) -> Result<(), ImageError> {
    segments::get(source, ns_id)?;
    queues::get(source, ns_id)?;
    semaphores::get(source, ns_id)?;
    Ok(())
}

/// Ids of the objects of a kind (`shm`, `msg`, `sem`) where the calling thread is.
fn ids(kind: &str) -> Result<Vec<i32>, NamespaceError> {
    let path = format!("/proc/sysvipc/{kind}");
    let text = std::fs::read_to_string(&path).map_err(NamespaceError::call("read", &path))?;
    let mut ids = Vec::new();
    for (at, line) in text.lines().enumerate().skip(1) {
        let id = line
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|w| w.parse().ok());
        ids.push(id.ok_or_else(|| NamespaceError::Format {
            path: path.clone().into(),
            line: at + 1,
        })?);
    }
    Ok(ids)
}

/// Lets the next object of a kind have an id, makes it, and checks.
fn with_id(
    kind: &str,
    id: i32,
    make: impl FnOnce() -> Result<i32, SysError>,
) -> Result<(), NamespaceError> {
    let path = format!("/proc/sys/kernel/{kind}_next_id");
    std::fs::write(&path, id.to_string()).map_err(NamespaceError::call("write", &path))?;
    let got = make().map_err(failed)?;
    match got == id {
        true => Ok(()),
        false => Err(NamespaceError::call("have the id", path)(
            rustix::io::Errno::EXIST,
        )),
    }
}

fn failed(e: SysError) -> NamespaceError {
    let errno = rustix::io::Errno::from_raw_os_error(e.errno as i32);
    NamespaceError::call(e.call, "System V object")(errno)
}

/// `struct ipc_perm` as the images have it.
fn description(p: &libc::ipc_perm, id: i32) -> IpcDescEntry {
    IpcDescEntry {
        key: p.__key as u32,
        uid: p.uid,
        gid: p.gid,
        cuid: p.cuid,
        cgid: p.cgid,
        mode: p.mode.into(),
        id: id as u32,
    }
}
