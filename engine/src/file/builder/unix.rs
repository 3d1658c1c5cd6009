//! Unix sockets: with their peers, what waits at listeners, what is under way.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use super::{FileBuilder, root, set_flags};
use crate::file::error::{BuildError, FileError};
use crate::file::record::{Fate, RcrFile};
use crate::file::sys;
use crate::image::schema::UnixSkEntry;
use crate::socket::credentials;
use crate::socket::unix::LISTEN;
use crate::socket::unix_back::{self, Record};
use crate::socket::unix_queue::{self, Later};

impl FileBuilder<'_> {
    /// Makes the sockets whose peers see a process of the tree; to be called
    /// while processes are newborn ([`RestoreEnv::newborn`]).
    pub fn connect(&mut self) -> Result<(), FileError> {
        let seen = |(id, extra): (&u32, &Rc<RcrFile>)| {
            let peer = extra.socket.as_ref()?.peer_cred.as_ref()?;
            (peer.pid != 0).then_some(*id)
        };
        let ids: Vec<u32> = self.extras.iter().filter_map(seen).collect();
        for id in ids {
            self.open(id)?;
        }
        // Listeners were used for connections from other times.
        for (id, extra) in &self.extras {
            let usk = self.entries.get(id).and_then(|e| e.usk.as_ref());
            let Some(usk) = usk.filter(|u| u.state == LISTEN) else {
                continue;
            };
            let peer = extra.socket.as_ref().and_then(|s| s.peer_cred.as_ref());
            if let (Some(fd), Some(_)) = (self.opened.get(id), peer) {
                credentials::listen(self.env, fd.as_fd(), usk.backlog as i32, peer).map_err(
                    |source| FileError::Build {
                        id: *id,
                        what: self.describe(*id),
                        source,
                    },
                )?;
            }
        }
        Ok(())
    }

    pub(super) fn build_unix(
        &mut self,
        usk: &UnixSkEntry,
    ) -> Result<Vec<(u32, OwnedFd)>, FileError> {
        let waits_at = self
            .extras
            .get(&usk.id)
            .map(Rc::as_ref)
            .and_then(|e| e.socket.as_ref());
        if let Some(listener) = waits_at.and_then(|s| s.pending_on) {
            return self.build_pending(listener);
        }
        let listener = self.accepting_listener(usk);
        if let Some(l) = listener {
            // The listener comes first; connecting goes through it.
            self.open(l)?;
        }
        let wrap = |source| FileError::Build {
            id: usk.id,
            what: format!("unix socket {:?}", String::from_utf8_lossy(&usk.name)),
            source,
        };
        let me = Record {
            usk,
            extra: self.extras.get(&usk.id).map(Rc::as_ref),
        };
        let my_root = root(self.env, me.extra).map_err(wrap)?;
        if me.more().fate() == Fate::Journal {
            let fd = self.env.journal_interim(usk.id).map_err(|source| {
                wrap(BuildError::Env {
                    what: "a file in place of the journal".into(),
                    source,
                })
            })?;
            let append = usk.flags | libc::O_APPEND as u32;
            set_flags(fd.as_fd(), append).map_err(wrap)?;
            return Ok(vec![(usk.id, fd)]);
        }
        let peer = me
            .more()
            .peer_id
            .and_then(|id| self.entries.get(&id)?.usk.clone());
        let Some(peer_usk) = peer else {
            let fd = unix_back::single(self.env, me, Some(my_root), &self.queues, &mut self.later)
                .map_err(wrap)?;
            set_flags(fd.as_fd(), usk.flags).map_err(wrap)?;
            return Ok(vec![(usk.id, fd)]);
        };
        let peer = Record {
            usk: &peer_usk,
            extra: self.extras.get(&peer_usk.id).map(Rc::as_ref),
        };
        let peer_root = root(self.env, peer.extra).map_err(wrap)?;
        if peer.more().peer_id != Some(usk.id) {
            let roots = (Some(my_root), Some(peer_root));
            let (usk, peer_id) = (usk.clone(), peer_usk.id);
            self.open(peer_id)?;
            let me = Record {
                usk: &usk,
                extra: self.extras.get(&usk.id).map(Rc::as_ref),
            };
            let peer = Record {
                usk: &peer_usk,
                extra: self.extras.get(&peer_id).map(Rc::as_ref),
            };
            let fd = unix_back::sender(self.env, me, peer, roots, &self.queues, &mut self.later)
                .map_err(|source| FileError::Build {
                    id: usk.id,
                    what: "datagram sender".into(),
                    source,
                })?;
            set_flags(fd.as_fd(), usk.flags).map_err(|source| FileError::Build {
                id: usk.id,
                what: "datagram sender".into(),
                source,
            })?;
            return Ok(vec![(usk.id, fd)]);
        }
        // The accepted end stands second.
        let swapped = me.more().accepted_by.is_some();
        let (a, b, roots) = if swapped {
            (peer, me, (Some(peer_root), Some(my_root)))
        } else {
            (me, peer, (Some(my_root), Some(peer_root)))
        };
        let server = listener.and_then(|l| {
            let usk = self.entries.get(&l)?.usk.as_ref()?;
            Some((
                Record {
                    usk,
                    extra: self.extras.get(&l).map(Rc::as_ref),
                },
                self.opened.get(&l)?.as_fd(),
            ))
        });
        let (fd_a, fd_b) =
            unix_back::pair(self.env, a, b, roots, server, &self.queues, &mut self.later)
                .map_err(wrap)?;
        set_flags(fd_a.as_fd(), a.usk.flags).map_err(wrap)?;
        set_flags(fd_b.as_fd(), b.usk.flags).map_err(wrap)?;
        Ok(vec![(a.usk.id, fd_a), (b.usk.id, fd_b)])
    }

    /// All connections that wait at a listener, in the order in which they came.
    fn build_pending(&mut self, listener: u32) -> Result<Vec<(u32, OwnedFd)>, FileError> {
        let socket = |e: &RcrFile| e.socket.clone();
        let mut accepted = Vec::new();
        let mut waiting = BTreeMap::new();
        for (id, more) in self
            .extras
            .iter()
            .filter_map(|(id, e)| Some((*id, socket(e)?)))
        {
            if more.accepted_by == Some(listener) {
                accepted.push(id);
            }
            if more.pending_on == Some(listener) {
                waiting.insert((more.pending_place, id), id);
            }
        }
        // Those who were accepted come first: they take the queue's head.
        for id in accepted {
            self.open(id)?;
        }
        self.open(listener)?;
        let mut made = Vec::new();
        for id in waiting.into_values() {
            let one = || -> Result<OwnedFd, BuildError> {
                let missing = || BuildError::Images("a listener is missing".into());
                let record = |id: u32| {
                    let usk = self.entries.get(&id)?.usk.as_ref()?;
                    let extra = self.extras.get(&id).map(Rc::as_ref);
                    Some(Record { usk, extra })
                };
                let me = record(id).ok_or_else(missing)?;
                let server = record(listener).ok_or_else(missing)?;
                let roots = (root(self.env, me.extra)?, root(self.env, server.extra)?);
                let fd = unix_back::pending(me, server, (Some(roots.0), Some(roots.1)))?;
                set_flags(fd.as_fd(), me.usk.flags)?;
                Ok(fd)
            };
            let fd = one().map_err(|source| FileError::Build {
                id,
                what: self.describe(id),
                source,
            })?;
            made.push((id, fd));
        }
        Ok(made)
    }

    /// Sends what refers to other files or to processes; to be called when all
    /// processes exist and have what is theirs.
    pub fn send_under_way(&mut self) -> Result<(), FileError> {
        let mut shutdowns = Vec::new();
        let mut all = Vec::new();
        // A file that is made here may be a socket with a queue in turn.
        loop {
            let Later {
                sends,
                shutdowns: more,
            } = std::mem::take(&mut self.later);
            shutdowns.extend(more);
            if sends.is_empty() {
                break;
            }
            let inodes = sends.iter().map(|(_, ino, _)| ino);
            let packets = inodes.filter_map(|ino| self.queues.get(ino)).flatten();
            let wanted: BTreeSet<u32> = packets
                .flat_map(|p| p.files.iter().copied().chain(p.from))
                .collect();
            all.extend(sends);
            for id in wanted {
                self.open(id)?;
            }
        }
        for (through, ino, id) in &all {
            self.send_queue(through.as_fd(), *ino, *id)
                .map_err(|source| FileError::Build {
                    id: *id,
                    what: format!("queue of {}", self.describe(*id)),
                    source,
                })?;
        }
        for (fd, how) in shutdowns {
            sys::shutdown(fd.as_fd(), how)?;
        }
        Ok(())
    }

    fn send_queue(&self, through: BorrowedFd<'_>, ino: u32, id: u32) -> Result<(), BuildError> {
        let lost = || BuildError::Images("a file under way is missing".into());
        let opened = |id: &u32| self.opened.get(id).ok_or_else(lost);
        for packet in self.queues.get(&ino).into_iter().flatten() {
            let files = packet.files.iter().map(|id| Ok(sys::dup(opened(id)?)?));
            let files = files.collect::<Result<Vec<_>, BuildError>>()?;
            let along = unix_queue::ancillary(files, packet.sender, packet.urgent);
            let one = std::slice::from_ref(packet);
            let Some(from) = packet.from else {
                unix_queue::with_room(through, one, |p| {
                    unix_queue::send(through, &p.data, &along, None)
                })?;
                continue;
            };
            let from = opened(&from)?.as_fd();
            let usk = self.entries.get(&id).and_then(|e| e.usk.as_ref());
            let extra = self.extras.get(&id).map(Rc::as_ref);
            let to = Record {
                usk: usk.ok_or_else(lost)?,
                extra,
            };
            let root = root(self.env, extra)?;
            unix_back::send_to(to, Some(root), |name| {
                unix_queue::with_room(from, one, |p| {
                    unix_queue::send(from, &p.data, &along, Some(name))
                })
            })?;
        }
        Ok(())
    }

    /// The listening socket through which a connection's accepted end came.
    fn accepting_listener(&self, usk: &UnixSkEntry) -> Option<u32> {
        let more = self.extras.get(&usk.id).map(Rc::as_ref)?.socket.as_ref()?;
        let peer = more
            .peer_id
            .and_then(|p| self.extras.get(&p).map(Rc::as_ref)?.socket.as_ref());
        more.accepted_by.or_else(|| peer?.accepted_by)
    }
}
