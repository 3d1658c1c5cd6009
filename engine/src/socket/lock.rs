//! The network lock: packets of connections that are on their way are dropped,
//! so that no end sees anything but silence.
//!
//! It is a table of nftables with one set of connections for each IP version,
//! looked up on the way in and on the way out. While a tree is dumped the table
//! is owned by our netlink socket and vanishes with it, however we end. When the
//! tree is killed, a table without an owner takes its place; whoever restores
//! the tree removes it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use super::wire::{self, Messages, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};
use crate::file::sys;
use crate::sys::{SysError, SysResult};

/// Packets of ours that pass the lock carry this mark.
pub(super) const MARK: u32 = 0x7263_724c;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETGEN: u16 = 16;
const NFPROTO_INET: u8 = 1;
const TABLE_F_OWNER: u32 = 2;
const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const REG32_00: u32 = 8;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// Before connection tracking and everybody else's rules.
const PRIORITY: i32 = -500;
/// Elements in one message; attributes have 16-bit lengths.
const CHUNK: usize = 500;

/// The two ends of a connection as IPv4 or IPv6 addresses and ports in network order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ends {
    /// 4 or 16 bytes.
    pub local: Vec<u8>,
    pub local_port: [u8; 2],
    pub peer: Vec<u8>,
    pub peer_port: [u8; 2],
}

impl Ends {
    /// From raw socket addresses; IPv4 inside of IPv6 counts as IPv4.
    pub(crate) fn of(local: &[u8], peer: &[u8]) -> Option<Self> {
        let one = |a: &[u8]| -> Option<(Vec<u8>, [u8; 2])> {
            let port = a.get(2..4)?.try_into().ok()?;
            let ip = match a.len() {
                16 => a[4..8].to_vec(),
                28 if a[8..20] == MAPPED => a[20..24].to_vec(),
                28 => a[8..24].to_vec(),
                _ => return None,
            };
            Some((ip, port))
        };
        let ((local, local_port), (peer, peer_port)) = (one(local)?, one(peer)?);
        (local.len() == peer.len()).then_some(Self {
            local,
            local_port,
            peer,
            peer_port,
        })
    }

    /// The same connection from the other side.
    pub(crate) fn seen_by_peer(&self) -> Self {
        Self {
            local: self.peer.clone(),
            local_port: self.peer_port,
            peer: self.local.clone(),
            peer_port: self.local_port,
        }
    }

    /// Source and destination of what comes in, as the set holds it.
    fn key(&self) -> Vec<u8> {
        let zero = [0; 2];
        [
            &self.peer[..],
            &self.peer_port,
            &zero,
            &self.local,
            &self.local_port,
            &zero,
        ]
        .concat()
    }
}

/// How an IPv6 address begins that holds an IPv4 one.
const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// A name that no lock has.
pub(crate) fn fresh_name() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    format!(
        "rcr-{}-{}",
        std::process::id(),
        now.unwrap_or_default().as_nanos()
    )
}

/// A lock that lasts as long as this value.
#[derive(Debug)]
pub(crate) struct Lock {
    _owner: OwnedFd,
}

impl Lock {
    /// Takes the lock in a network namespace (`None`: ours).
    pub(crate) fn take(
        netns: Option<BorrowedFd<'_>>,
        name: &str,
        ends: &[Ends],
    ) -> SysResult<Self> {
        let fd = netfilter(netns)?;
        install(fd.as_fd(), name, ends, TABLE_F_OWNER)?;
        Ok(Self { _owner: fd })
    }
}

/// Puts a lock in place that stays until it is [`remove`]d.
pub(crate) fn leave(netns: Option<BorrowedFd<'_>>, name: &str, ends: &[Ends]) -> SysResult<()> {
    install(netfilter(netns)?.as_fd(), name, ends, 0)
}

/// Removes a lock that was left; none is as good.
pub(crate) fn remove(netns: Option<BorrowedFd<'_>>, name: &str) -> SysResult<()> {
    let Ok(fd) = netfilter(netns) else {
        // Without netfilter there is no lock.
        return Ok(());
    };
    let mut m = Messages::default();
    begin(&mut m);
    m.message(of(DELTABLE), NLM_F_ACK, 1, &head()).text(1, name);
    end(&mut m);
    match wire::converse(fd.as_fd(), "nftables", &m.finish(), |_| Some(())) {
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}

/// Whether the kernel can lock at all; nothing is changed.
pub(crate) fn possible() -> bool {
    let Ok(fd) = netfilter(None) else {
        return false;
    };
    let mut m = Messages::default();
    m.message(of(GETGEN), NLM_F_ACK, 1, &head());
    wire::converse(fd.as_fd(), "nftables", &m.finish(), |_| Some(())).is_ok()
}

fn netfilter(netns: Option<BorrowedFd<'_>>) -> SysResult<OwnedFd> {
    let make = || sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER);
    inside(netns, make)
}

/// Runs `f` in a network namespace, in a thread that ends with the call.
pub(crate) fn inside<T: Send>(
    netns: Option<BorrowedFd<'_>>,
    f: impl FnOnce() -> SysResult<T> + Send,
) -> SysResult<T> {
    let Some(netns) = netns else {
        return f();
    };
    std::thread::scope(|scope| {
        let work = || {
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(|e| SysError::new("setns", "network namespace", e))?;
            f()
        };
        let joined = scope.spawn(work).join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The network namespace of a socket, if it is not ours.
pub(crate) fn netns_of(fd: BorrowedFd<'_>) -> SysResult<Option<OwnedFd>> {
    let theirs = super::sys::socket_netns(fd)?;
    let failed = |e| SysError::new("fstat", "network namespace", e);
    let ours = nix::sys::stat::stat("/proc/thread-self/ns/net").map_err(failed)?;
    let is = nix::sys::stat::fstat(&theirs).map_err(failed)?;
    let same = (is.st_dev, is.st_ino) == (ours.st_dev, ours.st_ino);
    tracing::trace!(fd = fd.as_raw_fd(), same, "network namespace of a socket");
    Ok((!same).then_some(theirs))
}

fn of(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}

/// `struct nfgenmsg`.
fn head() -> [u8; 4] {
    [NFPROTO_INET, 0, 0, 0]
}

fn begin(m: &mut Messages) {
    m.message(BATCH_BEGIN, 0, 0, &[0, 0, 0, SUBSYSTEM as u8]);
}

fn end(m: &mut Messages) {
    m.message(BATCH_END, 0, 0, &[0, 0, 0, SUBSYSTEM as u8]);
}

/// One transaction: the table with all that is in it, or nothing.
fn install(fd: BorrowedFd<'_>, name: &str, ends: &[Ends], flags: u32) -> SysResult<()> {
    let mut m = Messages::default();
    begin(&mut m);
    m.message(of(NEWTABLE), NLM_F_CREATE, 1, &head())
        .text(1, name)
        .number(2, flags);
    let families = [("v4", 4usize, 1u32), ("v6", 16, 2)];
    for (set, address_bytes, id) in families {
        m.message(of(NEWSET), NLM_F_CREATE, 1, &head())
            .text(1, name)
            .text(2, set)
            .number(3, 0)
            .number(4, 0)
            .number(5, 2 * (address_bytes as u32 + 4))
            .number(10, id);
        let mut keys: Vec<Vec<u8>> = ends
            .iter()
            .filter(|e| e.local.len() == address_bytes)
            .map(Ends::key)
            .collect();
        keys.sort();
        keys.dedup();
        for chunk in keys.chunks(CHUNK) {
            m.message(of(NEWSETELEM), NLM_F_CREATE, 1, &head())
                .text(1, name)
                .text(2, set)
                .number(4, id)
                .nested(3, |m| {
                    for key in chunk {
                        m.nested(1, |m| {
                            m.nested(1, |m| {
                                m.attribute(1, key);
                            });
                        });
                    }
                });
        }
    }
    // NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT
    for (chain, hook, inbound) in [("in", 1u32, true), ("out", 3, false)] {
        m.message(of(NEWCHAIN), NLM_F_CREATE, 1, &head())
            .text(1, name)
            .text(3, chain)
            .nested(4, |m| {
                m.number(1, hook).number(2, PRIORITY as u32);
            })
            .text(7, "filter");
        rule(&mut m, name, chain, 0, |m| {
            meta(m, META_MARK, &MARK.to_ne_bytes());
            verdict(m, ACCEPT);
        });
        for (set, address_bytes, id) in families {
            let last = !inbound && address_bytes == 16;
            let ack = if last { NLM_F_ACK } else { 0 };
            rule(&mut m, name, chain, ack, |m| {
                lookup(m, set, address_bytes as u32, id, inbound);
                verdict(m, DROP);
            });
        }
    }
    end(&mut m);
    wire::converse(fd, "nftables", &m.finish(), |_| Some(()))
}

fn rule(m: &mut Messages, table: &str, chain: &str, flags: u16, body: impl FnOnce(&mut Messages)) {
    let flags = flags | NLM_F_CREATE | NLM_F_APPEND;
    m.message(of(NEWRULE), flags, 1, &head())
        .text(1, table)
        .text(2, chain)
        .nested(4, body);
}

fn expression(m: &mut Messages, name: &str, data: impl FnOnce(&mut Messages)) {
    m.nested(1, |m| {
        m.text(1, name).nested(2, data);
    });
}

/// Goes on only if a property of the packet is `value`.
fn meta(m: &mut Messages, key: u32, value: &[u8]) {
    expression(m, "meta", |m| {
        m.number(1, REG32_00).number(2, key);
    });
    expression(m, "cmp", |m| {
        m.number(1, REG32_00).number(2, 0).nested(3, |m| {
            m.attribute(1, value);
        });
    });
}

/// Goes on only for TCP packets whose addresses and ports are in the set.
fn lookup(m: &mut Messages, set: &str, address_bytes: u32, id: u32, inbound: bool) {
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    let (family, source) = match address_bytes {
        4 => (libc::AF_INET, 12),
        _ => (libc::AF_INET6, 8),
    };
    meta(m, META_NFPROTO, &[family as u8]);
    meta(m, META_L4PROTO, &[libc::IPPROTO_TCP as u8]);
    let from = (source, 0u32);
    let to = (source + address_bytes, 2u32);
    let (first, second) = if inbound { (from, to) } else { (to, from) };
    let mut register = REG32_00;
    for (address, port) in [first, second] {
        for (base, offset, len) in [(NETWORK, address, address_bytes), (TRANSPORT, port, 2)] {
            expression(m, "payload", |m| {
                m.number(1, register)
                    .number(2, base)
                    .number(3, offset)
                    .number(4, len);
            });
            register += len.div_ceil(4);
        }
    }
    expression(m, "lookup", |m| {
        m.text(1, set).number(2, REG32_00).number(4, id);
    });
}

fn verdict(m: &mut Messages, code: u32) {
    expression(m, "immediate", |m| {
        m.number(1, 0).nested(2, |m| {
            m.nested(2, |m| {
                m.number(1, code);
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    fn a_locked_connection_is_silent_until_the_lock_goes() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let l = TcpListener::bind(host).unwrap();
            let mut a = TcpStream::connect(l.local_addr().unwrap()).unwrap();
            let (mut b, _) = l.accept().unwrap();
            let local = sys::local_address(a.as_fd()).unwrap();
            let peer = sys::peer_address(a.as_fd()).unwrap().unwrap();
            let ends = [Ends::of(&local, &peer).unwrap()];
            let name = format!("rcr-test-{}", std::process::id());
            let lock = Lock::take(None, &name, &ends).unwrap();
            a.write_all(b"x").unwrap();
            b.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            assert!(b.read(&mut [0]).is_err());
            leave(None, &format!("{name}-left"), &ends).unwrap();
            drop(lock);
            assert!(b.read(&mut [0]).is_err());
            remove(None, &format!("{name}-left")).unwrap();
            remove(None, &format!("{name}-left")).unwrap();
            b.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            assert_eq!(b.read(&mut [0]).unwrap(), 1);
        }
        assert!(possible());
    }
}
