//! Packet sockets: they see frames of an interface. Frames not yet read are
//! lost, as a network may lose them.

use std::os::fd::{AsFd, OwnedFd};

use super::lock::{inside, netns_of};
use super::wire::{self, Messages, NLM_F_DUMP, word};
use super::{Kind, device, opts};
use crate::file::error::{BuildError, Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::record::{RcrFile, RcrSocket};
use crate::file::sys;
use crate::image::schema::{FdTypes, PacketMclist, PacketSockEntry};
use crate::sys::SysResult;

const SOL_PACKET: i32 = 263;
// linux/if_packet.h
const ADD_MEMBERSHIP: i32 = 1;
const COPY_THRESH: i32 = 7;
const AUXDATA: i32 = 8;
const ORIGDEV: i32 = 9;
const VERSION: i32 = 10;
const RESERVE: i32 = 12;
const LOSS: i32 = 14;
const VNET_HDR: i32 = 15;
const TIMESTAMP: i32 = 17;
const FANOUT: i32 = 18;
const QDISC_BYPASS: i32 = 20;
const IGNORE_OUTGOING: i32 = 23;
/// Fanout by a program: `PACKET_FANOUT_CBPF`, `PACKET_FANOUT_EBPF`.
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];
// linux/sock_diag.h, linux/packet_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SHOW_MCLIST: u32 = 2;
const SHOW_RINGS: u32 = 4;
const DIAG_MCLIST: u16 = 1;
const DIAG_RINGS: [u16; 2] = [2, 3];

/// What only the diagnosis tells.
#[derive(Debug, Default)]
struct Told {
    memberships: Vec<PacketMclist>,
    ring: bool,
}

/// Saves a socket, its interface, options, groups and filter.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, kind: Kind) -> Result<(), Stop> {
    let int = |name| sys::socket_option_int(file.fd, SOL_PACKET, name);
    let told = ask(file)?;
    if told.ring {
        return refuse(
            "packet socket",
            "its ring of frames in shared memory is not carried",
            "use the socket without a ring, or untag the unit",
        );
    }
    let fanout = int(FANOUT)? as u32;
    if fanout != 0 && FANOUT_PROGRAMS.contains(&(fanout >> 16 & 0xff)) {
        return refuse(
            "packet socket",
            "the program that spreads its frames cannot be read back",
            "untag the unit",
        );
    }
    let local = sys::local_address(file.fd)?;
    let protocol = local
        .get(2..4)
        .map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
    let mut options = opts::save(file.fd, kind)?;
    for name in [QDISC_BYPASS, IGNORE_OUTGOING] {
        if int(name).is_ok_and(|v| v != 0) {
            options.push(opts::number(SOL_PACKET, name, 1));
        }
    }
    saved.entry.r#type = FdTypes::Packetsk.into();
    saved.entry.psk = Some(Box::new(PacketSockEntry {
        id: saved.entry.id,
        r#type: kind.kind as u32,
        protocol: protocol.into(),
        flags: file.flags(),
        ifindex: word(&local, 4).unwrap_or(0),
        fown: file.fown()?,
        opts: opts::entry(file.fd)?,
        version: int(VERSION)? as u32,
        reserve: int(RESERVE)? as u32,
        aux_data: int(AUXDATA)? != 0,
        orig_dev: int(ORIGDEV)? != 0,
        vnet_hdr: int(VNET_HDR)? != 0,
        loss: int(LOSS)? != 0,
        timestamp: int(TIMESTAMP)? as u32,
        copy_thresh: int(COPY_THRESH).unwrap_or(0) as u32,
        mclist: told.memberships,
        fanout: (fanout != 0).then_some(fanout),
        rx_ring: None,
        tx_ring: None,
        ns_id: None,
    }));
    let mut more = RcrSocket {
        options,
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        ..RcrSocket::default()
    };
    device::save(file.fd, &mut more, saved.entry.psk.as_deref_mut())?;
    saved.extra.socket = Some(Box::new(more));
    Ok(())
}

fn ask(file: &Examined<'_>) -> Result<Told, Stop> {
    let netns = netns_of(file.fd)?;
    let make = || sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG);
    let fd = inside(netns.as_ref().map(OwnedFd::as_fd), make)?;
    let ino = file.stat.st_ino as u32;
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    for w in [0, SHOW_MCLIST | SHOW_RINGS, u32::MAX, u32::MAX] {
        request.extend_from_slice(&w.to_ne_bytes());
    }
    let mut m = Messages::default();
    m.message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 1, &request);
    let mut told = Told::default();
    wire::converse(fd.as_fd(), "packet socket diagnosis", &m.finish(), |body| {
        if word(body, 4)? != ino {
            return Some(());
        }
        for (kind, value) in wire::attributes(body.get(16..)?) {
            if DIAG_RINGS.contains(&kind) {
                told.ring |= value.get(..8)?.iter().any(|&b| b != 0);
            }
            if kind == DIAG_MCLIST {
                told.memberships
                    .extend(value.chunks_exact(44).flat_map(memberships));
            }
        }
        Some(())
    })?;
    Ok(told)
}

/// A `struct packet_diag_mclist`: index, count, type, address.
fn memberships(raw: &[u8]) -> Vec<PacketMclist> {
    let half = |at: usize| u16::from_ne_bytes([raw[at], raw[at + 1]]);
    let len = usize::from(half(10)).min(32);
    let one = PacketMclist {
        index: word(raw, 0).unwrap_or(0),
        r#type: half(8).into(),
        addr: raw[12..12 + len].to_vec(),
    };
    vec![one; word(raw, 4).unwrap_or(0).min(1024) as usize]
}

/// Makes the socket again.
pub(crate) fn restore(
    psk: &PacketSockEntry,
    extra: Option<&RcrFile>,
) -> Result<OwnedFd, BuildError> {
    let none = RcrSocket::default();
    let more = extra.and_then(|e| e.socket.as_deref()).unwrap_or(&none);
    let fd = sys::socket(libc::AF_PACKET, psk.r#type as i32, 0)?;
    super::set_owner(fd.as_fd(), more.uid, more.gid)?;
    opts::restore(fd.as_fd(), &more.options, &psk.opts)?;
    let set = |name: i32, value: u32| -> SysResult<()> {
        sys::set_socket_option(fd.as_fd(), SOL_PACKET, name, &value.to_ne_bytes())
    };
    for (name, value) in [
        (VERSION, psk.version),
        (RESERVE, psk.reserve),
        (AUXDATA, psk.aux_data.into()),
        (ORIGDEV, psk.orig_dev.into()),
        (VNET_HDR, psk.vnet_hdr.into()),
        (LOSS, psk.loss.into()),
        (TIMESTAMP, psk.timestamp),
        (COPY_THRESH, psk.copy_thresh),
    ] {
        if value != 0 {
            set(name, value)?;
        }
    }
    for m in &psk.mclist {
        // struct packet_mreq: index, type, length, address of 8 or more bytes.
        let mut request = m.index.to_ne_bytes().to_vec();
        request.extend_from_slice(&(m.r#type as u16).to_ne_bytes());
        request.extend_from_slice(&(m.addr.len() as u16).to_ne_bytes());
        request.extend_from_slice(&m.addr);
        request.resize(request.len().max(16), 0);
        sys::set_socket_option(fd.as_fd(), SOL_PACKET, ADD_MEMBERSHIP, &request)?;
    }
    if psk.protocol != 0 || psk.ifindex != 0 {
        let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
        address.extend_from_slice(&(psk.protocol as u16).to_ne_bytes());
        address.extend_from_slice(&psk.ifindex.to_ne_bytes());
        address.resize(20, 0);
        sys::bind(fd.as_fd(), &address)?;
    }
    if let Some(fanout) = psk.fanout {
        set(FANOUT, fanout)?;
    }
    Ok(fd)
}
