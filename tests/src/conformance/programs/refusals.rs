//! What cannot be carried is refused by name, and the tree runs on.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::Result;
use nix::unistd::{ForkResult, fork};

use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("refusals/userfaultfd", "a userfaultfd", userfaultfd).refused(),
    Case::new(
        "refusals/pipe-outside",
        "a pipe to a stranger",
        pipe_outside,
    )
    .refused(),
    Case::new(
        "refusals/unix-outside",
        "a unix connection to a stranger",
        unix_outside,
    )
    .refused(),
];

/// The words that name us and a descriptor.
pub(super) fn expect(stage: &Stage, fd: &impl AsFd, more: &str) -> Result<()> {
    let number = fd.as_fd().as_raw_fd();
    stage.expect_refusal(&[
        format!("program (pid {})", std::process::id()),
        format!("fd {number}"),
        more.to_owned(),
    ])
}

/// A descriptor that a call has just given.
fn owned(fd: i64) -> OwnedFd {
    // SAFETY: callers pass what the kernel returned and nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn userfaultfd(stage: &Stage) -> Result<Check> {
    let fd = owned(sys::numbers(
        libc::SYS_userfaultfd,
        &[libc::O_CLOEXEC.into()],
    )?);
    expect(stage, &fd, "userfaultfd")?;
    Ok(Box::new(move |f| {
        f.that("it is still open", fd.try_clone().is_ok());
        Ok(())
    }))
}

/// A process that is no part of the tree: its parent has ended.
pub(super) fn stranger(run: impl FnOnce()) -> Result<()> {
    // SAFETY: one thread; the processes use what they inherited.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // SAFETY: as above.
            if let Ok(ForkResult::Child) = unsafe { fork() } {
                run();
            }
            // SAFETY: leaves at once.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            nix::sys::wait::waitpid(child, None)?;
            Ok(())
        }
    }
}

/// The id of such a process, which waits until it is killed.
pub(super) fn stranger_that_waits() -> Result<i32> {
    let board = Map::forever(4096)?;
    stranger(move || {
        let me = std::process::id().into();
        board.word(0).store(me, std::sync::atomic::Ordering::SeqCst);
        loop {
            std::thread::sleep(crate::conformance::stage::POLL);
        }
    })?;
    sys::await_word(board.word(0), 1);
    Ok(board.word(0).load(std::sync::atomic::Ordering::SeqCst) as i32)
}

fn pipe_outside(stage: &Stage) -> Result<Check> {
    let (mut here, there) = std::io::pipe()?;
    let up = Map::forever(4096)?;
    let own = here.try_clone()?;
    stranger(move || {
        drop(own);
        while up.word(0).load(std::sync::atomic::Ordering::SeqCst) == 0 {
            std::thread::sleep(crate::conformance::stage::POLL);
        }
        let _ = (&there).write_all(b"hello");
    })?;
    expect(stage, &here, "pipe")?;
    Ok(Box::new(move |f| {
        up.word(0).store(1, std::sync::atomic::Ordering::SeqCst);
        let mut word = [0; 5];
        here.read_exact(&mut word)?;
        f.same("what the stranger writes", b"hello", &word);
        Ok(())
    }))
}

fn unix_outside(stage: &Stage) -> Result<Check> {
    let path = stage.path("stranger.sock");
    let listener = UnixListener::bind(&path)?;
    stranger(|| {
        let echo = || -> std::io::Result<()> {
            let (mut s, _) = listener.accept()?;
            let mut word = [0; 5];
            s.read_exact(&mut word)?;
            s.write_all(&word)
        };
        let _ = echo();
    })?;
    let mut client = UnixStream::connect(&path)?;
    drop(listener);
    expect(stage, &client, "unix")?;
    Ok(Box::new(move |f| {
        client.write_all(b"hello")?;
        let mut word = [0; 5];
        client.read_exact(&mut word)?;
        f.same("the echo", b"hello", &word);
        Ok(())
    }))
}
