//! Packet sockets, and families that are refused.

use super::make;
use crate::conformance::sys::{get_option, set_option, set_option_bytes};
use crate::conformance::{Check, Stage};
use anyhow::Result;
use nix::sys::socket::{MsgFlags, recv};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

const ETH_P_IP: u16 = 0x0800;

const SOL_PACKET: i32 = 263;

pub(super) fn packet_socket() -> Result<OwnedFd> {
    let fd = make(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    let mut at = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    at.extend_from_slice(&ETH_P_IP.to_be_bytes());
    at.extend_from_slice(&1i32.to_ne_bytes());
    at.resize(20, 0);
    // SAFETY: the address outlives the call.
    let r = unsafe { libc::bind(fd.as_raw_fd(), at.as_ptr().cast(), 20) };
    anyhow::ensure!(r == 0, "bind: {}", std::io::Error::last_os_error());
    Ok(fd)
}

pub(super) fn packet(_: &Stage) -> Result<Check> {
    let fd = packet_socket()?;
    // PACKET_AUXDATA, PACKET_ORIGDEV; PACKET_ADD_MEMBERSHIP: promiscuous on lo.
    set_option(&fd, SOL_PACKET, 8, 1)?;
    set_option(&fd, SOL_PACKET, 9, 1)?;
    let mut request = 1i32.to_ne_bytes().to_vec();
    request.extend_from_slice(&1u16.to_ne_bytes());
    request.resize(16, 0);
    set_option_bytes(&fd, SOL_PACKET, 1, &request)?;
    Ok(Box::new(move |f| {
        for name in [8, 9] {
            let is = get_option(&fd, SOL_PACKET, name, 4)?;
            f.same("an option", &1i32.to_ne_bytes().to_vec(), &is);
        }
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        sender.send_to(b"look for these bytes", sender.local_addr()?)?;
        // Frames of the runner's making do not come by here; those before the dump may.
        let mut frame = [0; 2000];
        loop {
            let n = recv(fd.as_raw_fd(), &mut frame, MsgFlags::empty())?;
            if frame[..n].ends_with(b"look for these bytes") {
                return Ok(());
            }
        }
    }))
}

pub(super) fn packet_fanout(_: &Stage) -> Result<Check> {
    let all = [packet_socket()?, packet_socket()?];
    let group = 77i32 | 1 << 16; // PACKET_FANOUT_LB
    for fd in &all {
        set_option(fd, SOL_PACKET, 18, group)?;
    }
    Ok(Box::new(move |f| {
        for fd in &all {
            let is = get_option(fd, SOL_PACKET, 18, 4)?;
            f.same("fanout", &group.to_ne_bytes().to_vec(), &is);
        }
        Ok(())
    }))
}

pub(super) fn packet_ring(stage: &Stage) -> Result<Check> {
    let fd = packet_socket()?;
    // PACKET_RX_RING: struct tpacket_req.
    let request: Vec<u8> = [4096u32, 4, 2048, 8]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    set_option_bytes(&fd, SOL_PACKET, 5, &request)?;
    stage.expect_refusal(&[format!("fd {}", fd.as_raw_fd()), "ring".into()])?;
    Ok(Box::new(move |f| {
        let is = get_option(&fd, SOL_PACKET, 10, 4)?;
        f.same("version", &0i32.to_ne_bytes().to_vec(), &is);
        Ok(())
    }))
}

pub(super) fn refused(stage: &Stage, fd: OwnedFd, name: &str) -> Result<Check> {
    stage.expect_refusal(&[format!("fd {}", fd.as_raw_fd()), name.into()])?;
    Ok(Box::new(move |_| {
        get_option(&fd, libc::SOL_SOCKET, libc::SO_DOMAIN, 4).map(drop)
    }))
}

pub(super) fn vsock(stage: &Stage) -> Result<Check> {
    let fd = make(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    refused(stage, fd, "virtual machine")
}

pub(super) fn xdp(stage: &Stage) -> Result<Check> {
    refused(stage, make(libc::AF_XDP, libc::SOCK_RAW, 0)?, "XDP")
}

pub(super) fn crypto(stage: &Stage) -> Result<Check> {
    refused(
        stage,
        make(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)?,
        "crypto",
    )
}
