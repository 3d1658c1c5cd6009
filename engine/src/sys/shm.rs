//! System V shared memory calls (shmget(2), shmctl(2), shmat(2)).

use std::mem::zeroed;

use super::{SysError, SysResult};

/// A segment's state (`IPC_STAT`).
pub fn stat(id: i32) -> SysResult<libc::shmid_ds> {
    // SAFETY: plain integers; all-zero is a valid value.
    let mut s: libc::shmid_ds = unsafe { zeroed() };
    // SAFETY: `s` is a live local of the type the command fills.
    let r = unsafe { libc::shmctl(id, libc::IPC_STAT, &mut s) };
    if r < 0 {
        Err(SysError::last("shmctl(IPC_STAT)", format!("segment {id}")))
    } else {
        Ok(s)
    }
}

/// Makes a new segment; returns its id.
pub fn create(key: i32, size: usize, mode: i32) -> SysResult<i32> {
    // SAFETY: numbers only.
    let r = unsafe { libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | mode) };
    if r < 0 {
        Err(SysError::last("shmget", format!("key {key:#x}")))
    } else {
        Ok(r)
    }
}

/// Sets owner and mode (`IPC_SET`).
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> SysResult<()> {
    let mut s = stat(id)?;
    s.shm_perm.uid = uid;
    s.shm_perm.gid = gid;
    s.shm_perm.mode = mode as _;
    // SAFETY: `s` is a live local of the type the command reads.
    let r = unsafe { libc::shmctl(id, libc::IPC_SET, &mut s) };
    if r < 0 {
        Err(SysError::last("shmctl(IPC_SET)", format!("segment {id}")))
    } else {
        Ok(())
    }
}

/// Removes a segment once nobody is attached (`IPC_RMID`).
pub fn remove(id: i32) -> SysResult<()> {
    // SAFETY: the command takes no buffer.
    let r = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    if r < 0 {
        Err(SysError::last("shmctl(IPC_RMID)", format!("segment {id}")))
    } else {
        Ok(())
    }
}

/// A segment attached to this process for a while.
#[derive(Debug)]
pub struct Attached {
    start: *mut u8,
    len: usize,
}

impl Attached {
    /// Attaches a segment of `len` bytes for writing.
    pub fn new(id: i32, len: usize) -> SysResult<Self> {
        // SAFETY: the kernel chooses a free address.
        let start = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if start as isize == -1 {
            return Err(SysError::last("shmat", format!("segment {id}")));
        }
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    /// Its memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the segment is at least `len` long, since its size was given
        // at creation, stays attached as long as `self`, and the restored
        // processes that share it do not exist or are stopped.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached in `new`, and no borrow of it is left.
        unsafe { libc::shmdt(self.start.cast()) };
    }
}
