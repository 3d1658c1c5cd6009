//! Unix sockets: listening, paired inside the service, or leading outside.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::stat::fstat;

use super::diag::{self, UnixInfo};
use super::home::at_home;
use super::peer::{self, OutsidePeer};
use super::sys::bytes_unacknowledged;
use super::unix_queue::Queued;
use super::{Kind, credentials, opts};
use crate::file::UnixPolicy;
use crate::file::error::{Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::identity::Descriptions;
use crate::file::record::{Fate, RcrSocket};
use crate::file::reg::{Whereabouts, whereabouts};
use crate::file::sys;
use crate::image::schema::{FdTypes, FilePermsEntry, SkShutdown, UnixSkEntry};
use crate::image::{ImageError, ImageSink, ImageWriter, Kind as ImageKind, names, put_image};
use crate::sys::{SysError, SysResult};

pub(crate) const LISTEN: u32 = 10;

/// What is known about all unix sockets.
#[derive(Debug, Default)]
pub(crate) struct Table {
    infos: HashMap<u32, UnixInfo>,
    queues: Vec<(u32, Queued)>,
}

impl Table {
    /// The kernel's view of a socket; asked once for all, and again for newer ones.
    fn info(&mut self, ino: u32, fd: BorrowedFd<'_>) -> Result<UnixInfo, Stop> {
        if !self.infos.contains_key(&ino) {
            self.infos.extend(at_home(fd, diag::unix_sockets)?);
        }
        match self.infos.get(&ino) {
            Some(info) => Ok(info.clone()),
            None => refuse(
                "unix socket",
                format!("socket:[{ino}] is not among those of its network namespace"),
                "try again, or untag the unit",
            ),
        }
    }

    /// Takes a packet that waits in the queue of socket `ino`.
    pub(crate) fn note(&mut self, ino: u32, packet: Queued) {
        self.queues.push((ino, packet));
    }

    /// Writes the queued data.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        if self.queues.is_empty() {
            return Ok(());
        }
        let mut image = ImageWriter::new(ImageKind::SkQueues);
        for (ino, packet) in &self.queues {
            image.record(&packet.head(*ino)).payload(&packet.data);
        }
        put_image(sink, names::SK_QUEUES, &image.finish())
    }
}

/// Saves one socket; whether its peer is inside the service shows in [`settle`].
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    kind: Kind,
    table: &mut Table,
) -> Result<(), Stop> {
    let ino = file.stat.st_ino as u32;
    let info = table.info(ino, file.fd)?;
    let local = sys::local_address(file.fd)?;
    let peer = sys::peer_address(file.fd)?;
    let mut more = RcrSocket {
        local: (local.len() > 2).then(|| local.clone()),
        peer: peer.clone(),
        options: opts::save(file.fd, kind)?,
        fate: Some(Fate::Kept.into()),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        peer_cred: credentials::save(file.fd)?,
        ..RcrSocket::default()
    };
    let mut perms = None;
    let has_path = local.get(2).is_some_and(|&b| b != 0);
    if has_path {
        let at = path_of(file)?;
        perms = Some(at.perms);
        more.path = Some(at.path);
        more.deleted = at.deleted.then_some(true);
        saved.extra.mnt_ns = Some(at.mnt_ns);
    }
    if kind.kind == libc::SOCK_STREAM && peer.as_deref().is_some_and(is_journal) {
        more.fate = Some(Fate::Journal.into());
    }
    saved.entry.r#type = FdTypes::Unixsk.into();
    saved.entry.usk = Some(Box::new(UnixSkEntry {
        id: saved.entry.id,
        ino,
        r#type: kind.kind as u32,
        state: info.state.into(),
        flags: file.flags(),
        uflags: 0,
        backlog: info.backlog,
        peer: info.peer.unwrap_or(0),
        fown: file.fown()?,
        opts: opts::entry(file.fd)?,
        name: local.get(2..).unwrap_or_default().to_vec(),
        shutdown: Some(match info.shutdown & 3 {
            0 => SkShutdown::None,
            1 => SkShutdown::Read,
            2 => SkShutdown::Write,
            _ => SkShutdown::Both,
        } as i32),
        file_perms: perms,
        deleted: more.deleted,
        ..UnixSkEntry::default()
    }));
    saved.extra.socket = Some(Box::new(more));
    Ok(())
}

/// Whether an address is a journal's stream socket.
fn is_journal(address: &[u8]) -> bool {
    let shown = sys::show_address(address);
    shown
        .strip_prefix("/run/systemd/journal")
        .is_some_and(|rest| rest == "/stdout" || rest.starts_with('.') && rest.ends_with("/stdout"))
}

struct BoundAt {
    path: String,
    mnt_ns: u32,
    perms: FilePermsEntry,
    /// The file was removed.
    deleted: bool,
}

/// Where the file of a bound socket is, whatever relative name it was bound by.
fn path_of(file: &Examined<'_>) -> Result<BoundAt, Stop> {
    let fd = sys::unix_socket_file(file.fd)?;
    let stat = fstat(&fd).map_err(|e| SysError::new("fstat", "socket file", e))?;
    let link = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&fd)
    ));
    let link = link
        .ok()
        .and_then(|l| l.into_os_string().into_string().ok())
        .unwrap_or_default();
    let as_file = Examined {
        fd: fd.as_fd(),
        stat: &stat,
        link: &link,
        early: None,
        ..*file
    };
    let (path, mnt_ns, deleted) = match whereabouts(&as_file)? {
        Whereabouts::Named { name, mnt_ns } => (name, mnt_ns, false),
        Whereabouts::Unlinked { name } => (name, file.task.mnt_ns, true),
    };
    Ok(BoundAt {
        path,
        mnt_ns,
        perms: FilePermsEntry {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
        },
        deleted,
    })
}

/// What [`settle`] needs to know.
pub(crate) struct Rules {
    pub unix: UnixPolicy,
    /// A running service: what is missing may have gone meanwhile.
    pub live: bool,
}

/// Connects what belongs together once all sockets are known, decides about
/// what leads outside, and reads the queues. Gives refusals by file id.
pub(crate) fn settle(
    files: &mut BTreeMap<u32, Saved>,
    descriptions: &Descriptions,
    table: &mut Table,
    rules: &Rules,
) -> SysResult<Vec<(u32, Stop)>> {
    let mut by_ino = HashMap::new();
    let mut listeners = HashMap::new();
    for s in files.values() {
        let Some(usk) = &s.entry.usk else { continue };
        by_ino.insert(usk.ino, usk.id);
        if usk.state == LISTEN && !usk.name.is_empty() {
            listeners.insert(usk.name.clone(), usk.id);
        }
    }
    let mut refusals = Vec::new();
    let mut pending = HashMap::new();
    for usk in files.values().filter_map(|s| s.entry.usk.as_ref()) {
        let info = table.infos.get(&usk.ino);
        let waiting = info.map_or(&[][..], |i| &i.pending);
        for (place, ino) in waiting.iter().enumerate() {
            pending.insert(*ino, (usk.id, place as u32));
            if !by_ino.contains_key(ino) && rules.unix != UnixPolicy::Close {
                let stop = refuse::<()>(
                    "listening unix socket",
                    "a connection from outside of the service waits to be accepted",
                    "try again when it is, or allow such connections to be closed",
                );
                refusals.extend(stop.err().map(|s| (usk.id, s)));
            }
        }
    }
    let ids: Vec<u32> = by_ino.values().copied().collect();
    for id in ids {
        let Some(held) = descriptions.get(id) else {
            continue;
        };
        let Some(saved) = files.get(&id) else {
            continue;
        };
        let decided = match waits_for(saved, &pending) {
            Some((listener, place)) => pending_connection(held.fd.as_fd(), files.get(&listener))
                .map(|()| (Fate::Kept, None, Some((listener, place)))),
            None => decide(saved, files, &by_ino, rules).map(|(fate, peer)| (fate, peer, None)),
        };
        let (fate, peer_id, waits) = match decided {
            Ok(d) => d,
            Err(stop) => {
                refusals.push((id, stop));
                continue;
            }
        };
        let Some(saved) = files.get_mut(&id) else {
            continue;
        };
        let (Some(usk), Some(more)) = (&saved.entry.usk, &mut saved.extra.socket) else {
            continue;
        };
        more.fate = Some(fate.into());
        more.peer_id = peer_id;
        more.pending_on = waits.map(|w| w.0);
        more.pending_place = waits.map(|w| w.1);
        let stream = usk.r#type != libc::SOCK_DGRAM as u32;
        if stream && usk.state != LISTEN && peer_id.is_some() {
            more.accepted_by = listeners.get(&usk.name).copied();
        }
        if usk.state == LISTEN {
            // listen(2) notes who its peers see at the other end.
            let cred =
                sys::socket_option(held.fd.as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, 12)?;
            let pid = cred
                .get(..4)
                .map(|b| i32::from_ne_bytes(b.try_into().expect("4")));
            if let Some(slot) = held.slots.iter().find(|s| Some(s.pid) == pid) {
                saved.extra.late_pid = Some(slot.pid);
                saved.extra.late_fd = Some(slot.fd);
            }
        }
    }
    Ok(refusals)
}

/// The listener that a socket waits at to be accepted, and its place there.
fn waits_for(saved: &Saved, pending: &HashMap<u32, (u32, u32)>) -> Option<(u32, u32)> {
    let usk = saved.entry.usk.as_ref()?;
    pending.get(&usk.ino).copied()
}

/// Whether a socket's file was removed: nobody can reach it by name.
pub(crate) fn is_removed(saved: &Saved) -> bool {
    let more = saved.extra.socket.as_ref();
    more.is_some_and(|m| m.deleted == Some(true))
}

/// What stands in the way of a connection that was not accepted yet.
fn pending_connection(fd: BorrowedFd<'_>, listener: Option<&Saved>) -> Result<(), Stop> {
    if listener.is_some_and(is_removed) {
        return refuse(
            "unix connection",
            "it waits to be accepted by a listener whose file was removed",
            "try again when it is accepted",
        );
    }
    // Only accept(2) would let us read what its other end has got.
    if bytes_unacknowledged(fd)? > 0 {
        return refuse(
            "unix connection",
            "it was not accepted yet, and what was sent over it cannot be read",
            "try again when it is accepted",
        );
    }
    Ok(())
}

/// What becomes of one socket's connection, and the other end if it is inside.
fn decide(
    saved: &Saved,
    files: &BTreeMap<u32, Saved>,
    by_ino: &HashMap<u32, u32>,
    rules: &Rules,
) -> Result<(Fate, Option<u32>), Stop> {
    let (Some(usk), Some(more)) = (&saved.entry.usk, &saved.extra.socket) else {
        return Ok((Fate::Kept, None));
    };
    if more.fate() == Fate::Journal || usk.state == LISTEN {
        return Ok((more.fate(), None));
    }
    let datagram = usk.r#type == libc::SOCK_DGRAM as u32;
    let both_shut = usk.shutdown() == SkShutdown::Both;
    if usk.peer == 0 {
        let connected = more.peer.is_some();
        return match (datagram, connected) {
            (_, false) => Ok((Fate::Kept, None)),
            // The peer has gone before us.
            (true, true) => Ok((Fate::Closed, None)),
            (false, true) if both_shut => Ok((Fate::Closed, None)),
            (false, true) if rules.live => Ok((Fate::Kept, None)),
            (false, true) => outside(more, "a server that has not accepted it yet", rules),
        };
    }
    let Some(&peer_id) = by_ino.get(&usk.peer) else {
        if datagram {
            // Who sends to a socket that went away is told so and connects again.
            return Ok((Fate::Closed, None));
        }
        if both_shut {
            return Ok((Fate::Closed, None));
        }
        return outside(more, "a process outside the service", rules);
    };
    let back = files
        .get(&peer_id)
        .and_then(|p| p.entry.usk.as_ref())
        .map_or(0, |p| p.peer);
    let peer_named = files.get(&peer_id).is_some_and(|p| {
        let more = p.extra.socket.as_ref();
        more.is_some_and(|s| s.local.is_some()) && !is_removed(p)
    });
    if back != usk.ino && !peer_named {
        return refuse(
            "unix socket",
            "it sends to a socket without a name, or whose file was removed, that does not send \
             back",
            "untag the unit",
        );
    }
    Ok((Fate::Kept, Some(peer_id)))
}

fn outside(more: &RcrSocket, whom: &str, rules: &Rules) -> Result<(Fate, Option<u32>), Stop> {
    let name = shown_peer(more);
    let closed = match rules.unix {
        UnixPolicy::Refuse => false,
        UnixPolicy::Reopened => peer::is_reopened(&name),
        UnixPolicy::Close => true,
    };
    if closed {
        return Ok((Fate::Closed, None));
    }
    refuse(
        "unix connection",
        format!("it leads to {whom} (peer {name})"),
        peer::advice(&name),
    )
}

fn shown_peer(more: &RcrSocket) -> String {
    more.peer
        .as_deref()
        .map_or("unnamed".into(), sys::show_address)
}

/// The connections that lead out of the tree and do not stand in the way, once
/// all is settled.
pub(crate) fn outside_peers<'a>(
    files: impl Iterator<Item = &'a Saved>,
) -> impl Iterator<Item = OutsidePeer> {
    files.filter_map(|saved| {
        saved.entry.usk.as_ref()?;
        let more = saved.extra.socket.as_ref()?;
        Some(OutsidePeer {
            pid: saved.found.pid,
            comm: saved.found.comm.clone(),
            object: saved.found.object.clone(),
            peer: shown_peer(more),
            becomes: peer::Becomes::of(more.fate())?,
        })
    })
}
