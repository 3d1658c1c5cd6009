//! Restoring: records become open files, held by us for the tasks to take.

mod unix;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use super::error::{BuildError, FileError};
use super::ghost::Revived;
use super::memfd::MemfdsBack;
use super::pidfd::Dead;
use super::pipe::PipesBack;
use super::record::{Fate, RcrFile, RcrFilesHead};
use super::tty::TerminalsBack;
use super::{
    RestoreEnv, Target, bpf, epoll, eventfd, fanotify, inotify, late, mqueue, nsfd, pidfd, reg,
    signalfd, sys, timerfd,
};
use crate::image::schema::{FdTypes, FdinfoEntry, FileEntry, RegFileEntry, RemapFilePathEntry};
use crate::image::{ImageError, ImageSource, Kind, get_reader, get_records, names};
use crate::namespace::net::with_net;
use crate::socket::device;
use crate::socket::unix_queue::{self, Later, Queues};
use crate::socket::{inet, netlink, packet, tcp};

/// Makes open files from images, each once, when it is first asked for.
///
/// Hold it until every task has taken its files by pidfd_getfd(2); it closes
/// its own duplicates when dropped.
pub struct FileBuilder<'a> {
    source: &'a dyn ImageSource,
    pub(super) env: &'a dyn RestoreEnv,
    saved_realtime: Duration,
    pub(super) entries: BTreeMap<u32, Rc<FileEntry>>,
    pub(super) extras: BTreeMap<u32, Rc<RcrFile>>,
    opened: BTreeMap<u32, OwnedFd>,
    under_way: BTreeSet<u32>,
    pipes: PipesBack,
    memfds: MemfdsBack,
    pub(super) terminals: TerminalsBack,
    ghosts: Revived,
    queues: Queues,
    dead: Dead,
    bpf_maps: bpf::MapsBack,
    queues_back: mqueue::QueuesBack,
    later: Later,
    connections: tcp::Connections,
}

/// TCP connections that were made again and do not speak yet.
#[derive(Debug, Default)]
pub struct SilentConnections(tcp::Connections);

impl SilentConnections {
    /// Lets them speak, and their packets through; to be called when the whole
    /// tree stands.
    pub fn speak(self) -> Result<(), FileError> {
        Ok(self.0.finish()?)
    }
}

impl<'a> FileBuilder<'a> {
    /// Reads the records. Lifts our own limit of open files.
    pub fn new(source: &'a dyn ImageSource, env: &'a dyn RestoreEnv) -> Result<Self, FileError> {
        sys::raise_open_file_limit()?;
        let entries = get_records::<FileEntry>(source, Kind::Files, names::FILES)?;
        let entries = entries.into_iter().map(|e| (e.id, Rc::new(e)));
        let entries: BTreeMap<u32, Rc<FileEntry>> = entries.collect();
        let remaps: Vec<RemapFilePathEntry> =
            get_records(source, Kind::RemapFpath, names::REMAP_FPATH)?;
        let mut saved_realtime = Duration::ZERO;
        let mut extras = BTreeMap::new();
        if let Some(mut reader) = get_reader(source, Kind::RcrFiles, names::RCR_FILES)? {
            if let Some(head) = reader.record::<RcrFilesHead>()? {
                saved_realtime = Duration::from_nanos(head.saved_realtime_ns);
            }
            while let Some(extra) = reader.record::<RcrFile>()? {
                extras.insert(extra.id, Rc::new(extra));
            }
        }
        let dead = Dead::new(entries.values().filter_map(|e| e.pidfd.as_ref()));
        let mut pipes = PipesBack::load(source)?;
        for entry in entries.values() {
            if let Some(p) = &entry.pipe {
                pipes.expect(p.pipe_id);
            }
        }
        for extra in extras.values().filter(|e| !e.packets.is_empty()) {
            let of = entries.get(&extra.id);
            let pipe = of.and_then(|e| e.pipe.as_ref().map(|p| p.pipe_id));
            let fifo = of.and_then(|e| e.fifo.as_ref().map(|f| f.pipe_id));
            if let Some(pipe_id) = pipe.or(fifo) {
                pipes.divide(pipe_id, &extra.packets);
            }
        }
        let mut queues = unix_queue::load(source)?;
        for (id, extra) in &extras {
            let at = extra.socket.as_ref().and_then(|s| s.urgent_at);
            let usk = entries.get(id).and_then(|e| e.usk.as_ref());
            if let (Some(at), Some(usk)) = (at, usk) {
                unix_queue::mark_urgent(&mut queues, usk.ino, at);
            }
        }
        let ghosts = Revived::new(remaps, |id| {
            let flags = entries.get(&id)?.reg.as_ref()?.flags;
            Some((flags, extras.get(&id).map(Rc::as_ref)?))
        });
        Ok(Self {
            source,
            env,
            saved_realtime,
            entries,
            extras,
            opened: BTreeMap::new(),
            under_way: BTreeSet::new(),
            pipes,
            memfds: MemfdsBack::load(source)?,
            terminals: TerminalsBack::load(source)?,
            ghosts,
            queues,
            later: Later::default(),
            dead,
            bpf_maps: bpf::MapsBack::load(source)?,
            queues_back: mqueue::QueuesBack::default(),
            connections: tcp::Connections::load(source)?,
        })
    }

    /// Takes what is given for pipes that lead outside, by their names
    /// (`pipe:[INODE]`). Fails if something is missing.
    pub fn inherit(&mut self, given: &BTreeMap<String, OwnedFd>) -> Result<(), FileError> {
        for (name, fd) in given {
            let number = name
                .strip_prefix("pipe:[")
                .and_then(|n| n.strip_suffix(']'));
            // The kernel's numbers are as long as the images' are.
            if let Some(ino) = number.and_then(|n| n.parse::<u64>().ok()) {
                self.pipes.give(ino as u32, sys::dup(fd)?);
            }
        }
        for (id, extra) in &self.extras {
            let entry = self.entries.get(id).and_then(|e| e.pipe.as_ref());
            let pipe =
                entry.filter(|p| extra.outside == Some(true) && !self.pipes.is_given(p.pipe_id));
            if let Some(pipe) = pipe {
                let source = BuildError::NotGiven {
                    name: format!("pipe:[{}]", pipe.pipe_id),
                };
                return Err(FileError::Build {
                    id: *id,
                    what: self.describe(*id),
                    source,
                });
            }
        }
        Ok(())
    }

    /// The records of one descriptor table.
    pub fn table(&self, files_id: u32) -> Result<Vec<FdinfoEntry>, ImageError> {
        get_records(self.source, Kind::Fdinfo, &names::fdinfo(files_id))
    }

    /// A file's record.
    pub fn entry(&self, id: u32) -> Option<&FileEntry> {
        self.entries.get(&id).map(Rc::as_ref)
    }

    /// The path of a file that was opened by one.
    pub fn path(&self, id: u32) -> Option<&str> {
        self.entries.get(&id)?.reg.as_ref().map(|r| r.name.as_str())
    }

    pub(super) fn extra(&self, id: u32) -> Option<&RcrFile> {
        self.extras.get(&id).map(Rc::as_ref)
    }

    /// Ids of the streams that led to the journal.
    pub fn journal_streams(&self) -> Vec<u32> {
        let journal =
            |e: &&Rc<RcrFile>| e.socket.as_ref().is_some_and(|s| s.fate() == Fate::Journal);
        self.extras.values().filter(journal).map(|e| e.id).collect()
    }

    /// The open file of that id.
    pub fn open(&mut self, id: u32) -> Result<BorrowedFd<'_>, FileError> {
        if !self.opened.contains_key(&id) {
            if !self.under_way.insert(id) {
                let source = BuildError::Images("files need each other in a circle".into());
                return Err(FileError::Build {
                    id,
                    what: self.describe(id),
                    source,
                });
            }
            let made = self.build_at_home(id)?;
            for (id, fd) in made {
                late::lock_description(self.extras.get(&id).map(Rc::as_ref), fd.as_fd())?;
                self.opened.insert(id, fd);
            }
            self.under_way.remove(&id);
        }
        match self.opened.get(&id) {
            Some(fd) => Ok(fd.as_fd()),
            None => {
                let source = BuildError::Images("the file did not come with its pair".into());
                Err(FileError::Build {
                    id,
                    what: self.describe(id),
                    source,
                })
            }
        }
    }

    /// Prepares for sockets to be made where no network is up; to be called
    /// before the first file is.
    pub fn without_network(&mut self) -> Result<(), FileError> {
        let sockets = self.entries.values().filter_map(|e| {
            let isk = e.isk.as_deref()?;
            let extra = self.extras.get(&e.id).map(Rc::as_ref);
            let closed = extra
                .and_then(|x| x.socket.as_ref())
                .is_some_and(|s| s.fate() == Fate::Closed);
            // A namespace of the tree brings its own network.
            let ours = extra.is_none_or(|x| x.net_ns.is_none());
            (ours && !closed).then_some((isk, extra))
        });
        Ok(self.connections.without_network(sockets)?)
    }

    /// Connections that stand but do not speak yet; to be called when all files
    /// were made.
    pub fn connections(&mut self) -> Result<SilentConnections, FileError> {
        self.connections.made()?;
        Ok(SilentConnections(std::mem::take(&mut self.connections)))
    }

    /// Seals the memfds; to be called when all shared mappings of them exist.
    pub fn seal(&self) -> Result<(), FileError> {
        Ok(self.memfds.seal()?)
    }

    /// Does what has to wait until nothing of ours touches files any more: the
    /// watches of inotify and the marks of fanotify.
    pub fn finish(mut self) -> Result<(), FileError> {
        let watching = |e: &FileEntry| e.ify.is_some() || e.ffy.is_some();
        let targets: BTreeSet<u32> = self
            .extras
            .values()
            .flat_map(|e| e.watched.iter().filter_map(|w| w.file))
            .collect();
        let keep =
            |id: &u32| targets.contains(id) || self.entries.get(id).is_some_and(|e| watching(e));
        self.opened.retain(|id, _| keep(id));
        self.pipes = PipesBack::default();
        self.memfds = MemfdsBack::default();
        self.ghosts = Revived::default();
        for (id, fd) in &self.opened {
            let entry = &self.entries[id];
            self.watch_again(entry, fd.as_fd())
                .map_err(|source| FileError::Build {
                    id: *id,
                    what: self.describe(*id),
                    source,
                })?;
        }
        Ok(())
    }

    fn watch_again(&self, entry: &FileEntry, fd: BorrowedFd<'_>) -> Result<(), BuildError> {
        let Some(extra) = self.extras.get(&entry.id).map(Rc::as_ref) else {
            return Ok(());
        };
        let target = |i: usize| self.watched(extra, i);
        if let Some(e) = &entry.ify {
            inotify::rewatch(fd, e, extra.events_lost == Some(true), target)?;
        }
        if let Some(e) = &entry.ffy {
            fanotify::remark(fd, e, &extra.filesystem_marks, target)?;
        }
        Ok(())
    }

    /// What the `i`th watch of a file is on.
    fn watched(&self, extra: &RcrFile, i: usize) -> Result<Target<'_>, BuildError> {
        let missing = || BuildError::Images(format!("watch {i} is on nothing"));
        let watched = extra.watched.get(i).ok_or_else(missing)?;
        if let Some(id) = watched.file {
            let fd = self.opened.get(&id).ok_or_else(missing)?;
            return Ok(Target::Carried(fd.as_fd()));
        }
        let path = watched.path.as_deref().ok_or_else(missing)?;
        let path = CString::new(path).map_err(|_| BuildError::Images("NUL in a path".into()))?;
        let ns = watched.mnt_ns.unwrap_or(0);
        let root = self.env.root_dir(ns).map_err(|source| BuildError::Env {
            what: format!("root directory of mount namespace {ns}"),
            source,
        })?;
        let fd = sys::open_in_root(root, &path, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
        Ok(Target::Opened(fd))
    }

    fn describe(&self, id: u32) -> String {
        let Some(e) = self.entries.get(&id) else {
            return "not in the images".into();
        };
        match (&e.reg, &e.isk, &e.usk) {
            (Some(r), ..) => r.name.clone(),
            (_, Some(s), _) => format!("IP socket, port {}", s.src_port),
            (_, _, Some(s)) => format!("unix socket {:?}", String::from_utf8_lossy(&s.name)),
            _ => format!("{:?}", e.r#type()).to_lowercase(),
        }
    }

    /// Makes the file while we are in the network namespace it belongs to.
    fn build_at_home(&mut self, id: u32) -> Result<Vec<(u32, OwnedFd)>, FileError> {
        let Some(net) = self.extras.get(&id).map(Rc::as_ref).and_then(|e| e.net_ns) else {
            return self.build(id);
        };
        let failed = |what: String, source: std::io::Error| FileError::Build {
            id,
            what,
            source: BuildError::Env {
                what: format!("network namespace {net}"),
                source,
            },
        };
        let env = self.env;
        let ns = env.net_ns(net).map_err(|e| failed(self.describe(id), e))?;
        let what = self.describe(id);
        with_net(Some(ns), || self.build(id)).map_err(|e| failed(what, std::io::Error::other(e)))?
    }

    /// Makes the file, and whatever only comes into being together with it.
    fn build(&mut self, id: u32) -> Result<Vec<(u32, OwnedFd)>, FileError> {
        let what = self.describe(id);
        let missing = || FileError::Build {
            id,
            what: what.clone(),
            source: BuildError::Images("no such file".into()),
        };
        let entry = self.entries.get(&id).cloned().ok_or_else(missing)?;
        if let Some(usk) = &entry.usk {
            return self.build_unix(usk);
        }
        if entry.tty.is_some() {
            let made = self.build_terminal(id);
            return made.map_err(|source| FileError::Build { id, what, source });
        }
        let queue = self.extras.get(&id).and_then(|e| e.queue.as_ref());
        if let Some(queue) = queue.filter(|_| entry.r#type() == FdTypes::Ext) {
            // What was in it stands with its first descriptor.
            let queues = self.extras.values().filter_map(|e| e.queue.as_ref());
            let mut same = queues.filter(|q| q.inode == queue.inode && q.pid == queue.pid);
            let first = same.next().unwrap_or(queue);
            let opened = self.queues_back.open(queue, &first.queue, self.env);
            let opened = opened.map_err(|source| FileError::Build { id, what, source })?;
            return Ok(vec![(id, opened)]);
        }
        let ring = self.extras.get(&id).and_then(|e| e.uring.clone());
        if let Some(ring) = ring.filter(|_| entry.r#type() == FdTypes::Ext) {
            return Ok(vec![(id, self.build_ring(id, &ring)?)]);
        }
        let fd = self
            .build_single(&entry)
            .map_err(|source| FileError::Build {
                id,
                what: what.clone(),
                source,
            })?;
        Ok(vec![(id, fd)])
    }

    fn build_single(&mut self, entry: &FileEntry) -> Result<OwnedFd, BuildError> {
        let (entry, extra) = self.on_devices_here(entry)?;
        let (entry, extra) = (entry.as_ref(), extra.as_deref());
        let incomplete = || BuildError::Images(format!("a {:?} without its part", entry.r#type()));
        let (fd, flags) = match entry.r#type() {
            FdTypes::Reg => {
                let reg = entry.reg.as_ref().ok_or_else(incomplete)?;
                return self.open_path(reg);
            }
            FdTypes::Pipe => {
                return self.pipes.open(entry.pipe.as_ref().ok_or_else(incomplete)?);
            }
            FdTypes::Fifo => {
                let fifo = entry.fifo.ok_or_else(incomplete)?;
                let flags = extra.and_then(|e| e.fifo_flags).ok_or_else(incomplete)?;
                let path = fifo.regf_id.and_then(|id| self.entries.get(&id));
                let reg = path.and_then(|e| e.reg.clone()).ok_or_else(incomplete)?;
                let path_extra = self.extras.get(&reg.id).map(Rc::as_ref);
                let (env, source) = (self.env, self.source);
                let ghosts = &mut self.ghosts;
                return self.pipes.open_fifo(&fifo, flags, || {
                    let root = root(env, path_extra)?;
                    match ghosts.remaps.get(&reg.id).copied() {
                        Some(ghost) => ghosts.open(ghost, &reg, root, source),
                        None => reg::restore(&reg, path_extra, root),
                    }
                });
            }
            FdTypes::Memfd => {
                let memfd = entry.memfd.as_ref().ok_or_else(incomplete)?;
                return self.memfds.open(memfd, self.source);
            }
            FdTypes::Eventfd => {
                let e = entry.efd.as_ref().ok_or_else(incomplete)?;
                (eventfd::restore(e, extra)?, e.flags)
            }
            FdTypes::Eventpoll => {
                let e = entry.epfd.as_ref().ok_or_else(incomplete)?;
                (epoll::restore()?, e.flags)
            }
            FdTypes::Timerfd => {
                let e = entry.tfd.as_ref().ok_or_else(incomplete)?;
                (
                    timerfd::restore(e, self.saved_realtime, self.env.away())?,
                    e.flags,
                )
            }
            FdTypes::Signalfd => {
                let e = entry.sgfd.as_ref().ok_or_else(incomplete)?;
                (signalfd::restore(e)?, e.flags)
            }
            FdTypes::Inotify => {
                let e = entry.ify.as_ref().ok_or_else(incomplete)?;
                (inotify::restore()?, e.flags)
            }
            FdTypes::Fanotify => {
                let e = entry.ffy.as_ref().ok_or_else(incomplete)?;
                (fanotify::restore(e)?, e.flags)
            }
            FdTypes::Pidfd => {
                let e = entry.pidfd.as_ref().ok_or_else(incomplete)?;
                let thread = extra.and_then(|e| e.pidfd).and_then(|p| p.thread);
                if thread == Some(true) {
                    // Something to hold the number until its process has its threads.
                    return pidfd::stand_in();
                }
                let here = |id| self.env.pid_here(id);
                (pidfd::restore(e, extra, &mut self.dead, here)?, e.flags)
            }
            FdTypes::Bpfmap => {
                let e = entry.bpf.as_ref().ok_or_else(incomplete)?;
                return self.bpf_maps.open(e);
            }
            FdTypes::Ns => {
                let e = entry.nsf.as_ref().ok_or_else(incomplete)?;
                (nsfd::restore(extra, self.env)?, e.flags)
            }
            FdTypes::Inetsk => {
                let e = entry.isk.as_ref().ok_or_else(incomplete)?;
                let tcp = e.proto == libc::IPPROTO_TCP as u32;
                let closed = extra
                    .and_then(|x| x.socket.as_ref())
                    .is_some_and(|s| s.fate() == Fate::Closed);
                let fd = if tcp && tcp::goes_on(e.state) && !closed {
                    self.connections.make(e, extra, self.source)?
                } else {
                    inet::restore(e, extra)?
                };
                (fd, e.flags)
            }
            FdTypes::Packetsk => {
                let e = entry.psk.as_ref().ok_or_else(incomplete)?;
                (packet::restore(e, extra)?, e.flags)
            }
            FdTypes::Netlinksk => {
                let e = entry.nlsk.as_ref().ok_or_else(incomplete)?;
                (netlink::restore(e, extra)?, e.flags)
            }
            other => {
                return Err(BuildError::Images(format!(
                    "files of kind {other:?} are not carried"
                )));
            }
        };
        set_flags(fd.as_fd(), flags)?;
        Ok(fd)
    }

    /// The records with the numbers that network devices have here.
    fn on_devices_here<'e>(
        &self,
        entry: &'e FileEntry,
    ) -> Result<(Cow<'e, FileEntry>, Option<Rc<RcrFile>>), BuildError> {
        let extra = self.extras.get(&entry.id).cloned();
        let socket = extra.as_ref().and_then(|e| e.socket.as_ref());
        if socket.is_none_or(|s| s.devices.is_empty()) {
            return Ok((Cow::Borrowed(entry), extra));
        }
        let mut entry = entry.clone();
        let mut extra = extra.map(Rc::unwrap_or_clone).unwrap_or_default();
        if let Some(socket) = &mut extra.socket {
            device::renumber(socket, entry.psk.as_deref_mut())?;
        }
        Ok((Cow::Owned(entry), Some(Rc::new(extra))))
    }

    fn open_path(&mut self, reg: &RegFileEntry) -> Result<OwnedFd, BuildError> {
        let extra = self.extras.get(&reg.id).map(Rc::as_ref);
        let root = root(self.env, extra)?;
        match self.ghosts.remaps.get(&reg.id).copied() {
            Some(ghost) => self.ghosts.open(ghost, reg, root, self.source),
            None => reg::restore(reg, extra, root),
        }
    }
}

pub(super) fn root<'e>(
    env: &'e dyn RestoreEnv,
    extra: Option<&RcrFile>,
) -> Result<BorrowedFd<'e>, BuildError> {
    let ns = extra.and_then(|e| e.mnt_ns).unwrap_or(0);
    env.root_dir(ns).map_err(|source| BuildError::Env {
        what: format!("root directory of mount namespace {ns}"),
        source,
    })
}

/// Status flags of files that are made rather than opened. O_ASYNC comes later.
fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<(), BuildError> {
    Ok(sys::set_status_flags(fd, flags as i32 & !libc::O_ASYNC)?)
}
