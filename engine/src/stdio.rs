//! Gives running processes other descriptors in place of theirs: a restored
//! service gets the streams of the new journal.
//!
//! The process is stopped for a moment and made to receive the descriptors
//! over a unix socket (unix(7), SCM_RIGHTS): that needs no privilege of its own.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, sendmsg, socket,
};

use crate::dump::{DumpError, Settled, Workshop};
use crate::memory::maps;
use crate::memory::vdso::Vdso;
use crate::remote::{Program, RemoteError};
use crate::sys::ptrace::{self, Stop};

/// More than that are not replaced at once.
const FDS_MAX: usize = 16;
const ARENA_BYTES: u64 = 64 << 10;
/// `struct sockaddr_un` as far as it is used: family and an abstract name.
const NAME_BYTES: usize = 32;

/// A running process stopped by us; goes on when dropped.
struct Visit {
    pid: i32,
}

impl Visit {
    fn stop(pid: i32) -> Result<Self, DumpError> {
        ptrace::seize(pid, ptrace::O_VISIT)?;
        let visit = Self { pid };
        ptrace::interrupt(pid)?;
        loop {
            match ptrace::wait(pid)? {
                Stop::Stopped(_) => return Ok(visit),
                Stop::Signal(s) => ptrace::cont(pid, s)?,
                Stop::Event(_) => ptrace::cont(pid, 0)?,
                Stop::Gone(status) => return Err(RemoteError::Gone { tid: pid, status }.into()),
            }
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Err(e) = ptrace::detach(self.pid, 0) {
            tracing::warn!(pid = self.pid, "detach: {e}");
        }
    }
}

/// Puts `new` descriptors in the place of a process's own, by their numbers
/// there. Close-on-exec is off afterwards, as for standard streams.
pub fn replace_fds(pid: i32, new: &[(i32, BorrowedFd<'_>)]) -> Result<(), DumpError> {
    assert!(new.len() <= FDS_MAX, "few descriptors are replaced at once");
    let io = |what: &str| DumpError::io(format!("{what} for process {pid}"));
    let name = format!("rcr-fds-{}-{pid}", std::process::id());
    let listener = listen_on(&name).map_err(io("listening"))?;

    let _visit = Visit::stop(pid)?;
    let vmas = maps::read_ranges(pid).map_err(io("mappings"))?;
    let vdso = Vdso::find(&vmas);
    let settled = Settled::new(pid, vdso.as_ref())?;
    let workshop = Workshop::open(&settled, vdso.as_ref(), ARENA_BYTES)?;

    let mut p = Program::new();
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    let s = p.call(
        libc::SYS_socket,
        "make a socket",
        &[libc::AF_UNIX.into(), kind.into(), 0.into()],
    );
    let mut address = [0u8; NAME_BYTES];
    address[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_le_bytes());
    address[3..3 + name.len()].copy_from_slice(name.as_bytes());
    let address = p.bytes(&address);
    let len = (3 + name.len()) as u64;
    p.call(
        libc::SYS_connect,
        "connect to rcr",
        &[s.into(), address.into(), len.into()],
    );
    let sock = workshop.run(&p)?.result(s);

    send(&listener, new).map_err(io("handing over descriptors"))?;

    let mut p = Program::new();
    let byte = p.zeroed(8);
    let iov = p.zeroed(16);
    p.point(iov, 0, byte);
    p.write(iov, 8, &1u64.to_le_bytes());
    let control_len = 16 + (new.len() * 4).next_multiple_of(8);
    let control = p.zeroed(control_len);
    // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
    let msg = p.zeroed(56);
    p.point(msg, 16, iov);
    p.write(msg, 24, &1u64.to_le_bytes());
    p.point(msg, 32, control);
    p.write(msg, 40, &(control_len as u64).to_le_bytes());
    let fd = |n: i64| (n as i32).into();
    p.call(
        libc::SYS_recvmsg,
        "receive descriptors",
        &[fd(sock), msg.into(), 0.into()],
    );
    let out = workshop.run(&p)?;
    let received: Vec<i32> = out.data(control)[16..16 + new.len() * 4]
        .chunks_exact(4)
        .map(|c| i32::from_le_bytes(c.try_into().expect("4 bytes")))
        .collect();

    let mut p = Program::new();
    for (&(target, _), &from) in new.iter().zip(&received) {
        let args = [from.into(), target.into(), 0.into()];
        p.call(libc::SYS_dup3, format!("replace fd {target}"), &args);
    }
    for from in received.into_iter().chain([sock as i32]) {
        p.call(libc::SYS_close, "close a spare descriptor", &[from.into()]);
    }
    workshop.run(&p)?;
    Ok(())
}

fn listen_on(name: &str) -> io::Result<OwnedFd> {
    let s = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(s.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    listen(&s, Backlog::new(1)?)?;
    Ok(s)
}

fn send(listener: &OwnedFd, new: &[(i32, BorrowedFd<'_>)]) -> io::Result<()> {
    use std::os::fd::FromRawFd;
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just given us this descriptor.
    let peer = unsafe { OwnedFd::from_raw_fd(raw) };
    let fds: Vec<i32> = new.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let data = [IoSlice::new(b"f")];
    sendmsg::<()>(peer.as_raw_fd(), &data, &rights, MsgFlags::empty(), None)?;
    Ok(())
}
