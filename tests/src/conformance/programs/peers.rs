//! Whom the ends of unix connections see (SO_PEERCRED).

use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context, Result};
use nix::unistd::ForkResult;

use crate::conformance::member::Member;
use crate::conformance::sys::{get_option, numbers};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "sockets/peer-pair",
        "whom the ends of a pair see: process, user, groups (SO_PEERCRED, SO_PEERGROUPS)",
        pair,
    ),
    Case::new(
        "sockets/peer-connection",
        "whom a client of another user and its server see",
        connection,
    ),
    Case::new(
        "sockets/peer-listener",
        "a listener whose clients see the user that it was then",
        listener,
    ),
    Case::new(
        "sockets/peer-gone",
        "the user of a pair whose maker has ended",
        gone,
    ),
];

/// `SO_PEERGROUPS`, asm-generic/socket.h.
const SO_PEERGROUPS: i32 = 59;

type Seen = (i32, u32, u32);

/// Process, user and group at the other end.
fn seen(s: &impl AsRawFd) -> Result<Seen> {
    let bytes = get_option(s, libc::SOL_SOCKET, libc::SO_PEERCRED, 12)?;
    let word = |n: usize| -> Result<[u8; 4]> {
        Ok(bytes
            .get(n * 4..n * 4 + 4)
            .context("SO_PEERCRED")?
            .try_into()?)
    };
    let word = |n| Ok::<_, anyhow::Error>(u32::from_ne_bytes(word(n)?));
    Ok((word(0)? as i32, word(1)?, word(2)?))
}

fn groups(s: &impl AsRawFd) -> Result<Vec<u8>> {
    get_option(s, libc::SOL_SOCKET, SO_PEERGROUPS, 256)
}

/// Runs `f` as another user with groups, then becomes root again.
fn as_user<T>(uid: i64, gid: i64, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let list = [7u32, 8];
    numbers(libc::SYS_setgroups, &[2, list.as_ptr() as i64])?;
    numbers(libc::SYS_setresgid, &[-1, gid, -1])?;
    numbers(libc::SYS_setresuid, &[-1, uid, -1])?;
    let done = f();
    numbers(libc::SYS_setresuid, &[-1, 0, -1])?;
    numbers(libc::SYS_setresgid, &[-1, 0, -1])?;
    numbers(libc::SYS_setgroups, &[0, 0])?;
    done
}

fn pair(_: &Stage) -> Result<Check> {
    let plain = UnixStream::pair()?;
    let other = as_user(1234, 4321, || Ok(UnixStream::pair()?))?;
    let packets = as_user(77, 78, || Ok(std::os::unix::net::UnixDatagram::pair()?))?;
    let me = std::process::id() as i32;
    Ok(Box::new(move |f| {
        for s in [&plain.0, &plain.1] {
            f.same("plain", &(me, 0, 0), &seen(s)?);
        }
        for s in [&other.0, &other.1] {
            f.same("as a user", &(me, 1234, 4321), &seen(s)?);
            let want = [7u32, 8].map(u32::to_ne_bytes).concat();
            f.same("groups", &want, &groups(s)?);
        }
        f.same("packets", &(me, 77, 78), &seen(&packets.0)?);
        Ok(())
    }))
}

fn connection(stage: &Stage) -> Result<Check> {
    let path = stage.path("listener");
    let by_path = UnixListener::bind(&path)?;
    let name = format!("peers-{}", std::process::id());
    let abstract_name = SocketAddr::from_abstract_name(name.as_bytes())?;
    let by_name = UnixListener::bind_addr(&abstract_name)?;
    let server = std::process::id() as i32;
    let member = Member::start("client", || {
        let clients = as_user(1000, 1001, || {
            Ok([UnixStream::connect_addr(&abstract_name)?])
        })?;
        let root = UnixStream::connect(&path)?;
        Ok(Box::new(move |f| {
            f.same("server by path", &(server, 0, 0), &seen(&root)?);
            for c in &clients {
                f.same("server by name", &(server, 0, 0), &seen(c)?);
            }
            Ok(())
        }))
    })?;
    let (of_user, _) = by_name.accept()?;
    let (of_root, _) = by_path.accept()?;
    let was = [seen(&of_user)?, seen(&of_root)?];
    anyhow::ensure!((was[0].1, was[0].2) == (1000, 1001), "{was:?}");
    anyhow::ensure!(was[0].0 == was[1].0 && was[0].0 != server, "{was:?}");
    Ok(Box::new(move |f| {
        f.same("clients", &was, &[seen(&of_user)?, seen(&of_root)?]);
        member.check(f)
    }))
}

fn listener(stage: &Stage) -> Result<Check> {
    let path = stage.path("listener");
    let socket = as_user(0, 4242, || Ok(UnixListener::bind(&path)?))?;
    let early = UnixStream::connect(&path)?;
    let (accepted, _) = socket.accept()?;
    let me = std::process::id() as i32;
    Ok(Box::new(move |f| {
        f.same("an early client", &(me, 0, 4242), &seen(&early)?);
        f.same("its other end", &(me, 0, 0), &seen(&accepted)?);
        let late = UnixStream::connect(&path)?;
        socket.accept()?;
        f.same("a late client", &(me, 0, 4242), &seen(&late)?);
        Ok(())
    }))
}

fn gone(_: &Stage) -> Result<Check> {
    let (a, b) = UnixStream::pair()?;
    // SAFETY: there is one thread, so no lock is held that the child would miss.
    let made = match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => {
            let sent = || -> Result<()> {
                let pair = as_user(501, 502, || Ok(UnixStream::pair()?))?;
                send_fd(&a, &pair.0)?;
                send_fd(&a, &pair.1)
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(sent().is_err())) }
        }
        ForkResult::Parent { child } => {
            nix::sys::wait::waitpid(child, None)?;
            [receive_fd(&b)?, receive_fd(&b)?]
        }
    };
    Ok(Box::new(move |f| {
        for s in &made {
            let (_, uid, gid) = seen(s)?;
            f.same("user and group", &(501, 502), &(uid, gid));
        }
        Ok(())
    }))
}

fn send_fd(through: &UnixStream, what: &UnixStream) -> Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let fds = [what.as_raw_fd()];
    let iov = [std::io::IoSlice::new(b"x")];
    let along = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(through.as_raw_fd(), &iov, &along, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive_fd(from: &UnixStream) -> Result<UnixStream> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::FromRawFd;
    let mut byte = [0];
    let mut iov = [std::io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(from.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    for c in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = c {
            let fd = *fds.first().context("no descriptor")?;
            // SAFETY: the kernel has just given it to us alone.
            return Ok(unsafe { UnixStream::from_raw_fd(fd) });
        }
    }
    anyhow::bail!("no descriptor came")
}
