//! The restoring half: sockets that take up a connection where it was left.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::super::footing::Footing;
use super::super::inet::address;
use super::super::lock::{self, Ends};
use super::super::sys::{bytes_unacknowledged, bytes_unsent};
use super::super::{opts, set_owner};
use super::segment::{self, ACK, FIN, Segment};
use super::*;
use crate::ext::{self, RcrNetwork};
use crate::file::error::BuildError;
use crate::file::record::{RcrFile, RcrSocket, RcrSocketOption};
use crate::image::schema::{InetSkEntry, SkShutdown, TcpStreamEntry};
use crate::image::{ImageError, ImageSource, Kind, get_reader, get_records, names};

/// The most that one queue may hold; the kernel's own bounds are far below.
const QUEUE_BYTES_MAX: u32 = 1 << 30;
/// How long the kernel may take to look at a segment that we hand it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections that stand but do not speak yet.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    lock: Option<String>,
    footing: Option<Footing>,
    waiting: Vec<Waiting>,
}

/// What is left to do for one of them.
#[derive(Debug)]
struct Waiting {
    fd: OwnedFd,
    state: u32,
    peer: Vec<u8>,
    /// What was never sent.
    unsent: Vec<u8>,
    /// Options that repair mode or a full send queue would spoil.
    last: Vec<RcrSocketOption>,
    /// Our side was shut down behind data never sent.
    shut_down: bool,
    /// What comes is not wanted (`SHUT_RD`).
    deaf: bool,
}

impl Connections {
    /// Reads which lock was left.
    pub(crate) fn load(source: &dyn ImageSource) -> Result<Self, ImageError> {
        let mut all: Vec<RcrNetwork> = get_records(source, Kind::RcrNetwork, ext::NETWORK)?;
        Ok(Self {
            lock: all.pop().and_then(|n| n.lock),
            footing: None,
            waiting: Vec::new(),
        })
    }

    /// Makes the socket of a connection; it speaks after [`finish`](Self::finish).
    pub(crate) fn make(
        &mut self,
        isk: &InetSkEntry,
        extra: Option<&RcrFile>,
        source: &dyn ImageSource,
    ) -> Result<OwnedFd, BuildError> {
        let (waiting, fd) = one(isk, extra, source)?;
        self.waiting.push(waiting);
        Ok(fd)
    }

    /// Makes connections possible where no network is up: to be called before
    /// the first is made. The lock that was left has gone with the old kernel, so
    /// one like it takes its place.
    pub(crate) fn without_network<'e>(
        &mut self,
        sockets: impl Iterator<Item = (&'e InetSkEntry, Option<&'e RcrFile>)>,
    ) -> SysResult<()> {
        let mut ends = Vec::new();
        let mut peers = false;
        for (isk, extra) in sockets {
            let (local, peer) = addresses(isk, extra);
            peers |= extra
                .and_then(|e| e.socket.as_ref())
                .is_some_and(|s| s.peer.is_some());
            if isk.proto == libc::IPPROTO_TCP as u32 && goes_on(isk.state) {
                peers = true;
                ends.extend(Ends::of(&local, &peer));
            }
        }
        if !peers {
            return Ok(());
        }
        if !ends.is_empty() {
            let name = self.lock.get_or_insert_with(lock::fresh_name);
            lock::remove(None, name)?;
            lock::leave(None, name, &ends)?;
        }
        self.footing = Some(Footing::raise()?);
        Ok(())
    }

    /// All are made: the network is as it was found.
    pub(crate) fn made(&mut self) -> SysResult<()> {
        self.footing.take().map_or(Ok(()), Footing::lower)
    }

    /// Lets all connections speak; to be called when everything stands.
    pub(crate) fn finish(self) -> SysResult<()> {
        if let Some(name) = &self.lock {
            lock::remove(None, name)?;
        }
        for w in &self.waiting {
            w.finish()?;
        }
        Ok(())
    }
}

impl Waiting {
    fn finish(&self) -> SysResult<()> {
        let fd = self.fd.as_fd();
        if self.state == SYN_SENT {
            let flags = sys::status_flags(fd)?;
            sys::set_status_flags(fd, flags | libc::O_NONBLOCK)?;
            match sys::connect(fd, &self.peer) {
                // A refusal just now is for the program to find.
                Err(e) if e.errno == Errno::EINPROGRESS => {}
                Err(e) => tracing::debug!("connect: {e}"),
                Ok(()) => {}
            }
            return sys::set_status_flags(fd, flags);
        }
        set(fd, TCP_REPAIR_QUEUE, 0)?;
        repair(fd, REPAIR_OFF)?;
        send_all(fd, &self.unsent)?;
        for o in &self.last {
            sys::set_socket_option(fd, o.level, o.name, &o.value)?;
        }
        if self.shut_down {
            sys::shutdown(fd, libc::SHUT_WR)?;
        }
        if self.deaf {
            sys::shutdown(fd, libc::SHUT_RD)?;
        }
        Ok(())
    }
}

fn send_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> SysResult<()> {
    while !bytes.is_empty() {
        let n = sys::send(fd, bytes)?;
        bytes = &bytes[n..];
    }
    Ok(())
}

/// Options that have their turn at the very end.
fn is_late(o: &RcrSocketOption) -> bool {
    let reuse = (o.level, o.name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    let push =
        o.level == libc::IPPROTO_TCP && [libc::TCP_NODELAY, libc::TCP_CORK].contains(&o.name);
    reuse || push
}

/// Options that ask for something at connect(2), which is behind us.
fn is_past(o: &RcrSocketOption) -> bool {
    o.level == libc::IPPROTO_TCP && o.name == libc::TCP_FASTOPEN_CONNECT
}

fn int(level: i32, name: i32, value: i32) -> RcrSocketOption {
    RcrSocketOption {
        level,
        name,
        value: value.to_ne_bytes().into(),
    }
}

/// Both ends as raw socket addresses: our own records have them whole, those of
/// others in parts.
fn addresses(isk: &InetSkEntry, extra: Option<&RcrFile>) -> (Vec<u8>, Vec<u8>) {
    let more = extra.and_then(|e| e.socket.as_ref());
    let whole = |raw: Option<&Vec<u8>>, words: &[u32], port| {
        raw.cloned()
            .unwrap_or_else(|| address(isk.family, words, port))
    };
    let local = more.and_then(|s| s.local.as_ref());
    let peer = more.and_then(|s| s.peer.as_ref());
    (
        whole(local, &isk.src_addr, isk.src_port),
        whole(peer, &isk.dst_addr, isk.dst_port),
    )
}

fn one(
    isk: &InetSkEntry,
    extra: Option<&RcrFile>,
    source: &dyn ImageSource,
) -> Result<(Waiting, OwnedFd), BuildError> {
    let none = RcrSocket::default();
    let more = extra.and_then(|e| e.socket.as_deref()).unwrap_or(&none);
    let (local, peer) = addresses(isk, extra);
    let made = sys::socket(isk.family as i32, isk.r#type as i32, isk.proto as i32)?;
    let fd = made.as_fd();
    let mut last: Vec<_> = more
        .options
        .iter()
        .filter(|o| is_late(o))
        .cloned()
        .collect();
    let now = more.options.iter().filter(|o| !is_late(o) && !is_past(o));
    let now: Vec<_> = now.cloned().collect();
    opts::restore(fd, &now, &isk.opts)?;
    set_owner(fd, more.uid, more.gid)?;
    if extra.is_none() && isk.opts.reuseaddr == Some(true) {
        last.push(int(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1));
    }
    // In repair mode a port may be shared with whoever has it.
    repair(fd, REPAIR_ON)?;
    super::super::inet::bind_anyway(fd, isk, &local)?;
    let waiting = |unsent, last, shut_down| -> SysResult<Waiting> {
        Ok(Waiting {
            fd: sys::dup(fd)?,
            state: isk.state,
            peer: peer.clone(),
            unsent,
            last,
            shut_down,
            deaf: isk.shutdown == Some(SkShutdown::Read.into()),
        })
    };
    if isk.state == SYN_SENT {
        repair(fd, REPAIR_OFF_SILENT)?;
        for o in &last {
            sys::set_socket_option(fd, o.level, o.name, &o.value)?;
        }
        return Ok((waiting(Vec::new(), Vec::new(), false)?, made));
    }
    let image = names::tcp_stream(isk.ino);
    let lost = || BuildError::Images(format!("{image} is missing or short"));
    let wrap = |e: ImageError| BuildError::Images(e.to_string());
    let mut reader = get_reader(source, Kind::TcpStream, &image)
        .map_err(wrap)?
        .ok_or_else(lost)?;
    let entry: TcpStreamEntry = reader.record().map_err(wrap)?.ok_or_else(lost)?;
    if entry.inq_len.max(entry.outq_len) > QUEUE_BYTES_MAX {
        return Err(BuildError::Images(format!("{image}: queues too long")));
    }
    let received = reader.payload(entry.inq_len.into()).map_err(wrap)?.to_vec();
    let to_send = reader
        .payload(entry.outq_len.into())
        .map_err(wrap)?
        .to_vec();
    // Behind their FIN only a FIN of ours that counts as sent leads to CLOSING.
    let unsent = match isk.state {
        CLOSING => 0,
        _ => entry.unsq_len.unwrap_or(0),
    };
    let sent = to_send
        .len()
        .checked_sub(unsent as usize)
        .ok_or_else(lost)?;
    let sizes = Sizes::enough(fd, isk, &received, &to_send)?;

    let base = |seq: u32, len: u32, fin: bool| seq.wrapping_sub(u32::from(fin)).wrapping_sub(len);
    let fin_late = fin_pending(isk.state) && unsent > 0;
    set(fd, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    let first = base(entry.inq_seq, entry.inq_len, fin_theirs(isk.state));
    set(fd, TCP_QUEUE_SEQ, first as i32)?;
    set(fd, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let first = base(entry.outq_seq, entry.outq_len, fin_ours(isk.state));
    set(fd, TCP_QUEUE_SEQ, first as i32)?;
    set(fd, TCP_REPAIR_QUEUE, 0)?;
    sys::connect(fd, &peer)?;
    negotiated(fd, &entry)?;
    set(fd, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    send_all(fd, &received)?;
    set(fd, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    send_all(fd, &to_send[..sent])?;
    let ends = Ends::of(&local, &peer).ok_or_else(lost)?;
    reach_state(fd, isk.state, &entry, fin_late, (&ends, &local))?;
    windows(fd, &entry)?;
    verify(fd, &entry, unsent, fin_late)?;
    // Their last words come before what shapes how later ones are sent.
    last.splice(0..0, sizes.as_they_were);
    let queue = to_send[sent..].to_vec();
    Ok((waiting(queue, last, fin_late)?, made))
}

/// What both sides agreed upon when the connection was made.
fn negotiated(fd: BorrowedFd<'_>, entry: &TcpStreamEntry) -> SysResult<()> {
    // TCPOPT_MAXSEG, TCPOPT_WINDOW, TCPOPT_SACK_PERM, TCPOPT_TIMESTAMP: net/tcp.h
    let mut options = vec![(2u32, entry.mss_clamp)];
    if entry.opt_mask & WINDOW_SCALE != 0 {
        let both = entry.snd_wscale | entry.rcv_wscale.unwrap_or(0) << 16;
        options.push((3, both));
    }
    if entry.opt_mask & SACK != 0 {
        options.push((4, 0));
    }
    if entry.opt_mask & TIMESTAMPS != 0 {
        options.push((8, 0));
    }
    let bytes: Vec<u8> = options
        .iter()
        .flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()].concat())
        .collect();
    sys::set_socket_option(fd, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &bytes)?;
    match entry.timestamp {
        Some(t) if entry.opt_mask & TIMESTAMPS != 0 => set(fd, libc::TCP_TIMESTAMP, t as i32),
        _ => Ok(()),
    }
}

/// From ESTABLISHED to where it was.
fn reach_state(
    fd: BorrowedFd<'_>,
    state: u32,
    entry: &TcpStreamEntry,
    fin_late: bool,
    (ends, local): (&Ends, &[u8]),
) -> SysResult<()> {
    let window = (entry.snd_wnd.unwrap_or(0) >> entry.snd_wscale.min(14)).min(0xffff) as u16;
    let mut acknowledged = entry.outq_seq.wrapping_sub(entry.outq_len);
    if fin_ours(state) {
        // Without our FIN, and with it where the peer has it.
        acknowledged = acknowledged.wrapping_sub(1);
    }
    let theirs = Segment {
        sequence: entry.inq_seq.wrapping_sub(1),
        acknowledged,
        flags: FIN | ACK,
        window,
    };
    let arrives = |s: Segment, wanted: u32| -> SysResult<()> {
        s.arrive(ends, local)?;
        let end = Instant::now() + PATIENCE;
        loop {
            let is = info(fd)?.0;
            if is == wanted {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(segment::not_reached(wanted, is));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    match state {
        CLOSE_WAIT => arrives(theirs, CLOSE_WAIT),
        FIN_WAIT1 if fin_late => Ok(()),
        FIN_WAIT1 => sys::shutdown(fd, libc::SHUT_WR),
        FIN_WAIT2 => {
            sys::shutdown(fd, libc::SHUT_WR)?;
            let ours = Segment {
                sequence: entry.inq_seq,
                acknowledged: entry.outq_seq,
                flags: ACK,
                window,
            };
            arrives(ours, FIN_WAIT2)
        }
        CLOSING => {
            sys::shutdown(fd, libc::SHUT_WR)?;
            arrives(theirs, CLOSING)
        }
        LAST_ACK => {
            arrives(theirs, CLOSE_WAIT)?;
            if fin_late {
                return Ok(());
            }
            sys::shutdown(fd, libc::SHUT_WR)
        }
        _ => Ok(()),
    }
}

fn windows(fd: BorrowedFd<'_>, entry: &TcpStreamEntry) -> SysResult<()> {
    let (Some(wl1), Some(send), Some(receive), Some(wup)) =
        (entry.snd_wl1, entry.snd_wnd, entry.rcv_wnd, entry.rcv_wup)
    else {
        // Images of old do not have them.
        return Ok(());
    };
    // The segment size was worked out while the kernel still took the peer's for
    // the least there is. It does so again when the peer's window exceeds the
    // largest seen, as the answer to the probe at the end will say.
    let send = send.saturating_sub(1);
    let bytes: Vec<u8> = [wl1, send, send, receive, wup]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    sys::set_socket_option(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &bytes)
}

/// Numbers that are off by one would only show when the peer speaks.
fn verify(
    fd: BorrowedFd<'_>,
    entry: &TcpStreamEntry,
    left: u32,
    fin_late: bool,
) -> Result<(), BuildError> {
    let state = info(fd)?.0;
    let fin = u32::from(fin_pending(state));
    let same = |what: &str, was: u32, is: u32| {
        if was == is {
            return Ok(());
        }
        Err(BuildError::Changed {
            what: format!("{what} of a connection"),
            was: was.to_string(),
            is: is.to_string(),
        })
    };
    same(
        "bytes received",
        entry.inq_len,
        sys::bytes_waiting(fd)? as u32,
    )?;
    let out = bytes_unacknowledged(fd)?.saturating_sub(fin);
    same("bytes under way", entry.outq_len - left, out)?;
    same("bytes unsent", 0, bytes_unsent(fd)?)?;
    set(fd, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    same("receive sequence", entry.inq_seq, get(fd, TCP_QUEUE_SEQ)?)?;
    set(fd, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let ahead = left + u32::from(fin_late);
    let sequence = get(fd, TCP_QUEUE_SEQ)?.wrapping_add(ahead);
    same("send sequence", entry.outq_seq, sequence)?;
    Ok(())
}

/// Buffer sizes.
struct Sizes {
    as_they_were: Vec<RcrSocketOption>,
}

impl Sizes {
    /// Makes room for both queues.
    fn enough(
        fd: BorrowedFd<'_>,
        isk: &InetSkEntry,
        received: &[u8],
        to_send: &[u8],
    ) -> SysResult<Self> {
        let level = libc::SOL_SOCKET;
        let mut as_they_were = Vec::new();
        let sides = [
            (libc::SO_SNDBUFFORCE, isk.opts.so_sndbuf, to_send.len()),
            (libc::SO_RCVBUFFORCE, isk.opts.so_rcvbuf, received.len()),
        ];
        for (force, was, queued) in sides {
            // The kernel doubles what is set, and counts its own overhead.
            let half = i32::try_from(was / 2).unwrap_or(i32::MAX / 2);
            let room = i32::try_from(queued * 4 + (1 << 20)).unwrap_or(i32::MAX / 2);
            let set = int(level, force, room.max(half));
            sys::set_socket_option(fd, set.level, set.name, &set.value)?;
            as_they_were.push(int(level, force, half));
        }
        // Whether a size is the program's choice, or the kernel's that it may change.
        let lock = isk.opts.so_buf_lock.unwrap_or(0) as i32;
        as_they_were.push(int(level, opts::SO_BUF_LOCK, lock));
        Ok(Self { as_they_were })
    }
}
