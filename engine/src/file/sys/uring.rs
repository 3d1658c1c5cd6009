//! Raw calls of io_uring(7), and its shared memory.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::errno::Errno;

use super::{done, owned};
use crate::sys::{SysError, SysResult};

/// `IORING_OFF_SQES`; the other parts are mapped at 0.
pub(crate) const OFFSET_OF_SQES: u64 = 0x1000_0000;

/// `struct io_uring_params` (linux/io_uring.h), as words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RingParameters(pub [u32; 30]);

impl RingParameters {
    pub(crate) fn sq_entries(&self) -> u32 {
        self.0[0]
    }
    pub(crate) fn cq_entries(&self) -> u32 {
        self.0[1]
    }
    /// Where everything is: `sq_off` and `cq_off`.
    pub(crate) fn offsets(&self) -> &[u32] {
        &self.0[10..]
    }
}

/// Makes a ring: io_uring_setup(2).
pub(crate) fn ring_setup(entries: u32, p: &mut RingParameters) -> SysResult<OwnedFd> {
    // SAFETY: the call reads and fills the 120 bytes of the structure.
    let r = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, p.0.as_mut_ptr()) };
    owned("io_uring_setup", format!("{entries} entries"), r)
}

/// Submits requests: io_uring_enter(2). Gives how many were taken.
pub(crate) fn ring_enter(ring: BorrowedFd<'_>, count: u32) -> SysResult<u32> {
    let fd = ring.as_raw_fd();
    // SAFETY: numbers only; the requests were put into the ring by the caller,
    // who sees to it that they point to nothing.
    let r = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, count, 0, 0, 0, 0) };
    done("io_uring_enter", fd, r).map(|n| n as u32)
}

fn ring_register<T>(ring: BorrowedFd<'_>, opcode: u32, list: &[T], count: u32) -> SysResult<()> {
    let (fd, at) = (ring.as_raw_fd(), list.as_ptr());
    // SAFETY: the call reads the list, which callers fill as the opcode wants it.
    let r = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, opcode, at, count) };
    done("io_uring_register", format!("opcode {opcode}"), r).map(drop)
}

/// Registers files; -1 leaves a slot empty.
pub(crate) fn ring_files(ring: BorrowedFd<'_>, files: &[RawFd]) -> SysResult<()> {
    const REGISTER_FILES: u32 = 2;
    ring_register(ring, REGISTER_FILES, files, files.len() as u32)
}

/// Registers an eventfd that is told of completions, or of those of workers only.
pub(crate) fn ring_eventfd(ring: BorrowedFd<'_>, eventfd: RawFd, workers: bool) -> SysResult<()> {
    const REGISTER_EVENTFD: u32 = 4;
    const REGISTER_EVENTFD_ASYNC: u32 = 7;
    let opcode = match workers {
        true => REGISTER_EVENTFD_ASYNC,
        false => REGISTER_EVENTFD,
    };
    ring_register(ring, opcode, &[eventfd], 1)
}

/// Part of a ring's memory, mapped for as long as this lives.
#[derive(Debug)]
pub(crate) struct RingMemory {
    at: NonNull<u8>,
    len: usize,
}

impl RingMemory {
    /// Maps `len` bytes at one of the offsets that mean something.
    pub(crate) fn map(ring: impl AsFd, offset: u64, len: usize) -> SysResult<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let fd = ring.as_fd().as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                rw,
                libc::MAP_SHARED,
                fd,
                offset as i64,
            )
        };
        match NonNull::new(at.cast::<u8>()) {
            Some(at) if at.as_ptr() != libc::MAP_FAILED.cast() => Ok(Self { at, len }),
            _ => Err(SysError::new("mmap", "io_uring", Errno::last())),
        }
    }

    /// What is there now.
    pub(crate) fn read(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        // SAFETY: inside of the mapping, which lives as long as `self`; others
        // may write to it meanwhile, and any bytes are valid.
        unsafe { std::ptr::copy_nonoverlapping(self.at.as_ptr(), out.as_mut_ptr(), self.len) };
        out
    }

    /// Overwrites; what lies beyond the end is left out.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        let start = offset.min(self.len);
        let n = bytes.len().min(self.len - start);
        // SAFETY: inside of the mapping, which lives as long as `self`, and of
        // which nobody has a reference.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.as_ptr().add(start), n) };
    }

    /// The word at an offset.
    pub(crate) fn word(&self, offset: u32) -> u32 {
        let bytes = self.read();
        let word = bytes.get(offset as usize..offset as usize + 4);
        word.map_or(0, |w| u32::from_le_bytes(w.try_into().expect("4 bytes")))
    }

    /// Sets the word at an offset.
    pub(crate) fn set_word(&self, offset: u32, value: u32) {
        self.write(offset as usize, &value.to_le_bytes());
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody else knows of it.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}
