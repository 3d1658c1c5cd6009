//! Saving: descriptor tables become records.

mod kinds;
mod look;
mod settle;
mod under_way;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::stat::fstat;

use super::error::FileError;
use super::examined::{Examined, Found, Saved};
use super::fdinfo::FdInfo;
use super::ghost::Ghosts;
use super::identity::{Descriptions, Key, Slot};
use super::inotify::Nameless;
use super::memfd::Memfds;
use super::pipe::Pipes;
use super::record::{RcrFile, RcrFilesHead};
use super::{Connections, FilePolicy, TaskFiles, UnixPolicy, bpf, late, sys, tty, uring};
use crate::ext::{self, RcrNetwork};
use crate::image::schema::{FdinfoEntry, FileEntry};
use crate::image::{ImageSink, ImageWriter, Kind, names, put_image, put_records};
use crate::socket::home::Homes;
use crate::socket::{tcp, unix};
use crate::sys::SysError;
use crate::sys::kernel::Window;
use crate::{OutsidePeer, Refusal};
use look::Look;
use under_way::Holder;

/// Collects the open files of a tree.
///
/// Feed it every task's table and every file that is used without a
/// descriptor, then [`settle`](Self::settle), look at the
/// [`refusals`](Self::refusals), and [`finish`](Self::finish). It holds
/// duplicates of all descriptors until it is dropped.
#[derive(Debug)]
pub struct FileSaver {
    policy: FilePolicy,
    descriptions: Descriptions,
    files: BTreeMap<u32, Saved>,
    by_path: HashMap<PathKey, u32>,
    refusals: Vec<Refusal>,
    saved_realtime_ns: u64,
    next_id: u32,
    pids: BTreeSet<i32>,
    /// The tasks whose tables were saved.
    holders: BTreeMap<i32, Holder>,
    pipes: Pipes,
    ghosts: Ghosts,
    memfds: Memfds,
    terminals: tty::Terminals,
    bpf_maps: bpf::Maps,
    /// Into the kernel, once something needs it.
    window: Option<Window>,
    rings: uring::Rings,
    /// POSIX message queues, by the first file of each.
    queues: BTreeMap<(u64, u64), u32>,
    unix: unix::Table,
    streams: Vec<tcp::Stream>,
    connections: tcp::Held,
    homes: Homes,
    /// `FLOCK` and similar lines by the file they were seen on.
    locks: late::LocksSeen,
    /// Watched inodes without a name, by the file that watches.
    nameless: Vec<(u32, Nameless)>,
    /// The tree's first process.
    first: Option<i32>,
}

/// Files without a descriptor are the same if opening them gives the same.
#[derive(Debug, PartialEq, Eq, Hash)]
struct PathKey {
    inode: (u64, u64),
    link: String,
    flags: u32,
    mnt_ns: u32,
}

impl FileSaver {
    /// Starts with nothing. Lifts our own limit of open files.
    pub fn new(policy: FilePolicy) -> Result<Self, FileError> {
        sys::raise_open_file_limit()?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(Self {
            policy,
            descriptions: Descriptions::default(),
            files: BTreeMap::new(),
            by_path: HashMap::new(),
            refusals: Vec::new(),
            saved_realtime_ns: now.as_nanos() as u64,
            next_id: 1,
            pids: BTreeSet::new(),
            holders: BTreeMap::new(),
            pipes: Pipes::default(),
            ghosts: Ghosts::default(),
            memfds: Memfds::default(),
            terminals: tty::Terminals::default(),
            bpf_maps: bpf::Maps::default(),
            window: None,
            rings: uring::Rings::default(),
            queues: BTreeMap::new(),
            unix: unix::Table::default(),
            streams: Vec::new(),
            connections: tcp::Held::default(),
            homes: Homes::default(),
            locks: late::LocksSeen::default(),
            nameless: Vec::new(),
            first: None,
        })
    }

    /// Notes a process of the tree, zombies included: files may refer to any.
    pub fn note_process(&mut self, pid: i32) {
        self.first.get_or_insert(pid);
        self.pids.insert(pid);
    }

    /// Saves one descriptor table; call it once for tasks that share theirs.
    ///
    /// Gives the records of `fdinfo-FILES_ID.img`. What cannot be carried is
    /// missing there and listed in [`refusals`](Self::refusals).
    pub fn save_fds(&mut self, task: &TaskFiles<'_>) -> Result<Vec<FdinfoEntry>, FileError> {
        self.pids.insert(task.pid);
        let holder = Holder {
            pid: task.pid,
            voice: task.voice,
            comm: task.comm.to_owned(),
            mnt_ns: task.mnt_ns,
        };
        self.holders.insert(task.pid, holder);
        let mut table = Vec::new();
        let numbers = self.descriptor_numbers(task)?;
        for (&fd, look) in numbers.iter().zip(look::all(task, &numbers)?) {
            match look.and_then(|look| self.save_fd(task, fd, look)) {
                Ok(entry) => table.extend(entry),
                // A running task may close it meanwhile.
                Err(e) if !self.policy.payload && is_gone(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(table)
    }

    fn descriptor_numbers(&self, task: &TaskFiles<'_>) -> Result<Vec<u32>, FileError> {
        let path = format!("/proc/{}/fd", task.voice);
        let dir = std::fs::read_dir(&path).map_err(|e| proc(task, &path, e))?;
        let mut numbers = Vec::new();
        for entry in dir {
            let name = entry.map_err(|e| proc(task, &path, e))?.file_name();
            numbers.extend(name.to_str().and_then(|n| n.parse::<u32>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn save_fd(
        &mut self,
        task: &TaskFiles<'_>,
        fd: u32,
        look: Look,
    ) -> Result<Option<FdinfoEntry>, FileError> {
        let failed = |source| FileError::Task {
            pid: task.pid,
            object: format!("fd {fd}"),
            source,
        };
        let Look {
            dup,
            stat,
            info,
            link,
            early,
        } = look;
        let cloexec = info.flags & libc::O_CLOEXEC as u32 != 0;
        let slot = Slot { pid: task.pid, fd };
        let inode = (stat.st_dev, stat.st_ino);
        let key = Key {
            inode,
            eventfd: info.eventfd_id,
        };
        let id = match self.descriptions.find(key, dup.as_fd()).map_err(failed)? {
            Some(id) => {
                self.descriptions.add_slot(id, slot);
                id
            }
            None => {
                let policy = self.policy;
                let file = Examined {
                    fd: dup.as_fd(),
                    info: &info,
                    stat: &stat,
                    link: &link,
                    task,
                    policy: &policy,
                    early: Some(early),
                };
                let found = found(task, format!("fd {fd} ({link})"), inode);
                let Some(id) = self.examine(&file, found)? else {
                    return Ok(None);
                };
                self.descriptions
                    .insert(key, dup, id, slot)
                    .map_err(failed)?;
                id
            }
        };
        if !info.locks.is_empty() {
            self.locks.note(id, slot, info.locks);
        }
        Ok(self.files.get(&id).map(|saved| FdinfoEntry {
            id,
            // The only flag a descriptor has of its own.
            flags: u32::from(cloexec),
            r#type: saved.entry.r#type,
            fd,
            xattr_security_selinux: None,
        }))
    }

    /// Saves a file that is used without a descriptor: executable, working
    /// directory, root, a mapped file.
    ///
    /// `fd` is ours and refers to it (`O_PATH` will do), `flags` are those to
    /// open it with, `what` names the use in messages. Equal files share an
    /// id. `None`: it was refused.
    pub fn save_path_fd(
        &mut self,
        task: &TaskFiles<'_>,
        fd: BorrowedFd<'_>,
        flags: u32,
        what: &str,
    ) -> Result<Option<u32>, FileError> {
        let failed = |source| FileError::Task {
            pid: task.pid,
            object: what.to_owned(),
            source,
        };
        let stat = fstat(fd).map_err(|e| failed(SysError::new("fstat", what, e)))?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let link = std::fs::read_link(&path).map_err(|e| proc(task, &path, e))?;
        let link = link.to_string_lossy().into_owned();
        let inode = (stat.st_dev, stat.st_ino);
        let key = PathKey {
            inode,
            link: link.clone(),
            flags,
            mnt_ns: task.mnt_ns,
        };
        if let Some(&id) = self.by_path.get(&key) {
            return Ok(Some(id));
        }
        let info = FdInfo {
            flags,
            ..FdInfo::default()
        };
        let policy = self.policy;
        let opened: OwnedFd;
        // Owner and status are asked of a description of our own.
        let usable = if flags & libc::O_PATH as u32 != 0 {
            fd
        } else {
            opened = sys::reopen(fd, libc::O_RDONLY | libc::O_NONBLOCK).map_err(failed)?;
            opened.as_fd()
        };
        let file = Examined {
            fd: usable,
            info: &info,
            stat: &stat,
            link: &link,
            task,
            policy: &policy,
            early: None,
        };
        let found = found(task, format!("{what} ({link})"), inode);
        let Some(id) = self.examine(&file, found)? else {
            return Ok(None);
        };
        if let Some(saved) = self.files.get_mut(&id) {
            saved.extra.exact_size = Some(true);
        }
        self.by_path.insert(key, id);
        Ok(Some(id))
    }

    /// The file that a mapping is of which no path leads to. Of one whose
    /// descriptor no process seen so far has, nothing is known: it is refused.
    pub fn mapped(&mut self, task: &TaskFiles<'_>, inode: (u64, u64), what: &str) -> Option<u32> {
        let known = self.descriptions.of_inode(inode);
        let id = known.map(|h| h.id).find(|id| self.files.contains_key(id));
        let refused = |r: &Refusal| r.pid == task.pid;
        if id.is_none() && !self.refusals.iter().any(refused) {
            let reason = "its descriptor is closed".into();
            self.refuse(
                &found(task, what.to_owned(), inode),
                "mapping",
                reason,
                "untag the unit".into(),
            );
        }
        id
    }

    fn refuse(&mut self, found: &Found, kind: &str, reason: String, advice: String) {
        let object = if found.object.contains(kind) {
            found.object.clone()
        } else {
            format!("{}: {kind}", found.object)
        };
        self.refusals.push(Refusal {
            pid: found.pid,
            comm: found.comm.clone(),
            object,
            reason,
            advice,
        });
    }

    /// What cannot be carried; complete after [`settle`](Self::settle).
    pub fn refusals(&self) -> &[Refusal] {
        &self.refusals
    }

    /// The records so far, by id.
    pub fn entry(&self, id: u32) -> Option<&FileEntry> {
        self.files.get(&id).map(|s| s.entry.as_ref())
    }

    /// Names tasks as the images do, once everything else is settled.
    pub fn renumber(&mut self, id: impl Fn(i32) -> i32) {
        self.terminals.renumber(&id);
        for saved in self.files.values_mut() {
            let extra = &mut saved.extra;
            extra.late_pid = extra.late_pid.map(&id);
            let peer = extra.socket.as_mut().and_then(|s| s.peer_cred.as_mut());
            if let Some(peer) = peer {
                peer.pid = match self.pids.contains(&peer.pid) {
                    true => id(peer.pid),
                    false => 0,
                };
            }
            // -1 stands for no task.
            for lock in extra.locks.iter_mut().filter(|l| l.pid > 0) {
                lock.pid = id(lock.pid);
            }
            if let Some(queue) = &mut extra.queue {
                queue.pid = queue.pid.map(&id);
                if let Some(notify) = &mut queue.notify {
                    notify.pid = id(notify.pid);
                }
            }
            if let Some(ring) = &mut extra.uring {
                let registered = ring.registered.iter_mut();
                for thread in registered.chain(&mut ring.submitter) {
                    (thread.pid, thread.tid) = (id(thread.pid), id(thread.tid));
                }
            }
            if let Some(target) = &mut extra.pidfd {
                target.pid = target.pid.map(&id);
            }
            // -1 stands for one that is gone.
            if let Some(e) = saved.entry.pidfd.as_mut().filter(|e| e.nspid > 0) {
                e.nspid = id(e.nspid);
            }
            if let Some(owner) = late::owner_mut(&mut saved.entry, extra) {
                owner.pid = id(owner.pid as i32) as u32;
            }
        }
    }

    /// Writes all images of files except the tables. Fails if anything was refused.
    ///
    /// What it gives keeps the packets of connections away: hold on to it until
    /// the tree runs on or is gone.
    pub fn finish(self, sink: &mut dyn ImageSink) -> Result<Connections, FileError> {
        if let Some(first) = self.refusals.first() {
            let count = self.refusals.len();
            return Err(FileError::Refused {
                count,
                first: first.to_string(),
            });
        }
        let mut files = ImageWriter::new(Kind::Files);
        let mut more = ImageWriter::new(Kind::RcrFiles);
        more.record(&RcrFilesHead {
            saved_realtime_ns: self.saved_realtime_ns,
        });
        for saved in self.files.values() {
            files.record(saved.entry.as_ref());
            if *saved.extra
                != (RcrFile {
                    id: saved.entry.id,
                    ..RcrFile::default()
                })
            {
                more.record(saved.extra.as_ref());
            }
        }
        put_image(sink, names::FILES, &files.finish())?;
        put_image(sink, names::RCR_FILES, &more.finish())?;
        self.pipes.finish(sink)?;
        self.ghosts.finish(sink)?;
        self.memfds.finish(sink)?;
        self.terminals.finish(sink)?;
        self.bpf_maps.finish(sink)?;
        self.unix.finish(sink)?;
        for stream in &self.streams {
            stream.put(sink)?;
        }
        if let Some(lock) = self.connections.lock_name() {
            let network = RcrNetwork {
                lock: Some(lock.to_owned()),
            };
            put_records(sink, Kind::RcrNetwork, ext::NETWORK, &[network])?;
        }
        Ok(Connections(self.connections))
    }

    /// Writes the table of one `files_id`.
    pub fn put_table(
        sink: &mut dyn ImageSink,
        files_id: u32,
        table: &[FdinfoEntry],
    ) -> Result<(), FileError> {
        Ok(put_records(
            sink,
            Kind::Fdinfo,
            &names::fdinfo(files_id),
            table,
        )?)
    }

    /// The network namespaces of sockets that are not our own: inode number,
    /// the namespace, and where the first socket in it was found.
    pub fn net_namespaces(&self) -> Vec<(u64, BorrowedFd<'_>, i32, String)> {
        let place = |(inode, ns, id)| {
            let found = &self.files.get(&id)?.found;
            Some((inode, ns, found.pid, found.comm.clone()))
        };
        self.homes.all().filter_map(place).collect()
    }

    /// Gives sockets the numbers of their network namespaces, by inode number.
    pub fn number_nets(&mut self, number: impl Fn(u64) -> Option<u32>) {
        for (id, saved) in &mut self.files {
            let home = self.homes.of(*id).and_then(&number);
            saved.extra.net_ns = home;
            let e = &mut saved.entry;
            let fields = [
                e.isk.as_mut().map(|s| &mut s.ns_id),
                e.usk.as_mut().map(|s| &mut s.ns_id),
                e.nlsk.as_mut().map(|s| &mut s.ns_id),
                e.psk.as_mut().map(|s| &mut s.ns_id),
            ];
            for field in fields.into_iter().flatten() {
                *field = home;
            }
        }
    }

    /// Connections out of the tree that do not stand in the way; complete after
    /// [`settle`](Self::settle).
    pub fn outside_peers(&self) -> Vec<OutsidePeer> {
        crate::socket::unix::outside_peers(self.files.values()).collect()
    }

    /// Ids of journal streams, for whoever connects them again.
    pub fn journal_streams(&self) -> Vec<u32> {
        let journal = |s: &&Saved| {
            s.extra
                .socket
                .as_ref()
                .is_some_and(|k| k.fate() == super::Fate::Journal)
        };
        self.files
            .values()
            .filter(journal)
            .map(|s| s.entry.id)
            .collect()
    }
}

fn found(task: &TaskFiles<'_>, object: String, inode: (u64, u64)) -> Found {
    Found {
        pid: task.pid,
        comm: task.comm.to_owned(),
        object,
        inode,
    }
}

fn proc(task: &TaskFiles<'_>, path: &str, what: impl ToString) -> FileError {
    FileError::Proc {
        pid: task.pid,
        path: path.to_owned(),
        what: what.to_string(),
    }
}

/// Whether an error means that the descriptor or the task is no longer there.
fn is_gone(e: &FileError) -> bool {
    match e {
        FileError::Task { source, .. } => {
            matches!(source.errno, Errno::EBADF | Errno::ENOENT | Errno::ESRCH)
        }
        FileError::Proc { pid, path, .. } => {
            path != &format!("/proc/{pid}/fd") && !std::path::Path::new(path).exists()
        }
        _ => false,
    }
}
