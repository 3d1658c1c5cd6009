//! Threads that sleep in a system call go on sleeping, and wake rightly.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use crate::conformance::stage::POLL;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("threads/blocked-read", "blocked in read(2)", blocked_read),
    Case::new("threads/blocked-poll", "blocked in poll(2)", blocked_poll),
    Case::new(
        "threads/blocked-epoll",
        "blocked in epoll_wait(2)",
        blocked_epoll,
    ),
    Case::new(
        "threads/blocked-accept",
        "blocked in accept(2)",
        blocked_accept,
    ),
    Case::new(
        "threads/blocked-wait",
        "blocked in wait4(2) and pause(2)",
        blocked_wait,
    ),
];

/// Whether a thread of ours sleeps in that system call. One that was stopped
/// and left running may have come back to it by restart_syscall(2).
pub fn in_call(tid: i32, number: i64) -> bool {
    let text = fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap_or_default();
    is_call(&text, number)
}

/// Whether `/proc/PID/syscall` shows that call, or its continuation.
fn is_call(text: &str, number: i64) -> bool {
    let now = text.split(' ').next().and_then(|w| w.parse().ok());
    now == Some(number) || now == Some(libc::SYS_restart_syscall)
}

/// Waits until something holds.
pub fn await_that(holds: &dyn Fn() -> bool) {
    while !holds() {
        thread::sleep(POLL);
    }
}

/// A thread that repeats a blocking call and tells its results.
struct Blocked<T> {
    tid: i32,
    number: i64,
    results: mpsc::Receiver<T>,
}

impl<T: Send + 'static> Blocked<T> {
    fn start(number: i64, mut call: impl FnMut() -> T + Send + 'static) -> Result<Self> {
        let (said, tid) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        thread::spawn(move || {
            let _ = said.send(sys::gettid());
            while sender.send(call()).is_ok() {}
        });
        let blocked = Self {
            tid: tid.recv()?,
            number,
            results,
        };
        blocked.await_blocked();
        Ok(blocked)
    }

    fn await_blocked(&self) {
        await_that(&|| in_call(self.tid, self.number));
    }
}

fn blocked_read(_: &Stage) -> Result<Check> {
    let (mut reader, mut writer) = std::io::pipe()?;
    let thread = Blocked::start(libc::SYS_read, move || {
        let mut b = [0; 16];
        // Not `read_exact`, which would try again when interrupted.
        reader
            .read(&mut b)
            .map(|n| b[..n].to_vec())
            .map_err(|e| e.to_string())
    })?;
    Ok(Box::new(move |f| {
        thread.await_blocked();
        f.that("no result yet", thread.results.try_recv().is_err());
        writer.write_all(b"hello")?;
        f.same(
            "what was read",
            &Ok(b"hello".to_vec()),
            &thread.results.recv()?,
        );
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_poll(_: &Stage) -> Result<Check> {
    let event = Arc::new(EventFd::from_value(0)?);
    let theirs = event.clone();
    let forever = Blocked::start(libc::SYS_poll, move || {
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&*theirs),
            PollFlags::POLLIN,
        )];
        let result = poll(&mut fds, PollTimeout::NONE);
        let _ = theirs.read();
        result
    })?;
    let limited_event = Arc::new(EventFd::from_value(0)?);
    let theirs = limited_event.clone();
    let limited = Blocked::start(libc::SYS_poll, move || {
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&*theirs),
            PollFlags::POLLIN,
        )];
        let result = poll(&mut fds, PollTimeout::try_from(600_000_u32).expect("fits"));
        let _ = theirs.read();
        result
    })?;
    Ok(Box::new(move |f| {
        for (name, thread, event) in [
            ("", &forever, &event),
            (" with limit", &limited, &limited_event),
        ] {
            thread.await_blocked();
            f.that(
                format!("no result of poll{name}"),
                thread.results.try_recv().is_err(),
            );
            event.write(1)?;
            f.same(&format!("poll{name}"), &Ok(1), &thread.results.recv()?);
            thread.await_blocked();
        }
        Ok(())
    }))
}

fn blocked_epoll(_: &Stage) -> Result<Check> {
    let event = Arc::new(EventFd::from_value(0)?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(
        &*event,
        EpollEvent::new(EpollFlags::EPOLLIN, 0x1234_5678_9abc),
    )?;
    let theirs = event.clone();
    let thread = Blocked::start(libc::SYS_epoll_wait, move || {
        loop {
            let mut out = [EpollEvent::empty(); 4];
            match epoll.wait(&mut out, EpollTimeout::NONE) {
                // A stop ends this call on any kernel (signal(7)).
                Err(Errno::EINTR) => continue,
                result => {
                    let _ = theirs.read();
                    return result.map(|n| out[..n].iter().map(|e| e.data()).collect::<Vec<_>>());
                }
            }
        }
    })?;
    Ok(Box::new(move |f| {
        f.that("no result yet", thread.results.try_recv().is_err());
        event.write(1)?;
        f.same(
            "events",
            &Ok(vec![0x1234_5678_9abc_u64]),
            &thread.results.recv()?,
        );
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_accept(stage: &Stage) -> Result<Check> {
    let path = stage.path("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    let thread = Blocked::start(libc::SYS_accept4, move || {
        let accepted = listener.accept();
        accepted
            .map(|(s, _)| s.as_raw_fd() >= 0)
            .map_err(|e| e.to_string())
    })?;
    Ok(Box::new(move |f| {
        thread.await_blocked();
        f.that("no result yet", thread.results.try_recv().is_err());
        let _client = std::os::unix::net::UnixStream::connect(&path)?;
        f.same("accept", &Ok(true), &thread.results.recv()?);
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_wait(_: &Stage) -> Result<Check> {
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};
    fn sleeper() -> Result<Pid> {
        // SAFETY: the child only pauses.
        match unsafe { fork() }? {
            ForkResult::Child => loop {
                nix::unistd::pause();
            },
            ForkResult::Parent { child } => Ok(child),
        }
    }
    let ended = Arc::new(AtomicBool::new(false));
    let watch =
        move |pid: Pid, ended: Arc<AtomicBool>| -> Result<Blocked<nix::Result<WaitStatus>>> {
            ended.store(false, Ordering::SeqCst);
            Blocked::start(libc::SYS_wait4, move || {
                let status = waitpid(pid, None);
                ended.store(true, Ordering::SeqCst);
                // One result is enough.
                while ended.load(Ordering::SeqCst) && status.is_err() {
                    thread::sleep(Duration::from_secs(1));
                }
                status
            })
        };
    let mut child = sleeper()?;
    let mut thread = watch(child, ended.clone())?;
    Ok(Box::new(move |f| {
        let pauses = move || {
            let calls = fs::read_to_string(format!("/proc/{child}/syscall")).unwrap_or_default();
            is_call(&calls, libc::SYS_pause)
        };
        await_that(&pauses);
        thread.await_blocked();
        kill(child, Signal::SIGTERM)?;
        let want = Ok(WaitStatus::Signaled(child, Signal::SIGTERM, false));
        f.same("wait", &want, &thread.results.recv()?);
        child = sleeper()?;
        thread = watch(child, ended.clone())?;
        Ok(())
    }))
}
