//! The saving half: the lock, and what a connection consists of.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::super::inet::address;
use super::super::lock::{self, Ends, Lock};
use super::super::sys::{bytes_unacknowledged, bytes_unsent, receive_with};
use super::*;
use crate::file::error::{Stop, refuse};
use crate::file::examined::Saved;
use crate::file::identity::Descriptions;
use crate::file::record::Fate;
use crate::image::schema::{InetSkEntry, TcpStreamEntry};
use crate::image::{ImageError, ImageSink, ImageWriter, Kind, names, put_image};
use crate::sys::SysError;

/// What one connection is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stream {
    ino: u32,
    entry: TcpStreamEntry,
    received: Vec<u8>,
    to_send: Vec<u8>,
}

impl Stream {
    pub(crate) fn put(&self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        let mut image = ImageWriter::new(Kind::TcpStream);
        image
            .record(&self.entry)
            .payload(&self.received)
            .payload(&self.to_send);
        put_image(sink, &names::tcp_stream(self.ino), &image.finish())
    }
}

/// Connections of a frozen tree whose packets are locked out. Dropping it lets
/// them flow again.
#[derive(Debug, Default)]
pub(crate) struct Held {
    name: String,
    locked: Vec<(Option<OwnedFd>, Vec<Ends>, Option<Lock>)>,
    sockets: Vec<OwnedFd>,
}

impl Held {
    /// Name of the lock that stays when the tree is killed.
    pub(crate) fn lock_name(&self) -> Option<&str> {
        (!self.locked.is_empty()).then_some(&self.name)
    }

    /// To be called right before the tree is killed: its connections will end
    /// without a word, and what comes for them gets no answer. Hold on to the
    /// value until the tree is gone.
    pub(crate) fn silence(&mut self) -> SysResult<()> {
        for (netns, ends, lock) in &mut self.locked {
            lock::leave(netns.as_ref().map(OwnedFd::as_fd), &self.name, ends)?;
            *lock = None;
        }
        for fd in &self.sockets {
            repair(fd.as_fd(), REPAIR_ON)?;
        }
        Ok(())
    }
}

/// What there is to know about the connections of a tree.
type Settled = (Vec<(u32, Stop)>, Vec<Stream>, Held);

/// Reads all connections that go on; their packets are locked out from here on.
pub(crate) fn settle(
    files: &BTreeMap<u32, Saved>,
    descriptions: &Descriptions,
) -> SysResult<Settled> {
    let mut held = Held {
        name: lock::fresh_name(),
        ..Held::default()
    };
    let going_on = |s: &Saved| {
        let isk = s.entry.isk.as_ref()?;
        let kept = s.extra.socket.as_ref()?.fate() == Fate::Kept;
        let tcp = isk.proto == libc::IPPROTO_TCP as u32;
        (kept && tcp && goes_on(isk.state)).then(|| isk.as_ref().clone())
    };
    let connections: Vec<InetSkEntry> = files.values().filter_map(going_on).collect();
    for isk in &connections {
        let Some(h) = descriptions.get(isk.id) else {
            continue;
        };
        held.lock_out(isk, h.fd.as_fd())?;
        held.sockets.push(sys::dup(&h.fd)?);
    }
    let mut name = held.name.clone();
    name.push_str("-dump");
    for (netns, ends, lock) in &mut held.locked {
        *lock = Some(Lock::take(netns.as_ref().map(OwnedFd::as_fd), &name, ends)?);
    }
    let (mut refusals, mut streams) = (Vec::new(), Vec::new());
    for (isk, fd) in connections.iter().zip(&held.sockets) {
        if isk.state == SYN_SENT {
            continue;
        }
        match read(isk, fd.as_fd()) {
            Ok(stream) => streams.push(stream),
            Err(Stop::Sys(e)) => return Err(e),
            Err(stop) => refusals.push((isk.id, stop)),
        }
    }
    Ok((refusals, streams, held))
}

impl Held {
    fn lock_out(&mut self, isk: &InetSkEntry, fd: BorrowedFd<'_>) -> SysResult<()> {
        let (local, peer) = (
            address(isk.family, &isk.src_addr, isk.src_port),
            address(isk.family, &isk.dst_addr, isk.dst_port),
        );
        let ends = Ends::of(&local, &peer)
            .ok_or_else(|| SysError::new("connection", sys::show_address(&peer), Errno::EINVAL))?;
        let netns = lock::netns_of(fd)?;
        let id = |n: &Option<OwnedFd>| -> SysResult<Option<u64>> {
            let stat = n.as_ref().map(nix::sys::stat::fstat).transpose();
            let stat = stat.map_err(|e| SysError::new("fstat", "network namespace", e))?;
            Ok(stat.map(|s| s.st_ino))
        };
        let wanted = id(&netns)?;
        for (there, all, _) in &mut self.locked {
            if id(there)? == wanted {
                all.push(ends);
                return Ok(());
            }
        }
        self.locked.push((netns, vec![ends], None));
        Ok(())
    }
}

/// A socket in repair mode. Turning that off forgets about address reuse.
struct Repaired<'a> {
    fd: BorrowedFd<'a>,
    reuse: i32,
    peek_offset: i32,
}

impl<'a> Repaired<'a> {
    fn new(fd: BorrowedFd<'a>) -> SysResult<Self> {
        let option = |name| sys::socket_option_int(fd, libc::SOL_SOCKET, name);
        let me = Self {
            fd,
            reuse: option(libc::SO_REUSEADDR)?,
            peek_offset: option(libc::SO_PEEK_OFF)?,
        };
        repair(fd, REPAIR_ON)?;
        Ok(me)
    }
}

impl Drop for Repaired<'_> {
    fn drop(&mut self) {
        let again = |name, value: i32| {
            sys::set_socket_option(self.fd, libc::SOL_SOCKET, name, &value.to_ne_bytes())
        };
        let undone = set(self.fd, TCP_REPAIR_QUEUE, 0)
            .and_then(|()| repair(self.fd, REPAIR_OFF_SILENT))
            .and_then(|()| again(libc::SO_REUSEADDR, self.reuse))
            .and_then(|()| again(libc::SO_PEEK_OFF, self.peek_offset));
        if let Err(e) = undone {
            tracing::error!(fd = self.fd.as_raw_fd(), "repair mode: {e}");
        }
    }
}

fn read(isk: &InetSkEntry, fd: BorrowedFd<'_>) -> Result<Stream, Stop> {
    let repaired = Repaired::new(fd)?;
    let off = (-1i32).to_ne_bytes();
    if repaired.peek_offset >= 0 {
        sys::set_socket_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &off)?;
    }
    let (state, options, snd_wscale, rcv_wscale) = info(fd)?;
    if state != isk.state {
        return refuse(
            "TCP connection",
            "it changed its state while it was looked at",
            "try again",
        );
    }
    let waiting = sys::bytes_waiting(fd)?;
    let fin = u32::from(fin_pending(state));
    let unacknowledged = bytes_unacknowledged(fd)?.saturating_sub(fin);
    let unsent = bytes_unsent(fd)?.saturating_sub(fin);
    let queue = |which: i32, len: usize| -> SysResult<(u32, Vec<u8>)> {
        set(fd, TCP_REPAIR_QUEUE, which)?;
        let sequence = get(fd, TCP_QUEUE_SEQ)?;
        let mut bytes = vec![0; len];
        let mut n = 0;
        if len > 0 {
            n = receive_with(fd, &mut bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
        }
        if n != len {
            let on = format!("queue {which}: {n} of {len} bytes");
            return Err(SysError::new("recv", on, Errno::EIO));
        }
        Ok((sequence, bytes))
    };
    let (inq_seq, received) = queue(RECEIVE_QUEUE, waiting)?;
    let (outq_seq, to_send) = queue(SEND_QUEUE, unacknowledged as usize)?;
    let window = sys::socket_option(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, 20)?;
    let word = |i: usize| {
        let bytes = window.get(4 * i..4 * i + 4);
        bytes.map(|b| u32::from_ne_bytes(b.try_into().expect("4")))
    };
    let option = |name| sys::socket_option_int(fd, libc::IPPROTO_TCP, name).map(|v| v != 0);
    let timestamps = options & TIMESTAMPS != 0;
    let entry = TcpStreamEntry {
        inq_len: received.len() as u32,
        inq_seq,
        outq_len: to_send.len() as u32,
        outq_seq,
        opt_mask: options & (TIMESTAMPS | SACK | WINDOW_SCALE),
        snd_wscale,
        mss_clamp: get(fd, libc::TCP_MAXSEG)?,
        rcv_wscale: Some(rcv_wscale),
        timestamp: timestamps
            .then(|| get(fd, libc::TCP_TIMESTAMP))
            .transpose()?,
        cork: Some(option(libc::TCP_CORK)?),
        nodelay: Some(option(libc::TCP_NODELAY)?),
        unsq_len: Some(unsent),
        snd_wl1: word(0),
        snd_wnd: word(1),
        max_window: word(2),
        rcv_wnd: word(3),
        rcv_wup: word(4),
    };
    Ok(Stream {
        ino: isk.ino,
        entry,
        received,
        to_send,
    })
}
