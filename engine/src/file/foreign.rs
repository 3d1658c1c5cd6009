//! Files of dumps that CRIU made: what our own records would say, from the
//! common ones.

use std::collections::BTreeMap;

use super::FileBuilder;
use super::record::{Fate, RcrFile, RcrSocket, RcrSocketOption};
use crate::image::schema::{
    EventpollFileEntry, FdinfoEntry, FileEntry, InetSkEntry, SkOptsEntry, UnixSkEntry,
};
use crate::socket::unix::LISTEN;

/// `TCP_ESTABLISHED` of the kernel, which unix sockets use too.
const ESTABLISHED: u32 = 1;
const LOCKED_SEND: u32 = 1;
const LOCKED_RECEIVE: u32 = 2;

impl FileBuilder<'_> {
    /// Fills in what the common images do not say outright. `tables` are the
    /// descriptor tables of all tasks, parents before children.
    pub fn derive_records<'t>(&mut self, tables: impl Iterator<Item = (i32, &'t [FdinfoEntry])>) {
        let mut sockets = BTreeMap::new();
        let mut listeners = BTreeMap::new();
        for usk in self.entries.values().filter_map(|e| e.usk.as_ref()) {
            sockets.insert(usk.ino, usk.id);
            if usk.state == LISTEN {
                listeners.insert(usk.name.clone(), usk.id);
            }
        }
        for (pid, table) in tables {
            for slot in table {
                let Some(entry) = self.entries.get(&slot.id) else {
                    continue;
                };
                if self.extras.contains_key(&slot.id) {
                    continue;
                }
                let socket = match entry.as_ref() {
                    FileEntry { usk: Some(u), .. } => Some(unix(u, &sockets, &listeners)),
                    FileEntry { isk: Some(i), .. } => Some(inet(i)),
                    _ => None,
                };
                let watched = entry.epfd.as_ref().map(|e| targets(e, table));
                let path = entry.fifo.and_then(|f| f.regf_id);
                let path = path.and_then(|id| self.entries.get(&id)?.reg.as_ref());
                let extra = RcrFile {
                    id: slot.id,
                    late_pid: Some(pid),
                    late_fd: Some(slot.fd),
                    fifo_flags: path.map(|r| r.flags),
                    fifo_fown: path.map(|r| r.fown),
                    epoll_targets: watched.unwrap_or_default(),
                    socket: socket.map(Box::new),
                    ..RcrFile::default()
                };
                self.extras.insert(slot.id, std::rc::Rc::new(extra));
            }
        }
    }
}

/// What the numbers that were watched stand for. Empty where one is not there:
/// then each is looked up when it is added.
fn targets(e: &EventpollFileEntry, table: &[FdinfoEntry]) -> Vec<u32> {
    let id = |fd| table.iter().find(|t| t.fd == fd).map(|t| t.id);
    let all: Option<Vec<u32>> = e.tfd.iter().map(|w| id(w.tfd)).collect();
    all.unwrap_or_default()
}

fn unix(
    u: &UnixSkEntry,
    sockets: &BTreeMap<u32, u32>,
    listeners: &BTreeMap<Vec<u8>, u32>,
) -> RcrSocket {
    let peer_id = sockets.get(&u.peer).copied();
    let stream = u.r#type != libc::SOCK_DGRAM as u32;
    let alone = stream && u.state == ESTABLISHED && peer_id.is_none();
    let address = |name: &[u8]| {
        let family = (libc::AF_UNIX as u16).to_ne_bytes();
        [&family[..], name].concat()
    };
    let accepted_by = (stream && u.state != LISTEN && !u.name.is_empty())
        .then(|| listeners.get(&u.name).copied())
        .flatten();
    let path = (!u.name.is_empty() && u.name[0] != 0).then(|| {
        let name = u.name.strip_suffix(&[0]).unwrap_or(&u.name);
        let name = String::from_utf8_lossy(name);
        match &u.name_dir {
            Some(dir) if !name.starts_with('/') => format!("{}/{name}", dir.trim_end_matches('/')),
            _ => name.into_owned(),
        }
    });
    RcrSocket {
        local: (!u.name.is_empty()).then(|| address(&u.name)),
        options: options(&u.opts),
        fate: Some(if alone { Fate::Closed } else { Fate::Kept } as i32),
        path,
        peer_id,
        accepted_by,
        ..RcrSocket::default()
    }
}

fn inet(i: &InetSkEntry) -> RcrSocket {
    let address = |words: &[u32], port: u32| {
        let mut a = (i.family as u16).to_ne_bytes().to_vec();
        a.extend_from_slice(&(port as u16).to_be_bytes());
        let words: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        if i.family == libc::AF_INET6 as u32 {
            a.extend_from_slice(&[0; 4]);
            a.extend_from_slice(&words);
            a.extend_from_slice(&[0; 4]);
        } else {
            a.extend_from_slice(&words);
            a.extend_from_slice(&[0; 8]);
        }
        a
    };
    let named = |words: &[u32], port: u32| port != 0 || words.iter().any(|&w| w != 0);
    let mut options = options(&i.opts);
    let mut set = |level, name, value: Option<u32>| {
        options.extend(value.map(|v| RcrSocketOption {
            level,
            name,
            value: v.to_ne_bytes().into(),
        }));
    };
    if let Some(t) = &i.tcp_opts {
        let tcp = libc::IPPROTO_TCP;
        set(tcp, libc::TCP_NODELAY, t.nodelay.map(u32::from));
        set(tcp, libc::TCP_CORK, t.cork.map(u32::from));
        set(tcp, libc::TCP_KEEPCNT, t.keepcnt);
        set(tcp, libc::TCP_KEEPIDLE, t.keepidle);
        set(tcp, libc::TCP_KEEPINTVL, t.keepintvl);
    }
    if i.family == libc::AF_INET6 as u32 {
        let only = i.v6only.map(u32::from);
        set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, only);
    }
    RcrSocket {
        local: named(&i.src_addr, i.src_port).then(|| address(&i.src_addr, i.src_port)),
        peer: named(&i.dst_addr, i.dst_port).then(|| address(&i.dst_addr, i.dst_port)),
        options,
        fate: Some(Fate::Kept as i32),
        uid: i.uid,
        ..RcrSocket::default()
    }
}

/// The options that were recorded, in the form that sets them.
fn options(e: &SkOptsEntry) -> Vec<RcrSocketOption> {
    let mut all = Vec::new();
    let mut set = |name, value: Vec<u8>| {
        all.push(RcrSocketOption {
            level: libc::SOL_SOCKET,
            name,
            value,
        });
    };
    let flags = [
        (libc::SO_REUSEADDR, e.reuseaddr),
        (libc::SO_REUSEPORT, e.so_reuseport),
        (libc::SO_PASSCRED, e.so_passcred),
        (libc::SO_PASSSEC, e.so_passsec),
        (libc::SO_DONTROUTE, e.so_dontroute),
        (libc::SO_NO_CHECK, e.so_no_check),
        (libc::SO_BROADCAST, e.so_broadcast),
        (libc::SO_KEEPALIVE, e.so_keepalive),
        (libc::SO_OOBINLINE, e.so_oobinline.map(|v| v != 0)),
    ];
    for (name, _) in flags.iter().filter(|(_, on)| *on == Some(true)) {
        set(*name, 1i32.to_ne_bytes().into());
    }
    let numbers = [
        (libc::SO_PRIORITY, e.so_priority),
        (libc::SO_MARK, e.so_mark),
    ];
    for (name, value) in numbers {
        if let Some(v) = value.filter(|&v| v != 0) {
            set(name, v.to_ne_bytes().into());
        }
    }
    if let Some(v) = e.so_rcvlowat.filter(|&v| v != 1) {
        set(libc::SO_RCVLOWAT, v.to_ne_bytes().into());
    }
    // Without the mark, the sizes are what the kernel gave.
    let locked = e.so_buf_lock.unwrap_or(0);
    for (bit, name, size) in [
        (LOCKED_SEND, libc::SO_SNDBUFFORCE, e.so_sndbuf),
        (LOCKED_RECEIVE, libc::SO_RCVBUFFORCE, e.so_rcvbuf),
    ] {
        if locked & bit != 0 {
            set(name, (size / 2).to_ne_bytes().into());
        }
    }
    for (name, sec, usec) in [
        (libc::SO_SNDTIMEO, e.so_snd_tmo_sec, e.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, e.so_rcv_tmo_sec, e.so_rcv_tmo_usec),
    ] {
        if (sec, usec) != (0, 0) {
            set(name, [sec.to_ne_bytes(), usec.to_ne_bytes()].concat());
        }
    }
    if let Some(dev) = e.so_bound_dev.as_ref().filter(|d| !d.is_empty()) {
        set(libc::SO_BINDTODEVICE, dev.as_bytes().to_vec());
    }
    if let Some(seconds) = e.so_linger {
        set(
            libc::SO_LINGER,
            [1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat(),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sock(ino: u32, peer: u32, name: &[u8], state: u32) -> UnixSkEntry {
        UnixSkEntry {
            id: ino * 10,
            ino,
            peer,
            state,
            r#type: libc::SOCK_STREAM as u32,
            name: name.to_vec(),
            ..UnixSkEntry::default()
        }
    }

    #[test]
    fn pairs_find_each_other_and_their_listener() {
        let sockets = BTreeMap::from([(1, 10), (2, 20), (3, 30)]);
        let listeners = BTreeMap::from([(b"/run/s\0".to_vec(), 30)]);
        let client = unix(&sock(1, 2, b"", ESTABLISHED), &sockets, &listeners);
        assert_eq!((client.peer_id, client.accepted_by), (Some(20), None));
        let server = unix(&sock(2, 1, b"/run/s\0", ESTABLISHED), &sockets, &listeners);
        assert_eq!((server.peer_id, server.accepted_by), (Some(10), Some(30)));
        assert_eq!(server.path.as_deref(), Some("/run/s"));
        let listener = unix(&sock(3, 0, b"/run/s\0", LISTEN), &sockets, &listeners);
        assert_eq!((listener.fate(), listener.accepted_by), (Fate::Kept, None));
        let left = unix(&sock(4, 9, b"", ESTABLISHED), &sockets, &listeners);
        assert_eq!(left.fate(), Fate::Closed);
    }

    #[test]
    fn an_address_is_put_together() {
        let entry = InetSkEntry {
            family: libc::AF_INET as u32,
            src_addr: vec![u32::from_ne_bytes([127, 0, 0, 1])],
            src_port: 6379,
            dst_addr: vec![0],
            ..InetSkEntry::default()
        };
        let more = inet(&entry);
        let local = more.local.unwrap();
        assert_eq!(&local[2..8], [0x18, 0xeb, 127, 0, 0, 1]);
        assert_eq!((local.len(), more.peer), (16, None));
    }
}
