//! Files on their way: descriptors in the queues of unix sockets, to any depth.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::stat::fstat;

use super::super::error::{Stop, refuse};
use super::super::examined::Examined;
use super::super::fdinfo::FdInfo;
use super::super::identity::Key;
use super::{FileError, FileSaver, UnixPolicy, found};
use crate::file::{Fate, TaskFiles};
use crate::socket::unix::{LISTEN, is_removed};
use crate::socket::unix_queue::{self, Packet, Queued};
use crate::sys::process::pidfd_open;
use crate::sys::{SysError, SysResult};

/// A task whose table was saved.
#[derive(Debug, Clone)]
pub(super) struct Holder {
    pub pid: i32,
    pub voice: i32,
    pub comm: String,
    pub mnt_ns: u32,
}

impl FileSaver {
    /// Reads the queues of all unix sockets, and saves the files found there,
    /// which may be sockets with queues in turn. Of running tasks nothing is read.
    pub(super) fn save_under_way(&mut self) -> Result<Vec<(u32, Stop)>, FileError> {
        let mut refusals = Vec::new();
        if !self.policy.payload {
            return Ok(refusals);
        }
        let mut seen = BTreeSet::new();
        loop {
            let next = self.files.iter().find_map(|(id, s)| {
                let usk = s.entry.usk.as_ref()?;
                (!seen.contains(id)).then_some((*id, usk.ino, usk.r#type, usk.state))
            });
            let Some((id, ino, kind, state)) = next else {
                return Ok(refusals);
            };
            seen.insert(id);
            let journal = |s: &super::Saved| {
                let more = s.extra.socket.as_ref();
                more.is_some_and(|m| m.fate() == Fate::Journal)
            };
            let Some(held) = self.descriptions.get(id) else {
                continue;
            };
            if state == LISTEN || self.files.get(&id).is_some_and(journal) {
                continue;
            }
            let Some(packets) = unix_queue::read(held.fd.as_fd(), kind as i32)? else {
                let reason = "where in its queue an urgent byte stands cannot be told";
                let stop = refuse::<()>("unix socket", reason, "try again when it was read");
                refusals.extend(stop.err().map(|s| (id, s)));
                continue;
            };
            if let Some(urgent) = packets.iter().position(|p| p.urgent) {
                let before: usize = packets[..urgent].iter().map(|p| p.data.len()).sum();
                let more = self
                    .files
                    .get_mut(&id)
                    .and_then(|s| s.extra.socket.as_mut());
                if let Some(more) = more {
                    more.urgent_at = Some(before as u64);
                }
            }
            for packet in packets {
                match self.packet(id, packet)? {
                    Ok(queued) => self.unix.note(ino, queued),
                    Err(stop) => refusals.push((id, stop)),
                }
            }
        }
    }

    /// A packet with ids in place of descriptors and names.
    fn packet(&mut self, socket: u32, packet: Packet) -> Result<Result<Queued, Stop>, FileError> {
        let mut files = Vec::new();
        for fd in packet.files {
            match self.traveller(socket, fd)? {
                Ok(id) => files.extend(id),
                Err(stop) => return Ok(Err(stop)),
            }
        }
        let from = match &packet.from {
            None => None,
            Some(name) => match self.named(socket, name) {
                Ok(id) => id,
                Err(stop) => return Ok(Err(stop)),
            },
        };
        let sender = packet.sender.filter(|s| s.pid != 0);
        if let Some(s) = sender
            && !self.pids.contains(&(s.pid as i32))
            && self.policy.unix == UnixPolicy::Refuse
        {
            let reason = format!("a message of process {} outside waits in its queue", s.pid);
            return Ok(refuse("unix socket", reason, "try again when it was read"));
        }
        let known = sender.filter(|s| self.pids.contains(&(s.pid as i32)));
        Ok(Ok(Queued {
            data: packet.data,
            files,
            sender: known,
            from,
            urgent: packet.urgent,
        }))
    }

    /// The socket of that name, if it is not the other end of `socket`.
    fn named(&self, socket: u32, name: &[u8]) -> Result<Option<u32>, Stop> {
        let peer = self.files.get(&socket).and_then(|s| s.entry.usk.as_ref());
        let peer = peer.map_or(0, |u| u.peer);
        let removed = self.files.get(&socket).is_some_and(is_removed);
        for saved in self.files.values() {
            let (Some(usk), Some(more)) = (&saved.entry.usk, &saved.extra.socket) else {
                continue;
            };
            if more.local.as_deref() == Some(name) {
                if usk.ino != peer && removed {
                    return refuse(
                        "unix socket",
                        "a message waits in its queue, and its file was removed",
                        "try again when it was read",
                    );
                }
                return Ok((usk.ino != peer).then_some(usk.id));
            }
        }
        if self.policy.unix == UnixPolicy::Close {
            return Ok(None);
        }
        let name = super::sys::show_address(name);
        refuse(
            "unix socket",
            format!("a message of {name}, which is outside or gone, waits in its queue"),
            "try again when it was read",
        )
    }

    /// Saves a descriptor that is on its way to whoever reads `socket`.
    fn traveller(
        &mut self,
        socket: u32,
        fd: OwnedFd,
    ) -> Result<Result<Option<u32>, Stop>, FileError> {
        let stat = fstat(&fd).map_err(|e| SysError::new("fstat", "descriptor under way", e))?;
        let inode = (stat.st_dev, stat.st_ino);
        let Some(holder) = self.holder_of(socket).cloned() else {
            return Ok(Ok(None));
        };
        let text = read_proc(&format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let failed = |e: std::io::Error| FileError::Proc {
            pid: holder.pid,
            path: "descriptor under way".into(),
            what: e.to_string(),
        };
        let info = FdInfo::parse(&text).map_err(|e| FileError::Proc {
            pid: holder.pid,
            path: "descriptor under way".into(),
            what: e.to_string(),
        })?;
        let key = Key {
            inode,
            eventfd: info.eventfd_id,
        };
        if let Some(id) = self.descriptions.find(key, fd.as_fd())? {
            return Ok(Ok(Some(id)));
        }
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let link = link.map_err(failed)?.to_string_lossy().into_owned();
        let pidfd = pidfd_open(holder.voice)?;
        let task = TaskFiles {
            pid: holder.pid,
            voice: holder.voice,
            pidfd: pidfd.as_fd(),
            comm: &holder.comm,
            mnt_ns: holder.mnt_ns,
        };
        let policy = self.policy;
        let file = Examined {
            fd: fd.as_fd(),
            info: &info,
            stat: &stat,
            link: &link,
            task: &task,
            policy: &policy,
            early: None,
        };
        let through = self.files.get(&socket).map(|s| s.found.object.clone());
        let object = format!("{link} on its way through {}", through.unwrap_or_default());
        let Some(id) = self.examine(&file, found(&task, object, inode))? else {
            return Ok(Ok(None));
        };
        let entry = self.files.get(&id).map(|s| &s.entry);
        let watches = entry
            .and_then(|e| e.epfd.as_ref())
            .is_some_and(|e| !e.tfd.is_empty());
        if watches || entry.is_some_and(|e| e.ify.is_some() || e.ffy.is_some()) {
            return Ok(refuse(
                "unix socket",
                format!("{link} is on its way in its queue, and nobody has it who could set it up"),
                "try again when it has arrived",
            ));
        }
        self.descriptions.insert_unheld(key, fd, id)?;
        Ok(Ok(Some(id)))
    }

    /// A task that has a file; of one that is on its way itself, any.
    fn holder_of(&self, id: u32) -> Option<&Holder> {
        let slot = self.descriptions.get(id).and_then(|h| h.slots.first());
        slot.and_then(|s| self.holders.get(&s.pid))
            .or_else(|| self.holders.values().next())
    }
}

fn read_proc(path: &str) -> SysResult<String> {
    std::fs::read_to_string(path).map_err(|e| {
        let errno = nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        SysError::new("read", path, errno)
    })
}
