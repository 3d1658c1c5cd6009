//! What waits in a unix socket's queue: packets (of a stream: bytes), with the
//! descriptors and credentials that travel along.
//!
//! A look into a stream does not show where in its bytes descriptors stand, only
//! where the bytes they came with end: they come back with the first byte that
//! was looked at together with them.
//!
//! Descriptors on their way are files like all others, found by looking into
//! the queues; what refers to them is sent again when every file can be made.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::sys::{self, Ancillary};
use super::{opts, urgent};
use crate::file::sys as file_sys;
use crate::image::schema::{ScmEntry, SkPacketEntry, SkUcredEntry};
use crate::image::{ImageError, ImageSource, Kind as ImageKind, get_reader, names};
use crate::sys::{SysError, SysResult};

/// The largest piece of a queue that is looked at in one go.
pub(super) const PIECE: usize = 1 << 20;
/// A kind of control message, `SkPacketEntry::scm`.
const RIGHTS: u32 = libc::SCM_RIGHTS as u32;

/// One packet that nobody has read yet.
#[derive(Debug, Default)]
pub(crate) struct Packet {
    pub data: Vec<u8>,
    /// Our duplicates of the descriptors it carries.
    pub files: Vec<OwnedFd>,
    /// Who sent it, where the receiver asked to be told.
    pub sender: Option<SkUcredEntry>,
    /// The name of the socket it was sent from.
    pub from: Option<Vec<u8>>,
    /// It is a single byte that was sent with MSG_OOB.
    pub urgent: bool,
}

/// The packets a socket has not read yet; none where they cannot be told: the
/// place of an urgent byte is not to be found out.
pub(crate) fn read(fd: BorrowedFd<'_>, kind: i32) -> SysResult<Option<Vec<Packet>>> {
    let urgent = match kind {
        libc::SOCK_STREAM => urgent::look(fd)?,
        _ => None,
    };
    let Some(byte) = urgent else {
        return with(fd, &[(libc::SO_PEEK_OFF, 0)], || walk(fd, kind)).map(Some);
    };
    // In line it shows among the others.
    let inline = [(libc::SO_OOBINLINE, 1), (libc::SO_PEEK_OFF, 0)];
    let packets = with(fd, &inline, || walk(fd, kind))?;
    // Where looks end for another reason than credentials.
    let plain = [
        (libc::SO_PASSCRED, 0),
        (SO_PASSPIDFD, 0),
        (libc::SO_PASSSEC, 0),
        (libc::SO_OOBINLINE, 1),
        (libc::SO_PEEK_OFF, 0),
    ];
    let pieces = with(fd, &plain, || walk(fd, kind))?;
    Ok(urgent::mark(packets, &pieces, byte, urgent::first(fd)?))
}

/// `SO_PASSPIDFD`, asm-generic/socket.h.
const SO_PASSPIDFD: i32 = 76;

/// Runs `f` while socket options have other values.
fn with<T>(
    fd: BorrowedFd<'_>,
    options: &[(i32, i32)],
    f: impl FnOnce() -> SysResult<T>,
) -> SysResult<T> {
    let sol = libc::SOL_SOCKET;
    let mut before = Vec::new();
    let mut set = Ok(());
    for &(name, value) in options {
        // Older kernels do not know all of them.
        let Ok(was) = file_sys::socket_option_int(fd, sol, name) else {
            continue;
        };
        if was != value {
            before.push((name, was));
            set = file_sys::set_socket_option(fd, sol, name, &value.to_ne_bytes());
        }
        if set.is_err() {
            break;
        }
    }
    let done = set.and_then(|()| f());
    // The look itself has moved the offset.
    for (name, was) in before {
        file_sys::set_socket_option(fd, sol, name, &was.to_ne_bytes())?;
    }
    done
}

fn walk(fd: BorrowedFd<'_>, kind: i32) -> SysResult<Vec<Packet>> {
    let mut packets = Vec::new();
    let mut buffer = vec![0; PIECE];
    loop {
        let Some(packet) = look(fd, &mut buffer)? else {
            break;
        };
        // Nothing is the end of a stream, but a packet may be empty.
        let empty = packet.data.is_empty();
        if empty && (kind == libc::SOCK_STREAM || file_sys::hung_up(fd)?) {
            break;
        }
        packets.push(packet);
    }
    Ok(packets)
}

fn look(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> SysResult<Option<Packet>> {
    match sys::peek(fd, buffer) {
        Ok(Some((len, about))) => Ok(Some(Packet {
            data: buffer[..len].to_vec(),
            files: about.files,
            sender: about.sender,
            from: about.from,
            urgent: false,
        })),
        Ok(None) => Ok(None),
        // Not connected, or its peer reset it: nothing is queued.
        Err(e) if matches!(e.errno, Errno::ENOTCONN | Errno::EINVAL | Errno::ECONNRESET) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// A packet as images have it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Queued {
    pub data: Vec<u8>,
    /// Ids of the files it carries.
    pub files: Vec<u32>,
    pub sender: Option<SkUcredEntry>,
    /// Id of the socket it was sent from, where that is not the other end.
    pub from: Option<u32>,
    /// It is a single byte that is sent with MSG_OOB.
    pub urgent: bool,
}

impl Queued {
    pub(crate) fn head(&self, ino: u32) -> SkPacketEntry {
        let rights = ScmEntry {
            r#type: RIGHTS,
            rights: self.files.clone(),
        };
        SkPacketEntry {
            id_for: ino,
            length: self.data.len() as u32,
            scm: if self.files.is_empty() {
                Vec::new()
            } else {
                vec![rights]
            },
            ucred: self.sender,
            from_id: self.from,
        }
    }

    /// Nothing but bytes, which can be sent at once.
    fn plain(&self) -> bool {
        self.files.is_empty() && self.sender.is_none() && self.from.is_none()
    }
}

/// Unread data by socket inode.
pub(crate) type Queues = BTreeMap<u32, Vec<Queued>>;

/// Reads the queues.
pub(crate) fn load(source: &dyn ImageSource) -> Result<Queues, ImageError> {
    let mut queues = Queues::new();
    let Some(mut reader) = get_reader(source, ImageKind::SkQueues, names::SK_QUEUES)? else {
        return Ok(queues);
    };
    while let Some(head) = reader.record::<SkPacketEntry>()? {
        let data = reader.payload(head.length.into())?.to_vec();
        let rights = head.scm.into_iter().filter(|s| s.r#type == RIGHTS);
        queues.entry(head.id_for).or_default().push(Queued {
            data,
            files: rights.flat_map(|s| s.rights).collect(),
            sender: head.ucred,
            from: head.from_id,
            urgent: false,
        });
    }
    Ok(queues)
}

/// Notes that the byte behind `at` others of a socket's queue is an urgent one.
pub(crate) fn mark_urgent(queues: &mut Queues, ino: u32, at: u64) {
    let mut left = at;
    for packet in queues.entry(ino).or_default() {
        if left == 0 && packet.data.len() == 1 {
            packet.urgent = true;
            return;
        }
        left = left.saturating_sub(packet.data.len() as u64);
    }
}

/// What is left to do for sockets that are made: packets that refer to other
/// files or to processes, and the shutting down that comes behind them.
#[derive(Debug, Default)]
pub(crate) struct Later {
    /// Through which socket, to which inode and id.
    pub sends: Vec<(OwnedFd, u32, u32)>,
    pub shutdowns: Vec<(OwnedFd, i32)>,
}

impl Later {
    /// Sends the queue of socket `id` through its peer, or notes it down.
    pub(crate) fn send(
        &mut self,
        (id, ino): (u32, u32),
        queues: &Queues,
        peer: BorrowedFd<'_>,
    ) -> SysResult<()> {
        let Some(packets) = queues.get(&ino) else {
            return Ok(());
        };
        if packets.iter().all(Queued::plain) {
            return with_room(peer, packets, |p| {
                let along = ancillary(Vec::new(), None, p.urgent);
                send(peer, &p.data, &along, None)
            });
        }
        self.sends.push((file_sys::dup(peer)?, ino, id));
        Ok(())
    }

    /// Whether packets are still to come for, or from, a pair of sockets.
    pub(crate) fn awaits(&self, ids: &[u32]) -> bool {
        self.sends.iter().any(|(_, _, id)| ids.contains(id))
    }
}

/// Runs `f` for packets while the socket they are sent through takes them all.
pub(crate) fn with_room(
    through: BorrowedFd<'_>,
    packets: &[Queued],
    f: impl FnMut(&Queued) -> SysResult<()>,
) -> SysResult<()> {
    let sol = libc::SOL_SOCKET;
    let before = file_sys::socket_option_int(through, sol, libc::SO_SNDBUF)?;
    let locked = file_sys::socket_option_int(through, sol, opts::SO_BUF_LOCK)?;
    let total: usize = packets.iter().map(|p| p.data.len() + 4096).sum();
    let force = |n: usize| {
        let n = i32::try_from(n).unwrap_or(i32::MAX / 2).to_ne_bytes();
        file_sys::set_socket_option(through, sol, libc::SO_SNDBUFFORCE, &n)
    };
    force(total.max(before as usize / 2))?;
    packets.iter().try_for_each(f)?;
    force(before as usize / 2)?;
    // The size is no more the user's choice than it was.
    file_sys::set_socket_option(through, sol, opts::SO_BUF_LOCK, &locked.to_ne_bytes())
}

/// Sends a packet, all of it. What goes along goes with its first byte.
pub(crate) fn send(
    through: BorrowedFd<'_>,
    data: &[u8],
    along: &Ancillary,
    to: Option<&[u8]>,
) -> SysResult<()> {
    let mut n = sys::send_with(through, data, along, to)?;
    while n < data.len() {
        let more = sys::send_with(through, &data[n..], &Ancillary::default(), to)?;
        if more == 0 {
            return Err(SysError::new("sendmsg", through.as_raw_fd(), Errno::EIO));
        }
        n += more;
    }
    Ok(())
}

/// What goes along with a packet.
pub(crate) fn ancillary(
    files: Vec<OwnedFd>,
    sender: Option<SkUcredEntry>,
    urgent: bool,
) -> Ancillary {
    Ancillary {
        files,
        sender,
        urgent,
        ..Ancillary::default()
    }
}
