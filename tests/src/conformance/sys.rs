//! The raw calls the programs and the runner need, with typed edges.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Size of a page.
pub const PAGE: usize = 4096;

/// Closes what the caller was given beyond stdin, stdout and stderr.
pub fn close_inherited() {
    // SAFETY: called first thing in `main`, when nothing here owns a descriptor,
    // and in forks that use nothing of what they were given.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// A system call by number whose arguments are integers or point to memory
/// that lives through the call.
///
/// # Safety
/// As for the call itself.
pub unsafe fn call(number: i64, args: [u64; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: up to the caller.
    let r = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(r)
}

/// A system call that takes numbers and no pointers.
pub fn numbers(number: i64, args: &[i64]) -> io::Result<i64> {
    let mut all = [0; 6];
    for (to, from) in all.iter_mut().zip(args) {
        *to = *from as u64;
    }
    // SAFETY: callers pass no addresses; see the name.
    unsafe { call(number, all) }
}

/// prctl(2) with numbers.
pub fn prctl(option: i32, args: &[i64]) -> io::Result<i64> {
    let mut all = vec![i64::from(option)];
    all.extend(args);
    numbers(libc::SYS_prctl, &all)
}

/// This thread's id.
pub fn gettid() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// A mapping of our own; unmapped on drop.
#[derive(Debug)]
pub struct Map {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory, accessed through this value or raw addresses.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Anonymous memory.
    pub fn anonymous(len: usize, prot: ProtFlags, flags: MapFlags) -> nix::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(nix::errno::Errno::EINVAL)?;
        // SAFETY: the kernel chooses a free place.
        let at = unsafe { mmap_anonymous(None, size, prot, flags) }?;
        Ok(Self { at: at.cast(), len })
    }

    /// Private, readable and writable anonymous memory.
    pub fn private(len: usize) -> nix::Result<Self> {
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Self::anonymous(len, rw, MapFlags::MAP_PRIVATE)
    }

    /// Anonymous memory shared with children.
    pub fn shared(len: usize) -> nix::Result<Self> {
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Self::anonymous(len, rw, MapFlags::MAP_SHARED)
    }

    /// Shared memory that lives as long as the program, and its forks.
    pub fn forever(len: usize) -> nix::Result<&'static Self> {
        Ok(Box::leak(Box::new(Self::shared(len)?)))
    }

    /// Takes over a mapping.
    ///
    /// # Safety
    /// It is nobody else's.
    pub unsafe fn from_raw(at: NonNull<u8>, len: usize) -> Self {
        Self { at, len }
    }

    /// Its address.
    pub fn addr(&self) -> usize {
        self.at.as_ptr() as usize
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.len
    }

    /// It never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its start.
    pub fn ptr(&self) -> NonNull<u8> {
        self.at
    }

    /// Its bytes; they must be readable now.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: ours, mapped until drop; readable as asked of the caller.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    /// Its bytes; they must be writable now.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }

    /// A counter in it, shared with whoever shares the memory.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.len);
        // SAFETY: inside, aligned since mappings start at pages, and all-zero is valid.
        unsafe { &*self.at.as_ptr().cast::<AtomicU64>().add(index) }
    }

    /// A futex in it.
    pub fn futex(&self, index: usize) -> &AtomicU32 {
        assert!((index + 1) * 4 <= self.len);
        // SAFETY: as in `word`.
        unsafe { &*self.at.as_ptr().cast::<AtomicU32>().add(index) }
    }

    /// Changes its protection.
    pub fn protect(&self, prot: ProtFlags) -> nix::Result<()> {
        // SAFETY: ours; whoever uses it afterwards keeps to the new protection.
        unsafe { nix::sys::mman::mprotect(self.at.cast(), self.len, prot) }
    }

    /// madvise(2).
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: ours; the advices used keep or zero its content.
        let r = unsafe { libc::madvise(self.at.as_ptr().cast(), self.len, advice) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: ours alone.
        let _ = unsafe { munmap(self.at.cast(), self.len) };
    }
}

/// Waits on a futex while it holds `value`; false: woken by a signal.
pub fn futex_wait(word: &AtomicU32, value: u32) -> bool {
    let op = libc::FUTEX_WAIT as u64;
    let at = word.as_ptr() as u64;
    // SAFETY: the word outlives the call; no timeout is given.
    match unsafe { call(libc::SYS_futex, [at, op, value.into(), 0, 0, 0]) } {
        Ok(_) => true,
        Err(e) => e.raw_os_error() != Some(libc::EINTR),
    }
}

/// Wakes everybody who waits on a futex; how many there were.
pub fn futex_wake(word: &AtomicU32) -> i64 {
    let op = libc::FUTEX_WAKE as u64;
    let at = word.as_ptr() as u64;
    // SAFETY: the word outlives the call.
    unsafe { call(libc::SYS_futex, [at, op, i32::MAX as u64, 0, 0, 0]) }.unwrap_or(0)
}

/// Waits until a shared counter has reached a value.
pub fn await_word(word: &AtomicU64, value: u64) {
    while word.load(Ordering::SeqCst) < value {
        std::thread::sleep(super::stage::POLL);
    }
}

/// Nanoseconds of a clock.
pub fn clock(id: i32) -> i64 {
    let t = nix::time::clock_gettime(nix::time::ClockId::from_raw(id)).expect("a known clock");
    t.tv_sec() * 1_000_000_000 + t.tv_nsec()
}

/// The same by the system call itself.
pub fn clock_by_call(id: i32) -> i64 {
    let mut t = [0_i64; 2];
    let at = t.as_mut_ptr() as u64;
    // SAFETY: the buffer is a timespec's size and outlives the call.
    unsafe { call(libc::SYS_clock_gettime, [id as u64, at, 0, 0, 0, 0]) }.expect("a known clock");
    t[0] * 1_000_000_000 + t[1]
}

/// A number that a descriptor has.
pub fn raw(fd: &impl std::os::fd::AsRawFd) -> RawFd {
    fd.as_raw_fd()
}

/// A socket option's bytes, at most `max` of them.
pub fn get_option(
    fd: &impl std::os::fd::AsRawFd,
    level: i32,
    name: i32,
    max: usize,
) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    let at = bytes.as_mut_ptr().cast();
    // SAFETY: the buffer has `len` bytes; the kernel writes no more and says how many.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, at, &raw mut len) };
    if r < 0 {
        let e = io::Error::last_os_error();
        return Err(anyhow::Error::new(e).context(format!("option {name} of level {level}")));
    }
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// Sets a socket option that is a number.
pub fn set_option(
    fd: &impl std::os::fd::AsRawFd,
    level: i32,
    name: i32,
    value: i32,
) -> anyhow::Result<()> {
    set_option_bytes(fd, level, name, &value.to_ne_bytes())
}

/// Sets a socket option.
pub fn set_option_bytes(
    fd: &impl std::os::fd::AsRawFd,
    level: i32,
    name: i32,
    value: &[u8],
) -> anyhow::Result<()> {
    let (at, len) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of a live slice.
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, at, len) };
    if r < 0 {
        let e = io::Error::last_os_error();
        return Err(anyhow::Error::new(e).context(format!("option {name} of level {level}")));
    }
    Ok(())
}
