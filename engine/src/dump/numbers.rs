//! Numbers for namespaces, and each one that is not the host's saved once.

use std::collections::BTreeMap;

use std::os::fd::OwnedFd;

use nix::unistd::Pid;

use super::{DumpError, DumpOptions};
use crate::Refusal;
use crate::file::FileSaver;
use crate::image::ImageSink;
use crate::image::schema::TaskKobjIdsEntry;
use crate::namespace::pid::Numbering;
use crate::namespace::{self, NetSource, NsIds, NsKind};

/// Kinds in the order of their image numbers.
const KINDS: [NsKind; 8] = [
    NsKind::Pid,
    NsKind::Net,
    NsKind::Ipc,
    NsKind::Uts,
    NsKind::Mnt,
    NsKind::User,
    NsKind::Cgroup,
    NsKind::Time,
];

/// Namespaces met so far.
pub struct Table {
    host: NsIds,
    numbers: BTreeMap<u64, u32>,
    /// Network namespaces that are not the host's: number, itself, and a
    /// process with its name.
    nets: Vec<(u32, OwnedFd, i32, String)>,
    /// IPC namespaces that are not the host's: number, and a process.
    ipcs: Vec<(u32, Pid)>,
}

impl Table {
    /// Knows only the host's.
    pub fn new() -> Result<Self, DumpError> {
        let host = NsIds::own()?;
        let numbers = KINDS
            .iter()
            .zip(1..)
            .map(|(&k, n)| (host.get(k), n))
            .collect();
        Ok(Self {
            host,
            numbers,
            nets: Vec::new(),
            ipcs: Vec::new(),
        })
    }

    /// The host's own, as the inventory names them.
    pub fn host_ids(&self) -> TaskKobjIdsEntry {
        self.entry(&self.host)
    }

    /// The number of a mount namespace that is not the host's, else 0.
    pub fn foreign_mounts(&self, ids: &TaskKobjIdsEntry) -> u32 {
        let host = self.host_ids().mnt_ns_id;
        ids.mnt_ns_id.filter(|_| ids.mnt_ns_id != host).unwrap_or(0)
    }

    fn entry(&self, ids: &NsIds) -> TaskKobjIdsEntry {
        let n = |k| self.numbers.get(&ids.get(k)).copied();
        TaskKobjIdsEntry {
            pid_ns_id: n(NsKind::Pid),
            net_ns_id: n(NsKind::Net),
            ipc_ns_id: n(NsKind::Ipc),
            uts_ns_id: n(NsKind::Uts),
            mnt_ns_id: n(NsKind::Mnt),
            user_ns_id: n(NsKind::User),
            cgroup_ns_id: n(NsKind::Cgroup),
            time_ns_id: n(NsKind::Time),
            ..TaskKobjIdsEntry::default()
        }
    }

    /// Saves what is new among a process's namespaces; returns their numbers.
    pub fn save(
        &mut self,
        pid: i32,
        options: &DumpOptions,
        numbering: &Numbering,
        sink: &mut dyn ImageSink,
    ) -> Result<TaskKobjIdsEntry, DumpError> {
        let pid = Pid::from_raw(pid);
        let mut refusals: Vec<Refusal> = namespace::check_namespaces(pid)?;
        let ids = NsIds::of(pid)?;
        for kind in KINDS {
            let inode = ids.get(kind);
            if inode == 0 || self.numbers.contains_key(&inode) {
                continue;
            }
            let number = self.numbers.len() as u32 + 1;
            self.numbers.insert(inode, number);
            match kind {
                NsKind::Mnt => {
                    let found = namespace::save_mounts(
                        pid,
                        number,
                        &options.mounts,
                        &numbering.members(),
                        sink,
                    )?;
                    refusals.extend(found);
                }
                NsKind::Uts => namespace::save_uts(pid, number, sink)?,
                NsKind::User => namespace::save_user(pid, number, sink)?,
                NsKind::Ipc => self.ipcs.push((number, pid)),
                NsKind::Net => {
                    let ns = namespace::open_net(pid)?;
                    self.nets
                        .push((number, ns, pid.as_raw(), namespace::comm(pid)));
                }
                NsKind::Cgroup => refusals.extend(namespace::check_cgroup(pid)?),
                // Time is carried by offsets, and PID namespaces by their ids.
                _ => {}
            }
        }
        if !refusals.is_empty() {
            return Err(DumpError::Refused(refusals));
        }
        Ok(self.entry(&ids))
    }

    /// Saves the IPC namespaces, and the network namespaces of all processes
    /// and of sockets. To be
    /// called when all files are known.
    pub fn save_nets(
        &mut self,
        files: &mut FileSaver,
        options: &DumpOptions,
        sink: &mut dyn ImageSink,
    ) -> Result<(), DumpError> {
        for (inode, ns, pid, comm) in files.net_namespaces() {
            if self.numbers.contains_key(&inode) {
                continue;
            }
            let number = self.numbers.len() as u32 + 1;
            self.numbers.insert(inode, number);
            let ns = ns.try_clone_to_owned().map_err(DumpError::io("dup"))?;
            self.nets.push((number, ns, pid, comm));
        }
        let host_user = self.host.get(NsKind::User);
        for (id, pid) in std::mem::take(&mut self.ipcs) {
            let owner = namespace::owner_of(&namespace::open_ipc(pid)?)?;
            let number = match owner {
                Some(o) if o == host_user => Some(0),
                other => other.and_then(|o| self.numbers.get(&o).copied()),
            };
            let Some(owner) = number else {
                return Err(DumpError::Refused(vec![Refusal {
                    pid: pid.as_raw(),
                    comm: namespace::comm(pid),
                    object: "IPC namespace".into(),
                    reason: "it is owned by a user namespace without a process".into(),
                    advice: "untag the unit".into(),
                }]));
            };
            namespace::save_ipc(pid, id, owner, sink)?;
        }
        let mut sources = Vec::new();
        let mut refusals = Vec::new();
        for (id, ns, pid, comm) in std::mem::take(&mut self.nets) {
            let inode = namespace::inode_of(&ns)?;
            let owner = namespace::owner_of(&ns)?;
            let owner = match owner.filter(|&o| o != host_user) {
                None if owner.is_some() => 0,
                known => match known.and_then(|o| self.numbers.get(&o)) {
                    Some(&n) => n,
                    None => {
                        refusals.push(Refusal {
                            pid,
                            comm,
                            object: "network namespace".into(),
                            reason: "it is owned by a user namespace without a process".into(),
                            advice: "untag the unit".into(),
                        });
                        continue;
                    }
                },
            };
            sources.push(NetSource {
                id,
                ns,
                owner,
                empty: options.empty_net,
                external: options.external_nets.get(&inode).cloned(),
                pid,
                comm,
            });
        }
        refusals.extend(namespace::save_nets(&sources, sink)?);
        if !refusals.is_empty() {
            return Err(DumpError::Refused(refusals));
        }
        files.number_nets(|inode| self.numbers.get(&inode).copied());
        Ok(())
    }
}
