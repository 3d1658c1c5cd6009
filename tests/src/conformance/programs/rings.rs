//! Rings of io_uring(7).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::refusals::expect;
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "io-uring/idle",
        "a ring with completions that were not taken out and a request that was not submitted",
        idle,
    ),
    Case::new(
        "io-uring/single-issuer",
        "a ring of one thread that is registered with it",
        single_issuer,
    ),
    Case::new(
        "io-uring/large-entries",
        "a ring with entries of double size, and without an array",
        large_entries,
    ),
    Case::new(
        "io-uring/registered",
        "a ring with registered files, buffers and an eventfd",
        registered,
    ),
    Case::new(
        "io-uring/workers",
        "a process with workers of a ring, and completions without requests",
        workers,
    ),
    Case::new(
        "io-uring/disabled",
        "a ring that was not enabled yet",
        disabled,
    ),
    Case::new(
        "io-uring/in-flight",
        "a ring with a request in flight",
        in_flight,
    )
    .refused(),
    Case::new(
        "io-uring/polled",
        "a ring that a thread of the kernel polls",
        polled,
    )
    .refused(),
];

const NOP: u8 = 0;
const WRITE_FIXED: u8 = 5;
const TIMEOUT: u8 = 11;
const MSG_RING: u8 = 40;
const ASYNC: u8 = 1 << 4;
const FIXED_FILE: u8 = 1 << 0;

const SETUP_SQPOLL: u32 = 1 << 1;
const SETUP_R_DISABLED: u32 = 1 << 6;
const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_SQE128: u32 = 1 << 10;
const SETUP_CQE32: u32 = 1 << 11;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
const SETUP_NO_SQARRAY: u32 = 1 << 16;
const ENTER_GETEVENTS: i64 = 1;
const ENTER_REGISTERED_RING: i64 = 1 << 4;

/// A request.
#[derive(Clone, Copy, Default)]
struct Request {
    opcode: u8,
    flags: u8,
    fd: i32,
    offset: u64,
    address: u64,
    len: u32,
    buffer: u16,
    user: u64,
}

impl Request {
    fn nop(user: u64) -> Self {
        Self {
            user,
            ..Self::default()
        }
    }

    fn bytes(&self) -> [u8; 64] {
        let mut b = [0; 64];
        (b[0], b[1]) = (self.opcode, self.flags);
        b[4..8].copy_from_slice(&self.fd.to_ne_bytes());
        b[8..16].copy_from_slice(&self.offset.to_ne_bytes());
        b[16..24].copy_from_slice(&self.address.to_ne_bytes());
        b[24..28].copy_from_slice(&self.len.to_ne_bytes());
        b[32..40].copy_from_slice(&self.user.to_ne_bytes());
        b[40..42].copy_from_slice(&self.buffer.to_ne_bytes());
        b
    }
}

/// A ring, used with nothing but what its memory says.
struct Ring {
    fd: OwnedFd,
    memory: Map,
    sqes: Map,
    p: [u32; 30],
    /// How many were put in, as liburing remembers it.
    put: u32,
}

impl Ring {
    fn new(entries: u32, flags: u32) -> Result<Self> {
        let mut p = [0_u32; 30];
        p[2] = flags;
        let args = [entries.into(), p.as_mut_ptr() as u64, 0, 0, 0, 0];
        // SAFETY: the 120 bytes of io_uring_params.
        let fd = unsafe { sys::call(libc::SYS_io_uring_setup, args) }?;
        // SAFETY: just given to us by the kernel.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let cqe = if flags & SETUP_CQE32 != 0 { 32 } else { 16 };
        let array = match flags & SETUP_NO_SQARRAY {
            0 => p[16] + 4 * p[0],
            _ => 0,
        };
        let len = (p[25] + cqe * p[1]).max(array);
        let sqe = if flags & SETUP_SQE128 != 0 { 128 } else { 64 };
        Ok(Self {
            memory: map(fd.as_fd(), 0, len as usize)?,
            sqes: map(fd.as_fd(), 0x1000_0000, (p[0] * sqe) as usize)?,
            fd,
            p,
            put: 0,
        })
    }

    fn word(&self, at: u32) -> &AtomicU32 {
        assert!(at as usize + 4 <= self.memory.len());
        // SAFETY: inside of the mapping, aligned, and all values are valid.
        unsafe {
            &*self
                .memory
                .ptr()
                .as_ptr()
                .add(at as usize)
                .cast::<AtomicU32>()
        }
    }

    fn get(&self, at: u32) -> u32 {
        self.word(at).load(Ordering::SeqCst)
    }

    /// Puts requests in, to be submitted later.
    fn prepare(&mut self, requests: &[Request]) -> Result<()> {
        for r in requests {
            let free = self.p[0] - self.put.wrapping_sub(self.get(self.p[10]));
            ensure!(free > 0 && free <= self.p[0], "the ring is full: {free}");
            let slot = self.put % self.p[0];
            let size = self.sqes.len() / self.p[0] as usize;
            let at = slot as usize * size;
            let bytes = r.bytes();
            let entry = &mut self.sqes.bytes_mut()[at..at + size];
            entry.fill(0);
            entry[..64].copy_from_slice(&bytes);
            if self.p[2] & SETUP_NO_SQARRAY == 0 {
                let array = self.p[16] + 4 * slot;
                self.word(array).store(slot, Ordering::SeqCst);
            }
            self.put = self.put.wrapping_add(1);
            self.word(self.p[11]).store(self.put, Ordering::SeqCst);
        }
        Ok(())
    }

    fn enter(&self, count: u32) -> Result<()> {
        self.enter_by(self.fd.as_raw_fd().into(), count, 0)
    }

    fn enter_by(&self, number: i64, count: u32, flags: i64) -> Result<()> {
        let args = [number, count.into(), 0, ENTER_GETEVENTS | flags, 0, 0];
        let taken = sys::numbers(libc::SYS_io_uring_enter, &args).context("io_uring_enter")?;
        ensure!(taken == i64::from(count), "{taken} of {count} were taken");
        Ok(())
    }

    fn submit(&mut self, requests: &[Request]) -> Result<()> {
        self.prepare(requests)?;
        self.enter(requests.len() as u32)
    }

    /// Takes out what has completed: (user data, result).
    fn take(&self) -> Vec<(u64, i32)> {
        let (head, tail) = (self.get(self.p[20]), self.get(self.p[21]));
        let size = if self.p[2] & SETUP_CQE32 != 0 { 32 } else { 16 };
        let mut out = Vec::new();
        for n in 0..tail.wrapping_sub(head).min(self.p[1]) {
            let slot = head.wrapping_add(n) % self.p[1];
            let at = self.p[25] + slot * size;
            let (low, high) = (self.get(at), self.get(at + 4));
            let user = u64::from(low) | u64::from(high) << 32;
            out.push((user, self.get(at + 8) as i32));
        }
        self.word(self.p[20]).store(tail, Ordering::SeqCst);
        out
    }

    /// The same, when that many are there.
    fn wait(&self, count: usize) -> Result<Vec<(u64, i32)>> {
        let mut out = self.take();
        while out.len() < count {
            let args = [self.fd.as_raw_fd().into(), 0, 1, ENTER_GETEVENTS, 0, 0];
            sys::numbers(libc::SYS_io_uring_enter, &args)?;
            out.extend(self.take());
        }
        Ok(out)
    }

    fn register(&self, opcode: i64, list: &[u64], count: i64) -> Result<()> {
        let fd = self.fd.as_raw_fd() as u64;
        let at = match list.is_empty() {
            true => 0,
            false => list.as_ptr() as u64,
        };
        let args = [fd, opcode as u64, at, count as u64, 0, 0];
        // SAFETY: callers fill the list as the opcode wants it.
        unsafe { sys::call(libc::SYS_io_uring_register, args) }
            .with_context(|| format!("register {opcode}"))?;
        Ok(())
    }
}

fn map(fd: BorrowedFd<'_>, offset: i64, len: usize) -> Result<Map> {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(null, len, rw, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
    ensure!(at != libc::MAP_FAILED, "mmap: {}", Errno::last());
    let at = NonNull::new(at.cast()).context("mapped at 0")?;
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { Map::from_raw(at, len) })
}

/// A ring works: requests go in and come out.
fn works(f: &mut Findings, ring: &mut Ring, what: &str) -> Result<()> {
    for round in 0..20 {
        let users: Vec<u64> = (0..5).map(|n| round * 10 + n).collect();
        let requests: Vec<Request> = users.iter().map(|u| Request::nop(*u)).collect();
        ring.submit(&requests)?;
        let found: Vec<u64> = ring.take().iter().map(|c| c.0).collect();
        f.same(what, &users, &found);
    }
    Ok(())
}

fn idle(_: &Stage) -> Result<Check> {
    let mut ring = Ring::new(8, 0)?;
    let mut findings = Findings::default();
    works(&mut findings, &mut ring, "before")?;
    // The completions go around the end of their 16 places.
    let mut cycle = 0;
    let mut leave = move |ring: &mut Ring| -> Result<()> {
        cycle += 1;
        for n in 0..7 {
            ring.submit(&[Request::nop(cycle * 1000 + n)])?;
        }
        ring.prepare(&[Request::nop(cycle * 1000 + 500)])
    };
    leave(&mut ring)?;
    let mut seen = 0;
    Ok(Box::new(move |f| {
        seen += 1;
        let left: Vec<_> = (0..7).map(|n| (seen * 1000 + n, 0)).collect();
        f.same("completions that waited", &left, &ring.take());
        ring.enter(1)?;
        let late = vec![(seen * 1000 + 500, 0)];
        f.same("the request that waited", &late, &ring.take());
        works(f, &mut ring, "afterwards")?;
        // As many completions as there is room for, and one more.
        for n in 0..17 {
            ring.submit(&[Request::nop(n)])?;
        }
        f.same("a full ring", &16, &ring.take().len());
        f.same("the one that had no room", &vec![(16, 0)], &ring.wait(1)?);
        leave(&mut ring)
    }))
}

fn single_issuer(_: &Stage) -> Result<Check> {
    let flags = SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_COOP_TASKRUN;
    let (to, jobs) = std::sync::mpsc::channel::<()>();
    let (answer, from) = std::sync::mpsc::channel::<Result<Vec<(u64, i32)>>>();
    std::thread::spawn(move || {
        let own = || -> Result<Ring> {
            let mut ring = Ring::new(8, flags)?;
            // struct io_uring_rsrc_update
            ring.register(20, &[3, ring.fd.as_raw_fd() as u64], 1)?;
            for n in 0..100 {
                ring.submit(&[Request::nop(n)])?;
                ring.take();
            }
            ring.submit(&[Request::nop(77)])?;
            Ok(ring)
        };
        let mut ring = match own() {
            Ok(ring) => {
                let _ = answer.send(Ok(Vec::new()));
                ring
            }
            Err(e) => {
                let _ = answer.send(Err(e));
                return;
            }
        };
        while jobs.recv().is_ok() {
            let mut again = || -> Result<Vec<(u64, i32)>> {
                let mut found = ring.take();
                ring.prepare(&[Request::nop(78), Request::nop(79)])?;
                ring.enter_by(3, 2, ENTER_REGISTERED_RING)?;
                found.extend(ring.take());
                ring.submit(&[Request::nop(77)])?;
                Ok(found)
            };
            let _ = answer.send(again());
        }
    });
    from.recv()??;
    Ok(Box::new(move |f| {
        to.send(())?;
        let found = from.recv()??;
        f.same("completions", &vec![(77, 0), (78, 0), (79, 0)], &found);
        Ok(())
    }))
}

fn large_entries(_: &Stage) -> Result<Check> {
    let mut ring = Ring::new(16, SETUP_SQE128 | SETUP_CQE32 | SETUP_NO_SQARRAY)?;
    ring.submit(&[Request::nop(1), Request::nop(2), Request::nop(3)])?;
    Ok(Box::new(move |f| {
        f.same("completions", &vec![(1, 0), (2, 0), (3, 0)], &ring.take());
        works(f, &mut ring, "afterwards")?;
        ring.submit(&[Request::nop(1), Request::nop(2), Request::nop(3)])
    }))
}

fn registered(_: &Stage) -> Result<Check> {
    let mut ring = Ring::new(8, 0)?;
    let (reader, writer) = std::io::pipe()?;
    let buffer = Map::private(2 * sys::PAGE)?;
    let event = EventFd::from_value_and_flags(0, nix::sys::eventfd::EfdFlags::EFD_NONBLOCK)?;
    // The second slot is empty.
    let fds = [u64::from(u32::MAX) << 32 | writer.as_raw_fd() as u64];
    ring.register(2, &fds, 2)?;
    let vectors = [buffer.addr() as u64, buffer.len() as u64];
    ring.register(0, &vectors, 1)?;
    ring.register(4, &[event.as_fd().as_raw_fd() as u64], 1)?;
    let mut buffer = buffer;
    Ok(Box::new(move |f| {
        f.that("the pipe is open", writer.as_fd().as_raw_fd() > 2);
        let count = event.read();
        f.same("nothing was told meanwhile", &Err(Errno::EAGAIN), &count);
        buffer.bytes_mut()[..5].copy_from_slice(b"hello");
        ring.submit(&[Request {
            opcode: WRITE_FIXED,
            flags: FIXED_FILE,
            fd: 0,
            address: buffer.addr() as u64,
            len: 5,
            user: 9,
            ..Request::default()
        }])?;
        f.same("the write", &vec![(9, 5)], &ring.wait(1)?);
        let mut word = [0; 5];
        std::io::Read::read_exact(&mut &reader, &mut word)?;
        f.same("what was written", b"hello", &word);
        f.same("the eventfd was told", &Ok(1), &event.read());
        Ok(())
    }))
}

fn workers(_: &Stage) -> Result<Check> {
    let mut ring = Ring::new(8, 0)?;
    let mut other = Ring::new(4, 0)?;
    let slow = Request {
        opcode: NOP,
        flags: ASYNC,
        user: 5,
        ..Request::default()
    };
    ring.submit(&[slow])?;
    ensure!(ring.wait(1)? == [(5, 0)], "the worker does nothing");
    let message = Request {
        opcode: MSG_RING,
        fd: ring.fd.as_raw_fd(),
        offset: 1234,
        len: 3,
        ..Request::default()
    };
    other.submit(&[message, message])?;
    other.wait(2)?;
    ensure!(ring.take() == [(1234, 3), (1234, 3)], "no messages");
    other.submit(&[message])?;
    other.wait(1)?;
    Ok(Box::new(move |f| {
        f.same("the message", &vec![(1234, 3)], &ring.take());
        works(f, &mut ring, "afterwards")?;
        ring.submit(&[slow])?;
        f.same("a worker's", &vec![(5, 0)], &ring.wait(1)?);
        other.submit(&[message])?;
        other.wait(1)?;
        Ok(())
    }))
}

fn disabled(_: &Stage) -> Result<Check> {
    let mut ring = Some(Ring::new(4, SETUP_R_DISABLED)?);
    Ok(Box::new(move |f| {
        if let Some(mut ring) = ring.take() {
            ring.prepare(&[Request::nop(8)])?;
            f.that("it is disabled", ring.enter(1).is_err());
            ring.register(12, &[], 0)?;
            ring.enter(1)?;
            f.same("the request", &vec![(8, 0)], &ring.take());
        }
        ring = Some(Ring::new(4, SETUP_R_DISABLED)?);
        Ok(())
    }))
}

fn in_flight(stage: &Stage) -> Result<Check> {
    let mut ring = Ring::new(8, 0)?;
    let never = Box::leak(Box::new([1_000_000_u64, 0]));
    ring.submit(&[Request {
        opcode: TIMEOUT,
        fd: -1,
        address: never.as_ptr() as u64,
        len: 1,
        user: 1,
        ..Request::default()
    }])?;
    expect(stage, &ring.fd, "requests are in flight: 1")?;
    Ok(Box::new(move |f| works(f, &mut ring, "it still works")))
}

fn polled(stage: &Stage) -> Result<Check> {
    let mut ring = Ring::new(8, SETUP_SQPOLL)?;
    expect(stage, &ring.fd, "SQPOLL")?;
    Ok(Box::new(move |f| {
        ring.prepare(&[Request::nop(4)])?;
        sys::numbers(
            libc::SYS_io_uring_enter,
            // IORING_ENTER_SQ_WAKEUP
            &[ring.fd.as_raw_fd().into(), 1, 1, ENTER_GETEVENTS | 2, 0, 0],
        )?;
        f.same("it still works", &vec![(4, 0)], &ring.wait(1)?);
        Ok(())
    }))
}
