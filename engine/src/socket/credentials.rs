//! Who a unix socket's peer sees at the other end (SO_PEERCRED, unix(7)).
//!
//! The kernel notes the process and ids of whoever makes a pair, connects or
//! listens. So these calls are made by the right process, while it is newborn
//! and may still take any ids; a process that is not in the tree is represented
//! by a thread of ours with its ids.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::file::error::BuildError;
use crate::file::record::RcrPeer;
use crate::file::{Newborn, RestoreEnv, sys};
use crate::remote::{Arg, OpId, Outcome, Program};
use crate::sys::SysResult;
use crate::task::creds;

/// `SO_PEERGROUPS`, asm-generic/socket.h.
const SO_PEERGROUPS: i32 = 59;
/// Bytes of the longest list of groups there is (NGROUPS_MAX).
const GROUPS_BYTES_MAX: usize = 65536 * 4;
const NOBODY: u32 = u32::MAX;

/// What a socket says of its other end, with the process as we see it.
pub(super) fn save(fd: BorrowedFd<'_>) -> SysResult<Option<RcrPeer>> {
    let sol = libc::SOL_SOCKET;
    let cred = sys::socket_option(fd, sol, libc::SO_PEERCRED, 12)?;
    let words = cred.chunks_exact(4);
    let words: Vec<u32> = words
        .map(|w| u32::from_ne_bytes(w.try_into().expect("4")))
        .collect();
    let &[pid, uid, gid] = words.as_slice() else {
        return Ok(None);
    };
    if uid == NOBODY {
        return Ok(None);
    }
    // Where nobody is known there are no groups.
    let groups = sys::socket_option(fd, sol, SO_PEERGROUPS, GROUPS_BYTES_MAX).unwrap_or_default();
    let groups = groups.chunks_exact(4);
    Ok(Some(RcrPeer {
        pid: pid as i32,
        uid,
        gid,
        groups: groups
            .map(|w| u32::from_ne_bytes(w.try_into().expect("4")))
            .collect(),
    }))
}

/// A pair as if `maker` had made it.
pub(super) fn pair(
    env: &dyn RestoreEnv,
    kind: i32,
    maker: Option<&RcrPeer>,
) -> Result<(OwnedFd, OwnedFd), BuildError> {
    let Some(maker) = maker else {
        return Ok(sys::socket_pair(kind)?);
    };
    let Some(newborn) = env.newborn(maker.pid) else {
        return Ok(as_thread(maker, || sys::socket_pair(kind))?);
    };
    let mut p = Program::new();
    let fds = p.zeroed(8);
    let args = [
        libc::AF_UNIX.into(),
        (kind | libc::SOCK_CLOEXEC).into(),
        0.into(),
        fds.into(),
    ];
    let (_, out) = run_as(&newborn, maker, p, |p| {
        p.call(libc::SYS_socketpair, "make a pair of sockets", &args)
    })?;
    let number = |at: usize| {
        let bytes = &out.data(fds)[at..at + 4];
        i32::from_ne_bytes(bytes.try_into().expect("4 bytes"))
    };
    let theirs = sys::pidfd_open(newborn.tracee.tid, 0)?;
    let made = [number(0), number(4)];
    let ours = made.map(|n| sys::pidfd_getfd(theirs.as_fd(), n));
    let mut p = Program::new();
    for n in made {
        p.call(libc::SYS_close, "close an end of a pair", &[n.into()]);
    }
    run(&newborn, &p)?;
    let [a, b] = ours;
    Ok((a?, b?))
}

/// listen(2) as if `maker` called it.
pub(crate) fn listen(
    env: &dyn RestoreEnv,
    fd: BorrowedFd<'_>,
    backlog: i32,
    maker: Option<&RcrPeer>,
) -> Result<(), BuildError> {
    let Some(maker) = maker else {
        return Ok(sys::listen(fd, backlog)?);
    };
    let Some(newborn) = env.newborn(maker.pid) else {
        return Ok(as_thread(maker, || sys::listen(fd, backlog))?);
    };
    let mut p = Program::new();
    let number = take(&newborn, &mut p, fd);
    run_as(&newborn, maker, p, |p| {
        p.call(libc::SYS_listen, "listen", &[number.into(), backlog.into()]);
        p.call(libc::SYS_close, "close the listener", &[number.into()])
    })?;
    Ok(())
}

/// connect(2) as if `maker` called it, to a listener of that name that we hold.
pub(super) fn connect(
    env: &dyn RestoreEnv,
    fd: BorrowedFd<'_>,
    (listener, name): (BorrowedFd<'_>, &[u8]),
    maker: Option<&RcrPeer>,
) -> Result<(), BuildError> {
    let named = name.get(2).is_some_and(|&b| b != 0);
    // Wherever the file is and whether it has a name: our descriptor leads to it.
    let file = named.then(|| sys::unix_socket_file(listener)).transpose()?;
    let address = match &file {
        Some(file) => {
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            let family = (libc::AF_UNIX as u16).to_ne_bytes();
            [&family, path.as_bytes(), &[0]].concat()
        }
        None => name.to_vec(),
    };
    let Some(maker) = maker else {
        return Ok(sys::connect(fd, &address)?);
    };
    let Some(newborn) = env.newborn(maker.pid) else {
        return Ok(as_thread(maker, || sys::connect(fd, &address))?);
    };
    let mut p = Program::new();
    let number = take(&newborn, &mut p, fd);
    let to = p.bytes(&address);
    run_as(&newborn, maker, p, |p| {
        let args = [number.into(), to.into(), (address.len() as u64).into()];
        p.call(libc::SYS_connect, "connect", &args);
        p.call(libc::SYS_close, "close the client", &[number.into()])
    })?;
    Ok(())
}

/// Adds the call that takes one of our descriptors.
fn take(newborn: &Newborn, p: &mut Program, fd: BorrowedFd<'_>) -> OpId {
    let args = [newborn.pidfd.into(), fd.as_raw_fd().into(), 0.into()];
    p.call(libc::SYS_pidfd_getfd, "take a socket", &args)
}

/// Runs what `f` adds to a program with the ids of `maker`; the newborn is root
/// before and afterwards.
fn run_as(
    newborn: &Newborn,
    maker: &RcrPeer,
    mut p: Program,
    f: impl FnOnce(&mut Program) -> OpId,
) -> Result<(OpId, Outcome), BuildError> {
    creds::lend_ids(&mut p, maker.uid, maker.gid, &maker.groups);
    let op = f(&mut p);
    let keep = Arg::Imm(u64::MAX);
    p.call(
        libc::SYS_setresuid,
        "be root again",
        &[keep, 0.into(), keep],
    );
    p.call(
        libc::SYS_setresgid,
        "be root's group again",
        &[keep, 0.into(), keep],
    );
    Ok((op, run(newborn, &p)?))
}

fn run(newborn: &Newborn, p: &Program) -> Result<Outcome, BuildError> {
    let ran = newborn.tracee.run(newborn.arena, p);
    ran.map_err(|e| BuildError::Env {
        what: "calls of a process that its peers are to see".into(),
        source: std::io::Error::other(e.to_string()),
    })
}

fn as_thread<T: Send>(maker: &RcrPeer, f: impl FnOnce() -> SysResult<T> + Send) -> SysResult<T> {
    super::sys::as_ids(maker.uid, maker.gid, &maker.groups, f)
}
