//! A userfaultfd that brings pages on demand (userfaultfd(2), ioctl_userfaultfd(2),
//! linux/userfaultfd.h), and the processes that serve it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::{ForkResult, fork};

use super::process::{CloneArgs, pidfd_open};
use super::{SysError, SysResult};

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd` (`_IO(0xAA, 0x00)`): a new
/// userfaultfd for the caller's memory, faults of the kernel included.
pub const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

const UFFD_API: u64 = 0xaa;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const REGISTER_MODE_MISSING: u64 = 1;

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

/// Bytes of a `struct uffd_msg`.
const MSG_BYTES: usize = 32;
/// How many are read at once.
const MSGS: usize = 16;

/// What the memory's owner has done or waits for.
#[derive(Debug)]
pub enum PageEvent {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// It forked: the child's memory is served through this one.
    Fork(PageServer),
    /// Mappings were moved (mremap(2)).
    Moved {
        /// The old address.
        from: u64,
        /// The new one.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Pages were given up (`MADV_DONTNEED` and the like): they are zero now.
    Dropped(Range<u64>),
    /// The mappings are gone.
    Unmapped(Range<u64>),
}

/// How far bringing pages came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brought {
    /// This many bytes from the start.
    Some(u64),
    /// The page at the start is there already.
    Present,
    /// There is no mapping of ours at the start, or not up to the end.
    NoMapping,
    /// The owner is changing its mappings: first look at what it does.
    Changing,
    /// No memory, or not within the owner's limits.
    NoMemory,
    /// The memory is gone as a whole.
    Gone,
}

/// Serves the missing pages of one address space.
#[derive(Debug)]
pub struct PageServer(OwnedFd);

impl PageServer {
    /// Takes over a new userfaultfd, which must not block.
    pub fn new(fd: OwnedFd) -> SysResult<Self> {
        let features =
            FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP;
        let mut api = [UFFD_API, features, 0];
        // SAFETY: the call reads and writes a uffdio_api of three words.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        if r < 0 {
            return Err(SysError::last("ioctl(UFFDIO_API)", "userfaultfd"));
        }
        Ok(Self(fd))
    }

    /// From now on whoever touches a missing page of the range waits for us.
    pub fn add(&self, range: &Range<u64>) -> SysResult<()> {
        let len = range.end - range.start;
        let mut arg = [range.start, len, REGISTER_MODE_MISSING, 0];
        // SAFETY: the call reads and writes a uffdio_register of four words.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, arg.as_mut_ptr()) };
        if r < 0 {
            let on = format!("{:x}-{:x}", range.start, range.end);
            return Err(SysError::last("ioctl(UFFDIO_REGISTER)", on));
        }
        Ok(())
    }

    /// Makes pages with this content, as long as they are missing, and wakes
    /// who waits for them. Address and length are multiples of a page.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> SysResult<Brought> {
        let len = bytes.len() as u64;
        let mut arg = [to, bytes.as_ptr() as u64, len, 0, 0];
        // SAFETY: the call reads and writes a uffdio_copy of five words and reads
        // `bytes`.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, arg.as_mut_ptr()) };
        outcome("ioctl(UFFDIO_COPY)", r, arg[4] as i64, to, len)
    }

    /// Makes missing pages zero pages.
    pub fn zero(&self, range: &Range<u64>) -> SysResult<Brought> {
        let len = range.end - range.start;
        let mut arg = [range.start, len, 0, 0];
        // SAFETY: the call reads and writes a uffdio_zeropage of four words.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, arg.as_mut_ptr()) };
        let done = arg[3] as i64;
        outcome("ioctl(UFFDIO_ZEROPAGE)", r, done, range.start, len)
    }

    /// Wakes who waits for pages that are there.
    pub fn wake(&self, range: &Range<u64>) -> SysResult<()> {
        let mut arg = [range.start, range.end - range.start];
        // SAFETY: the call reads a uffdio_range of two words.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, arg.as_mut_ptr()) };
        match Errno::result(r) {
            Ok(_) | Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
            Err(e) => Err(SysError::new("ioctl(UFFDIO_WAKE)", "userfaultfd", e)),
        }
    }

    /// What has happened; empty when nothing has.
    pub fn events(&self) -> SysResult<Vec<PageEvent>> {
        let mut buf = [0u64; MSGS * MSG_BYTES / 8];
        // SAFETY: the call writes at most the whole buffer.
        let n = unsafe {
            libc::read(
                self.0.as_raw_fd(),
                buf.as_mut_ptr().cast(),
                size_of_val(&buf),
            )
        };
        match Errno::result(n) {
            Ok(n) => buf[..n as usize / 8]
                .chunks_exact(MSG_BYTES / 8)
                .map(event)
                .collect(),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Vec::new()),
            Err(e) => Err(SysError::new("read", "userfaultfd", e)),
        }
    }
}

impl AsFd for PageServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn event(msg: &[u64]) -> SysResult<PageEvent> {
    let [head, a, b, c] = msg else {
        unreachable!("messages have four words")
    };
    Ok(match head.to_ne_bytes()[0] {
        EVENT_PAGEFAULT => PageEvent::Fault(*b),
        EVENT_FORK => {
            // SAFETY: the kernel has just given us this descriptor (the first
            // four bytes of the message's argument); nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(*a as u32 as RawFd) };
            PageEvent::Fork(PageServer(fd))
        }
        EVENT_REMAP => PageEvent::Moved {
            from: *a,
            to: *b,
            len: *c,
        },
        EVENT_REMOVE => PageEvent::Dropped(*a..*b),
        EVENT_UNMAP => PageEvent::Unmapped(*a..*b),
        _ => return Err(SysError::new("read", "userfaultfd", Errno::EPROTO)),
    })
}

/// `done` is what the call noted: bytes, or the errno of the first page.
fn outcome(call: &'static str, r: i32, done: i64, at: u64, len: u64) -> SysResult<Brought> {
    if r == 0 {
        return Ok(Brought::Some(len));
    }
    let errno = Errno::last();
    if errno == Errno::EAGAIN && done > 0 {
        return Ok(Brought::Some(done as u64));
    }
    match errno {
        Errno::EAGAIN => Ok(Brought::Changing),
        Errno::EEXIST => Ok(Brought::Present),
        Errno::ENOENT => Ok(Brought::NoMapping),
        Errno::ENOMEM => Ok(Brought::NoMemory),
        Errno::ESRCH => Ok(Brought::Gone),
        e => Err(SysError::new(call, format!("{at:x}, {len} bytes"), e)),
    }
}

/// Starts a process that runs `work` with `kept` as its only descriptor but
/// for the standard ones, which lead to /dev/null. It belongs to nobody's
/// session and goes on when we end. We must have a single thread.
pub fn fork_off(
    name: &std::ffi::CStr,
    kept: OwnedFd,
    work: impl FnOnce(OwnedFd) -> i32,
) -> io::Result<i32> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    // SAFETY: we have a single thread, so the child may do whatever we may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            let number = kept.as_raw_fd();
            // SAFETY: numbers and a pointer to a live string; descriptors that
            // are closed belong to values of our parent that nobody drops here,
            // since this branch never returns.
            unsafe {
                libc::setsid();
                libc::chdir(c"/".as_ptr());
                libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                for n in 0..3 {
                    libc::dup2(null.as_raw_fd(), n);
                }
                if number > 3 {
                    libc::close_range(3, number as u32 - 1, 0);
                }
                libc::close_range(number as u32 + 1, u32::MAX, 0);
            }
            let work = std::panic::AssertUnwindSafe(|| work(kept));
            let code = std::panic::catch_unwind(work).unwrap_or(101);
            // SAFETY: ends the process without running our parent's destructors.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Starts a process that shares our descriptor table (`CLONE_FILES`), so that
/// what we hold stays open when we end. When that happens it runs `work`. Gives
/// its pid; killing it is the way to end it before.
pub fn guard(name: &std::ffi::CStr, work: impl FnOnce()) -> SysResult<i32> {
    let ours = pidfd_open(std::process::id() as i32)?;
    let args = CloneArgs {
        flags: libc::CLONE_FILES as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: `args` lives across the call. No CLONE_VM: the child works on a
    // copy of our memory, and we have a single thread.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match r {
        0 => {
            let mut end = libc::pollfd {
                fd: ours.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: a pointer to a live string, and one to a live pollfd.
            unsafe {
                libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                while libc::poll(&mut end, 1, -1) < 1 {}
            }
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: ends the process without running destructors that are
            // another's.
            unsafe { libc::_exit(0) }
        }
        r if r < 0 => Err(SysError::last("clone3", "guard")),
        // The pidfd stays open: the guard's is the same one.
        r => {
            std::mem::forget(ours);
            Ok(r as i32)
        }
    }
}
