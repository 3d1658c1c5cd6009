//! Packet filters and tracked connections of network namespaces, seen and made
//! by netlink as `nft(8)` and `conntrack(8)` do it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::conformance::{Case, Check, Findings, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "filters/nftables",
        "nftables: a table with chains, a set, counting rules, and their handles",
        nftables,
    ),
    Case::new(
        "filters/conntrack",
        "a tracked connection of a network namespace",
        conntrack,
    ),
];

fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn nest(kind: u16, inner: &[Vec<u8>]) -> Vec<u8> {
    attr(kind | 0x8000, &inner.concat())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attr(kind, &[value.as_bytes(), &[0]].concat())
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attr(kind, &value.to_be_bytes())
}

/// `struct nlmsghdr` and `struct nfgenmsg`, then attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attrs: &[Vec<u8>]) -> Vec<u8> {
    let body = attrs.concat();
    let mut out = ((20 + body.len()) as u32).to_ne_bytes().to_vec();
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&(flags | 1).to_ne_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    out.extend_from_slice(&body);
    out
}

fn netfilter() -> Result<OwnedFd> {
    // SAFETY: numbers only; the new descriptor is ours.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER);
        ensure!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Sends messages that are worked off at once.
fn ask(bytes: &[u8]) -> Result<()> {
    let fd = netfilter()?;
    send(fd.as_raw_fd(), bytes, MsgFlags::empty()).context("send")?;
    let mut room = vec![0; 1 << 16];
    while let Ok(n) = recv(fd.as_raw_fd(), &mut room, MsgFlags::MSG_DONTWAIT) {
        let code = i32::from_ne_bytes(room[16..20].try_into()?);
        ensure!(
            n < 20 || code == 0,
            "refused: {}",
            std::io::Error::from_raw_os_error(-code)
        );
    }
    Ok(())
}

/// All answers to a listing, without headers that number requests.
fn list(kind: u16, attrs: &[Vec<u8>], family: u8) -> Result<Vec<Vec<u8>>> {
    let fd = netfilter()?;
    let bytes = message(kind, 0x300, family, 0, attrs);
    send(fd.as_raw_fd(), &bytes, MsgFlags::empty()).context("send")?;
    let mut found = Vec::new();
    loop {
        let mut room = vec![0; 1 << 16];
        let n = recv(fd.as_raw_fd(), &mut room, MsgFlags::empty()).context("recv")?;
        let mut rest = &room[..n];
        while rest.len() >= 16 {
            let len = u32::from_ne_bytes(rest[..4].try_into()?) as usize;
            match u16::from_ne_bytes(rest[4..6].try_into()?) {
                3 => return Ok(found),
                2 => bail!("refused: {:?}", &rest[16..20]),
                _ => found.push(rest[20..len].to_vec()),
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

const SUBSYSTEM: u16 = 10 << 8;
const INET: u8 = 1;

fn nft(kind: u16, flags: u16, attrs: &[Vec<u8>]) -> Vec<u8> {
    message(SUBSYSTEM | kind, flags, INET, 0, attrs)
}

fn transaction(parts: &[Vec<u8>]) -> Result<()> {
    let mut bytes = message(0x10, 0, 0, 10, &[]);
    bytes.extend(parts.concat());
    bytes.extend(message(0x11, 0, 0, 10, &[]));
    ask(&bytes)
}

const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

fn rule(chain: &str, expressions: &[Vec<u8>], flags: u16) -> Vec<u8> {
    let all = nest(4, expressions);
    nft(6, CREATE | flags, &[text(1, "t"), text(2, chain), all])
}

/// A counter that has counted.
fn counter(packets: u64) -> Vec<u8> {
    let data = [
        attr(1, &(packets * 100).to_be_bytes()),
        attr(2, &packets.to_be_bytes()),
    ];
    nest(1, &[text(1, "counter"), nest(2, &data)])
}

/// A jump to another chain.
fn jump(chain: &str) -> Vec<u8> {
    const JUMP: u32 = -3_i32 as u32;
    let verdict = nest(2, &[number(1, JUMP), text(2, chain)]);
    let data = [number(1, 0), nest(2, &[verdict])];
    nest(1, &[text(1, "immediate"), nest(2, &data)])
}

fn ruleset() -> Result<Vec<Vec<Vec<u8>>>> {
    let mut all = Vec::new();
    // Tables, chains, rules, sets, elements.
    for kind in [1, 4, 7, 10] {
        all.push(list(SUBSYSTEM | kind, &[], 0)?);
    }
    let elements = list(SUBSYSTEM | 13, &[text(1, "t"), text(2, "s")], INET)?;
    // Their order is that of a hash with a seed of its own.
    let mut bytes = elements.concat();
    bytes.sort_unstable();
    all.push(vec![bytes]);
    Ok(all)
}

fn nftables(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let hook = nest(4, &[number(1, 1), number(2, 0)]);
    transaction(&[
        nft(0, CREATE, &[text(1, "t")]),
        nft(
            3,
            CREATE,
            &[
                text(1, "t"),
                text(3, "in"),
                hook,
                number(5, 1),
                text(7, "filter"),
            ],
        ),
        nft(3, CREATE, &[text(1, "t"), text(3, "more")]),
        nft(3, CREATE, &[text(1, "t"), text(3, "gone")]),
        nft(
            9,
            CREATE,
            &[
                text(1, "t"),
                text(2, "s"),
                number(4, 7),
                number(5, 4),
                number(10, 1),
            ],
        ),
        rule("in", &[counter(5), jump("more")], APPEND),
        rule("more", &[counter(7)], APPEND),
        rule("more", &[counter(9)], 0),
    ])?;
    let element = |a: [u8; 4]| nest(1, &[nest(1, &[attr(1, &a)])]);
    let elements = nest(3, &[element([10, 0, 0, 1]), element([10, 0, 0, 2])]);
    transaction(&[nft(12, CREATE, &[text(1, "t"), text(2, "s"), elements])])?;
    transaction(&[nft(5, 0, &[text(1, "t"), text(3, "gone")])])?;
    let before = ruleset()?;
    ensure!(
        before[2].len() == 3 && before[4][0].len() > 60,
        "the ruleset is not there"
    );
    Ok(Box::new(move |f: &mut Findings| {
        let what = ["tables", "chains", "rules", "sets", "elements"];
        for ((what, b), a) in what.iter().zip(&before).zip(ruleset()?) {
            f.same(what, b, &a);
        }
        Ok(())
    }))
}

/// Address, port and protocol of both ends of what is tracked.
fn tracked() -> Result<Vec<Vec<u8>>> {
    let mut ends = Vec::new();
    for m in list(1 << 8 | 1, &[], 0)? {
        let mut rest = &m[..];
        while rest.len() >= 4 {
            let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
            // The tuples and the mark.
            if [1, 2, 8].contains(&kind) {
                ends.push(rest[..len].to_vec());
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
    Ok(ends)
}

fn conntrack(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let tuple = |kind, from: [u8; 4], to: [u8; 4], ports: (u16, u16)| {
        let ip = nest(1, &[attr(1, &from), attr(2, &to)]);
        let (a, b) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
        let proto = nest(2, &[attr(1, &[17]), attr(2, &a), attr(3, &b)]);
        nest(kind, &[ip, proto])
    };
    let (a, b) = ([10, 3, 0, 1], [10, 3, 0, 2]);
    let attrs = [
        tuple(1, a, b, (4000, 53)),
        tuple(2, b, a, (53, 4000)),
        number(3, 0xe),
        number(7, 6000),
        number(8, 77),
    ];
    ask(&message(1 << 8, CREATE | 0x200 | 4, 2, 0, &attrs))?;
    let before = tracked()?;
    ensure!(before.len() >= 2, "nothing is tracked: {before:?}");
    Ok(Box::new(move |f: &mut Findings| {
        f.same("what is tracked", &before, &tracked()?);
        Ok(())
    }))
}
