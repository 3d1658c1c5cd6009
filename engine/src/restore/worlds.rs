//! What surrounds the processes: namespaces and clocks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::unistd::Pid;

use super::births::Birth;
use super::images::{Images, LiveImage};
use super::{RestoreError, RestoreOptions};
use crate::clock;
use crate::ext::{RcrTask, RcrTime};
use crate::file::sys::pidfd_getfd;
use crate::file::{Newborn, RestoreEnv};
use crate::image::ImageSource;
use crate::image::schema::TaskKobjIdsEntry;
use crate::namespace::{
    self, Beside, HostEnv, IpcNamespace, MountNamespace, NetNamespace, NsIds, NsKind, Proc,
    UserNamespace, UtsNamespace,
};
use crate::remote::{Arena, Arg, OpId, Program, Tracee};
use crate::sys::process::pidfd_open;

/// Namespaces made again, by their numbers in the images.
#[derive(Debug)]
pub struct Worlds {
    host: TaskKobjIdsEntry,
    mounts: BTreeMap<u32, MountNamespace>,
    uts: BTreeMap<u32, UtsNamespace>,
    users: BTreeMap<u32, UserNamespace>,
    nets: BTreeMap<u32, NetNamespace>,
    ipcs: BTreeMap<u32, IpcNamespace>,
    /// Our own IPC namespace.
    own_ipc: OwnedFd,
    times: BTreeMap<RcrTime, OwnedFd>,
    /// Our own cgroup namespace, and those that processes have made.
    own_cgroup: OwnedFd,
    cgroups: RefCell<BTreeMap<u32, OwnedFd>>,
}

impl Worlds {
    /// Builds every namespace of the dump that is not the host's.
    pub fn build(
        source: &dyn ImageSource,
        images: &Images,
        options: &RestoreOptions,
    ) -> Result<Self, RestoreError> {
        let host = images.host_ids;
        let mut w = Self {
            mounts: BTreeMap::new(),
            uts: BTreeMap::new(),
            users: BTreeMap::new(),
            nets: BTreeMap::new(),
            ipcs: BTreeMap::new(),
            own_ipc: namespace::open_ipc(Pid::this())?,
            times: BTreeMap::new(),
            own_cgroup: namespace::open_cgroup(Pid::this())?,
            cgroups: RefCell::default(),
            host,
        };
        for (_, live) in images.live() {
            if let Some(id) = foreign(live.ids.user_ns_id, w.host.user_ns_id)
                && !w.users.contains_key(&id)
            {
                w.users.insert(id, namespace::build_user(source, id)?);
            }
        }
        // Before mounts: a sysfs shows the network namespace it was mounted in.
        w.nets = namespace::build_nets(source, &w.users, &options.nets, &options.veths)?;
        for (_, live) in images.live() {
            if let Some(id) = foreign(live.ids.ipc_ns_id, w.host.ipc_ns_id)
                && !w.ipcs.contains_key(&id)
            {
                w.ipcs
                    .insert(id, namespace::build_ipc(source, id, &w.users)?);
            }
        }
        for (_, live) in images.live() {
            let ids = &live.ids;
            if let Some(id) = foreign(ids.mnt_ns_id, w.host.mnt_ns_id)
                && !w.mounts.contains_key(&id)
            {
                let env = HostEnv {
                    root: options.root.clone(),
                    root_anyway: options.root.is_some() && w.mounts.is_empty(),
                    external: options.external_mounts.clone(),
                    as_it_is: options.host_as_it_is,
                    ..HostEnv::current()?
                };
                let net = foreign(ids.net_ns_id, w.host.net_ns_id).and_then(|i| w.nets.get(&i));
                let beside = Beside {
                    net: net.map(NetNamespace::ns),
                    ipc: w
                        .ipcs
                        .get(&ids.ipc_ns_id.unwrap_or(0))
                        .map(IpcNamespace::ns),
                };
                w.mounts
                    .insert(id, namespace::build_mounts(source, id, &env, &beside)?);
            }
            if let Some(id) = foreign(ids.uts_ns_id, w.host.uts_ns_id)
                && !w.uts.contains_key(&id)
            {
                w.uts.insert(id, namespace::restore_uts(source, id)?);
            }
        }
        if options.root.is_some() && w.mounts.is_empty() {
            return Err(RestoreError::Tree {
                pid: images.processes.first().map_or(0, |p| p.id),
                what: "a root directory is given, and it has no mount namespace of its own".into(),
            });
        }
        Ok(w)
    }

    /// From here on our children live with the clocks of the dump.
    pub fn enter_clocks(&self, images: &Images) -> Result<(), RestoreError> {
        let wanted = images.offsets().map_err(RestoreError::io("clocks"))?;
        let ours =
            clock::Offsets::of(std::process::id() as i32).map_err(RestoreError::io("clocks"))?;
        if wanted != ours {
            clock::enter_for_children(wanted).map_err(RestoreError::io("time namespace"))?;
        }
        Ok(())
    }

    /// Adds the calls that bring a process into its mount, network and UTS namespaces.
    /// Makes the time namespaces of processes that have one beside the tree's.
    pub fn make_times(&mut self, images: &Images) -> Result<(), RestoreError> {
        let base = images.offsets().map_err(RestoreError::io("clocks"))?;
        for (p, _) in images.live() {
            for time in [p.ext.time, p.ext.time_for_children].into_iter().flatten() {
                if let Entry::Vacant(free) = self.times.entry(time) {
                    let ns = base.shifted(&time).namespace();
                    free.insert(ns.map_err(RestoreError::io("time namespace"))?);
                }
            }
        }
        Ok(())
    }

    /// Adds the calls that bring a process into its own time namespace.
    pub fn enter_time(&self, p: &mut Program, pidfd: OpId, task: &RcrTask) {
        if let Some(ns) = task.time.as_ref().and_then(|t| self.times.get(t)) {
            let kind = crate::sys::process::CLONE_NEWTIME;
            join(p, pidfd, ns.as_raw_fd(), kind, "enter the time namespace");
        }
    }

    /// Adds the calls that bring a process into its mount and UTS namespaces.
    pub fn enter(&self, p: &mut Program, pidfd: OpId, ids: &TaskKobjIdsEntry) {
        if let Some(ns) =
            foreign(ids.mnt_ns_id, self.host.mnt_ns_id).and_then(|i| self.mounts.get(&i))
        {
            join(
                p,
                pidfd,
                ns.ns().as_raw_fd(),
                libc::CLONE_NEWNS,
                "enter the mount namespace",
            );
        }
        if let Some(ns) =
            foreign(ids.net_ns_id, self.host.net_ns_id).and_then(|i| self.nets.get(&i))
        {
            join(
                p,
                pidfd,
                ns.ns().as_raw_fd(),
                libc::CLONE_NEWNET,
                "enter the network namespace",
            );
        }
        if let Some(ns) = foreign(ids.uts_ns_id, self.host.uts_ns_id).and_then(|i| self.uts.get(&i))
        {
            join(
                p,
                pidfd,
                ns.ns().as_raw_fd(),
                libc::CLONE_NEWUTS,
                "enter the UTS namespace",
            );
        }
    }

    /// A namespace of a process, opened.
    fn descriptor(&self, kind: &str, ids: &TaskKobjIdsEntry) -> io::Result<OwnedFd> {
        let found = match kind {
            "mnt" => foreign(ids.mnt_ns_id, self.host.mnt_ns_id)
                .and_then(|i| self.mounts.get(&i))
                .map(|ns| ns.ns()),
            "uts" => foreign(ids.uts_ns_id, self.host.uts_ns_id)
                .and_then(|i| self.uts.get(&i))
                .map(|ns| ns.ns()),
            "user" => foreign(ids.user_ns_id, self.host.user_ns_id)
                .and_then(|i| self.users.get(&i))
                .map(|ns| ns.ns()),
            "net" => foreign(ids.net_ns_id, self.host.net_ns_id)
                .and_then(|i| self.nets.get(&i))
                .map(|ns| ns.ns()),
            "ipc" => foreign(ids.ipc_ns_id, self.host.ipc_ns_id)
                .and_then(|i| self.ipcs.get(&i))
                .map(|ns| ns.ns()),
            _ => None,
        };
        let none = || io::Error::other("not one of those that were made again");
        found.ok_or_else(none)?.try_clone_to_owned()
    }

    /// Brings a newborn process, which is in its parent's IPC namespace, into
    /// its own: before its memory, in which there may be segments.
    pub fn enter_ipc(&self, pid: i32, live: &LiveImage, birth: &Birth) -> Result<(), RestoreError> {
        let ns = foreign(live.ids.ipc_ns_id, self.host.ipc_ns_id).and_then(|i| self.ipcs.get(&i));
        let ns = ns.map_or(self.own_ipc.as_fd(), IpcNamespace::ns);
        let wanted = namespace::inode_of(ns)?;
        if NsIds::of(Pid::from_raw(pid))?.get(NsKind::Ipc) == wanted {
            return Ok(());
        }
        let mut p = Program::new();
        let what = "enter the IPC namespace";
        join(
            &mut p,
            birth.pidfd,
            ns.as_raw_fd(),
            libc::CLONE_NEWIPC,
            what,
        );
        Tracee { tid: pid }.run(birth.arena, &p)?;
        Ok(())
    }

    /// Brings a newborn process, which is in its cgroup and in its parent's
    /// cgroup namespace, into its own; the first that is in one makes it.
    pub fn enter_cgroup(
        &self,
        pid: i32,
        live: &LiveImage,
        birth: &Birth,
    ) -> Result<(), RestoreError> {
        let tracee = Tracee { tid: pid };
        let mut p = Program::new();
        let mut made = self.cgroups.borrow_mut();
        let ns = match foreign(live.ids.cgroup_ns_id, self.host.cgroup_ns_id) {
            None => &self.own_cgroup,
            Some(id) => match made.entry(id) {
                Entry::Occupied(ns) => ns.into_mut(),
                Entry::Vacant(free) => {
                    let what = "make a cgroup namespace";
                    p.call(libc::SYS_unshare, what, &[libc::CLONE_NEWCGROUP.into()]);
                    tracee.run(birth.arena, &p)?;
                    free.insert(namespace::open_cgroup(Pid::from_raw(pid))?);
                    return Ok(());
                }
            },
        };
        let wanted = namespace::inode_of(ns)?;
        if NsIds::of(Pid::from_raw(pid))?.get(NsKind::Cgroup) == wanted {
            return Ok(());
        }
        let what = "enter the cgroup namespace";
        let kind = libc::CLONE_NEWCGROUP;
        join(&mut p, birth.pidfd, ns.as_raw_fd(), kind, what);
        tracee.run(birth.arena, &p)?;
        Ok(())
    }

    /// Completes the mount namespaces with what shows processes of the tree,
    /// mounted by newborn ones.
    pub fn mount_procs(
        &self,
        images: &Images,
        births: &BTreeMap<i32, Birth>,
    ) -> Result<(), RestoreError> {
        for ns in self.mounts.values() {
            let Some(unfinished) = ns.take_unfinished() else {
                continue;
            };
            let mut made = BTreeMap::new();
            for proc in unfinished.procs() {
                let pid = images.pids.here(proc.process);
                let birth = births.get(&pid).ok_or_else(|| RestoreError::Tree {
                    pid,
                    what: "a proc shows its PID namespace, and it is not in the images".into(),
                })?;
                made.insert(proc.at, mount_proc(pid, birth.arena, &proc)?);
            }
            unfinished.finish(&made)?;
        }
        Ok(())
    }

    /// Removes what is to go with its last user, when all users are there.
    pub fn settle(&self, source: &dyn ImageSource) -> Result<(), RestoreError> {
        for (&id, ns) in &self.ipcs {
            ns.settle(source, id)?;
        }
        Ok(())
    }

    /// The user namespace a process is to be in, unless it is the host's.
    pub fn user(&self, ids: &TaskKobjIdsEntry) -> Option<&UserNamespace> {
        foreign(ids.user_ns_id, self.host.user_ns_id).and_then(|i| self.users.get(&i))
    }
}

/// Has a process mount a proc, attached nowhere, and takes it.
fn mount_proc(pid: i32, arena: Arena, proc: &Proc) -> Result<OwnedFd, RestoreError> {
    const FSOPEN_CLOEXEC: i32 = 1;
    const FSCONFIG_SET_FLAG: i32 = 0;
    const FSCONFIG_SET_STRING: i32 = 1;
    const FSCONFIG_CMD_CREATE: i32 = 6;
    const FSMOUNT_CLOEXEC: i32 = 1;
    let mut p = Program::new();
    let args = [p.cstr(b"proc").into(), FSOPEN_CLOEXEC.into()];
    let fs = p.call(libc::SYS_fsopen, "fsopen proc", &args);
    for (key, value) in &proc.options {
        let what = format!("set the option {} of a proc", String::from_utf8_lossy(key));
        let key = p.cstr(key).into();
        let (command, value) = match value {
            Some(value) => (FSCONFIG_SET_STRING, p.cstr(value).into()),
            None => (FSCONFIG_SET_FLAG, Arg::Imm(0)),
        };
        let args = [fs.into(), command.into(), key, value, 0.into()];
        p.call(libc::SYS_fsconfig, what, &args);
    }
    let none = Arg::Imm(0);
    let args = [fs.into(), FSCONFIG_CMD_CREATE.into(), none, none, none];
    p.call(libc::SYS_fsconfig, "make a proc", &args);
    let args = [fs.into(), FSMOUNT_CLOEXEC.into(), 0.into()];
    let mount = p.call(libc::SYS_fsmount, "mount a proc", &args);
    p.call(libc::SYS_close, "close the context", &[fs.into()]);
    let tracee = Tracee { tid: pid };
    let fd = tracee.run(arena, &p)?.result(mount) as RawFd;
    let taken = pidfd_getfd(pidfd_open(pid)?.as_fd(), fd)?;
    let mut p = Program::new();
    p.call(libc::SYS_close, "close the mount", &[fd.into()]);
    tracee.run(arena, &p)?;
    Ok(taken)
}

/// The PID namespace a process is in.
pub fn pid_ns(pid: i32) -> Result<File, RestoreError> {
    let path = format!("/proc/{pid}/ns/pid");
    File::open(&path).map_err(RestoreError::io(path))
}

/// Adds the calls that take one of our descriptors and enter its namespace.
pub fn join(p: &mut Program, pidfd: impl Into<Arg>, fd: i32, kind: i32, what: &str) {
    let ns = take(p, pidfd, fd);
    p.call(libc::SYS_setns, what, &[ns.into(), kind.into()]);
    p.call(libc::SYS_close, "close the namespace", &[ns.into()]);
}

/// Adds the call that takes one of our descriptors.
pub fn take(p: &mut Program, pidfd: impl Into<Arg>, fd: i32) -> OpId {
    let args = [pidfd.into(), fd.into(), 0.into()];
    p.call(
        libc::SYS_pidfd_getfd,
        format!("take our descriptor {fd}"),
        &args,
    )
}

fn foreign(id: Option<u32>, host: Option<u32>) -> Option<u32> {
    id.filter(|_| id != host)
}

/// What files need to know of the place where they come back.
pub struct Env<'a> {
    worlds: &'a Worlds,
    images: &'a Images,
    root: File,
    journal_interim: Option<&'a Path>,
    away: Duration,
    /// Namespaces of each process.
    ids: BTreeMap<i32, TaskKobjIdsEntry>,
    /// Processes that were born and have nothing of their own yet.
    newborns: RefCell<BTreeMap<i32, Newborn>>,
}

impl<'a> Env<'a> {
    /// `journal_interim` is the file that stands in for journal connections.
    pub fn new(
        worlds: &'a Worlds,
        images: &'a Images,
        journal_interim: Option<&'a Path>,
    ) -> Result<Self, RestoreError> {
        let now = clock::Clocks::now().realtime;
        let away = (now - images.inventory.realtime_ns).max(0) as u64;
        Ok(Self {
            worlds,
            images,
            root: File::open("/").map_err(RestoreError::io("open /"))?,
            journal_interim,
            away: Duration::from_nanos(away),
            ids: images.live().map(|(p, live)| (p.pid, live.ids)).collect(),
            newborns: RefCell::default(),
        })
    }

    /// Sets which processes are newborn, by our numbers; none when they have grown.
    pub fn set_newborns(&self, ways: &BTreeMap<i32, Birth>) {
        let one = |(&tid, birth): (&i32, &Birth)| {
            let newborn = Newborn {
                tracee: Tracee { tid },
                arena: birth.arena,
                pidfd: birth.pidfd,
            };
            (tid, newborn)
        };
        *self.newborns.borrow_mut() = ways.iter().map(one).collect();
    }
}

impl RestoreEnv for Env<'_> {
    fn root_dir(&self, mnt_ns: u32) -> io::Result<BorrowedFd<'_>> {
        if mnt_ns == 0 {
            return Ok(self.root.as_fd());
        }
        let ns = self.worlds.mounts.get(&mnt_ns);
        Ok(ns
            .ok_or_else(|| io::Error::other(format!("no mount namespace {mnt_ns}")))?
            .root())
    }

    fn net_ns(&self, id: u32) -> io::Result<BorrowedFd<'_>> {
        let ns = self.worlds.nets.get(&id);
        let absent = || io::Error::other(format!("no network namespace {id}"));
        Ok(ns.ok_or_else(absent)?.ns())
    }

    fn journal_interim(&self, _id: u32) -> io::Result<OwnedFd> {
        let path = self.journal_interim.ok_or_else(|| {
            io::Error::other(
                "a connection to the journal is in the images, and no file to stand in",
            )
        })?;
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        Ok(file.into())
    }

    fn namespace(&self, kind: &str, pid: Option<i32>) -> io::Result<OwnedFd> {
        let Some(pid) = pid else {
            return Ok(File::open(format!("/proc/self/ns/{kind}"))?.into());
        };
        let none = || io::Error::other("no such process in the images");
        let ids = self.ids.get(&pid).ok_or_else(none)?;
        self.worlds.descriptor(kind, ids)
    }

    fn away(&self) -> Duration {
        self.away
    }

    fn pid_here(&self, id: i32) -> i32 {
        self.images.pids.here(id)
    }

    fn newborn(&self, id: i32) -> Option<Newborn> {
        let tid = self.images.pids.here(id);
        self.newborns.borrow().get(&tid).copied()
    }

    fn pid_seen(&self, viewer: i32, id: i32) -> i32 {
        let pids = &self.images.pids;
        pids.seen(pids.here(viewer), pids.here(id))
    }
}
