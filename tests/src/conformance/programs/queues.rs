//! POSIX message queues.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};

use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "mqueue/named",
        "a POSIX message queue of the host's with messages of several priorities",
        named,
    ),
    Case::new(
        "mqueue/removed",
        "a POSIX message queue that has lost its name, opened twice",
        removed,
    ),
    Case::new(
        "mqueue/namespace",
        "POSIX message queues of an IPC namespace, open and not",
        namespace,
    ),
    Case::new(
        "mqueue/notify",
        "a POSIX message queue whose next message is told by a signal",
        notify,
    ),
];

/// A queue by its descriptor.
struct Queue(OwnedFd);

impl Queue {
    fn open(name: &CString, flags: i32, room: Option<(i64, i64)>) -> Result<Self> {
        let attr = room.map(|(count, bytes)| [0, count, bytes, 0, 0, 0, 0, 0]);
        let at = attr.as_ref().map_or(0, |a| a.as_ptr() as u64);
        let args = [name.as_ptr() as u64, flags as u64, 0o640, at, 0, 0];
        // SAFETY: a string and a structure that live across the call.
        let fd = unsafe { sys::call(libc::SYS_mq_open, args) }.context("mq_open")?;
        // SAFETY: just given to us by the kernel.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    fn made(name: &CString) -> Result<Self> {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK;
        Self::open(name, flags, Some((8, 5000)))
    }

    fn send(&self, text: &[u8], priority: u64) -> Result<()> {
        let fd = self.0.as_raw_fd() as u64;
        let args = [fd, text.as_ptr() as u64, text.len() as u64, priority, 0, 0];
        // SAFETY: the text lives across the call.
        unsafe { sys::call(libc::SYS_mq_timedsend, args) }.context("mq_send")?;
        Ok(())
    }

    fn receive(&self) -> Result<(Vec<u8>, u32)> {
        let mut text = vec![0; 5000];
        let mut priority = 0_u32;
        let at = &raw mut priority as u64;
        let fd = self.0.as_raw_fd() as u64;
        let args = [fd, text.as_mut_ptr() as u64, text.len() as u64, at, 0, 0];
        // SAFETY: the buffer and the number live across the call.
        let len = unsafe { sys::call(libc::SYS_mq_timedreceive, args) }.context("mq_receive")?;
        text.truncate(len as usize);
        Ok((text, priority))
    }

    /// Room, longest message, and how many are in it.
    fn attributes(&self) -> Result<[i64; 3]> {
        let mut attr = [0_i64; 8];
        let args = [
            self.0.as_raw_fd() as u64,
            0,
            attr.as_mut_ptr() as u64,
            0,
            0,
            0,
        ];
        // SAFETY: the structure lives across the call.
        unsafe { sys::call(libc::SYS_mq_getsetattr, args) }.context("mq_getattr")?;
        Ok([attr[1], attr[2], attr[3]])
    }
}

fn name(stage: &Stage, what: &str) -> Result<CString> {
    let dir = stage.path(what);
    // No slashes.
    let name = dir.to_string_lossy().replace('/', "-");
    let start = name.len().saturating_sub(200);
    Ok(CString::new(format!("q{}", &name[start..]))?)
}

fn unlink(name: &CString) -> Result<()> {
    let args = [name.as_ptr() as u64, 0, 0, 0, 0, 0];
    // SAFETY: a string that lives across the call.
    unsafe { sys::call(libc::SYS_mq_unlink, args) }.context("mq_unlink")?;
    Ok(())
}

/// Messages in the order in which they go in.
fn fill(queue: &Queue) -> Result<()> {
    let long: Vec<u8> = (0..5000_u32).map(|n| n as u8).collect();
    queue.send(b"low", 1)?;
    queue.send(&long, 30)?;
    queue.send(b"first", 7)?;
    queue.send(b"", 7)?;
    queue.send(b"last", 0)
}

/// What comes out is what [`fill`] put in.
fn filled(f: &mut Findings, queue: &Queue) -> Result<()> {
    f.same("attributes", &[8, 5000, 5], &queue.attributes()?);
    let long: Vec<u8> = (0..5000_u32).map(|n| n as u8).collect();
    let order: [(&[u8], u32); 5] = [
        (&long, 30),
        (b"first", 7),
        (b"", 7),
        (b"low", 1),
        (b"last", 0),
    ];
    for (text, priority) in order {
        let expected = (text.to_vec(), priority);
        f.same("a message", &expected, &queue.receive()?);
    }
    f.that("the queue is empty", queue.receive().is_err());
    Ok(())
}

fn named(stage: &Stage) -> Result<Check> {
    let name = name(stage, "named")?;
    let queue = Queue::made(&name)?;
    fill(&queue)?;
    let sender = Queue::open(&name, libc::O_WRONLY, None)?;
    Ok(Box::new(move |f| {
        filled(f, &queue)?;
        fill(&sender)?;
        filled(
            f,
            &Queue::open(&name, libc::O_RDONLY | libc::O_NONBLOCK, None)?,
        )?;
        fill(&sender)
    }))
}

fn removed(stage: &Stage) -> Result<Check> {
    let name = name(stage, "removed")?;
    let sender = Queue::made(&name)?;
    let receiver = Queue::open(&name, libc::O_RDONLY | libc::O_NONBLOCK, None)?;
    unlink(&name)?;
    fill(&sender)?;
    Ok(Box::new(move |f| {
        filled(f, &receiver)?;
        f.that("it has no name", unlink(&name).is_err());
        let stat = nix::sys::stat::fstat(sender.0.as_fd())?;
        f.same("permissions", &0o640, &(stat.st_mode & 0o777));
        fill(&sender)
    }))
}

fn namespace(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWIPC).context("unshare")?;
    let (open, closed) = (c"open".to_owned(), c"closed".to_owned());
    let queue = Queue::made(&open)?;
    fill(&queue)?;
    fill(&Queue::made(&closed)?)?;
    Ok(Box::new(move |f| {
        filled(f, &queue)?;
        fill(&queue)?;
        filled(
            f,
            &Queue::open(&open, libc::O_RDWR | libc::O_NONBLOCK, None)?,
        )?;
        fill(&queue)?;
        let other = Queue::open(&closed, libc::O_RDWR | libc::O_NONBLOCK, None)?;
        filled(f, &other)?;
        fill(&other)
    }))
}

fn notify(stage: &Stage) -> Result<Check> {
    const VALUE: u64 = 0x1234_5678_9abc;
    let signal = libc::SIGUSR1;
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(nix::sys::signal::Signal::SIGUSR1);
    set.thread_block()?;
    let name = name(stage, "notify")?;
    let queue = Queue::made(&name)?;
    unlink(&name)?;
    let ask = move |queue: &Queue| -> Result<()> {
        // struct sigevent: value, signal, SIGEV_SIGNAL.
        let event = [VALUE, signal as u64, 0, 0, 0, 0, 0, 0];
        let args = [
            queue.0.as_raw_fd() as u64,
            event.as_ptr() as u64,
            0,
            0,
            0,
            0,
        ];
        // SAFETY: the structure lives across the call.
        unsafe { sys::call(libc::SYS_mq_notify, args) }.context("mq_notify")?;
        Ok(())
    };
    ask(&queue)?;
    Ok(Box::new(move |f| {
        queue.send(b"news", 3)?;
        let mut info = [0_u64; 16];
        let mask = 1_u64 << (signal - 1);
        let wait = [5_u64, 0];
        let args = [
            &raw const mask as u64,
            info.as_mut_ptr() as u64,
            wait.as_ptr() as u64,
            8,
            0,
            0,
        ];
        // SAFETY: mask, information and time live across the call.
        let got = unsafe { sys::call(libc::SYS_rt_sigtimedwait, args) };
        f.same(
            "the signal",
            &i64::from(signal),
            &got.context("sigtimedwait")?,
        );
        f.same("what came with it", &VALUE, &info[3]);
        f.same("the message", &(b"news".to_vec(), 3), &queue.receive()?);
        ask(&queue)
    }))
}
