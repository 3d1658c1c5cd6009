//! The descriptors of a table, looked at by several threads at once: none of
//! what is read here depends on another one.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::stat::{FileStat, fstat};

use super::super::examined::Early;
use super::super::fdinfo::FdInfo;
use super::super::reg::TaskRoot;
use super::super::{TaskFiles, sys};
use super::{FileError, proc};
use crate::sys::{SysError, parallel};

/// Fewer descriptors than this for each are not worth a thread.
const SHARE_MIN: usize = 64;
/// More than `fdinfo` of most files has.
const FDINFO_BYTES: usize = 4 << 10;

/// What one descriptor leads to.
#[derive(Debug)]
pub(super) struct Look {
    /// Our duplicate.
    pub dup: OwnedFd,
    pub stat: FileStat,
    pub info: FdInfo,
    /// What `/proc/PID/fd/N` points to.
    pub link: String,
    pub early: Early,
}

/// A task's directories of descriptors.
struct Places {
    links: OwnedFd,
    infos: OwnedFd,
    root: Option<TaskRoot>,
}

/// Looks at the descriptors with these numbers, in their order.
pub(super) fn all(
    task: &TaskFiles<'_>,
    numbers: &[u32],
) -> Result<Vec<Result<Look, FileError>>, FileError> {
    let dir = |name: &str| {
        let path = format!("/proc/{}/{name}", task.voice);
        super::super::reg::open_dir(&path).map_err(|e| proc(task, &path, e))
    };
    let places = Places {
        links: dir("fd")?,
        infos: dir("fdinfo")?,
        root: TaskRoot::open(task.voice).ok(),
    };
    make_room(places.links.as_fd(), numbers.len());
    Ok(parallel::map(numbers, SHARE_MIN, |&fd| {
        one(task, fd, &places)
    }))
}

/// Lets our table grow before threads share it: from then on each time it does,
/// the kernel waits for all processors (`expand_fdtable`).
fn make_room(any: BorrowedFd<'_>, descriptors: usize) {
    let highest = any.as_raw_fd() as usize + descriptors;
    // Without it all is slower, but the same.
    let _ = rustix::io::fcntl_dupfd_cloexec(any, highest as RawFd);
}

fn one(task: &TaskFiles<'_>, fd: u32, places: &Places) -> Result<Look, FileError> {
    let object = || format!("fd {fd}");
    let failed = |source| FileError::Task {
        pid: task.pid,
        object: object(),
        source,
    };
    let dup = sys::pidfd_getfd(task.pidfd, fd as i32).map_err(failed)?;
    let stat = fstat(&dup).map_err(|e| failed(SysError::new("fstat", object(), e)))?;
    let info = read_info(places.infos.as_fd(), fd, |text| {
        FdInfo::parse(&String::from_utf8_lossy(text))
    });
    let info = info.map_err(|e| e.to_string()).and_then(|parsed| parsed);
    let info = info.map_err(|e| proc(task, &format!("/proc/{}/fdinfo/{fd}", task.voice), e))?;
    let link = rustix::fs::readlinkat(&places.links, number(fd), Vec::new());
    let link = link.map_err(|e| proc(task, &format!("/proc/{}/fd/{fd}", task.voice), e))?;
    let link = link.to_string_lossy().into_owned();
    let early = Early::of(dup.as_fd(), &info, &stat, &link, places.root.as_ref());
    Ok(Look {
        dup,
        stat,
        info,
        link,
        early: early.map_err(failed)?,
    })
}

fn number(fd: u32) -> CString {
    CString::new(fd.to_string()).expect("digits have no NUL")
}

/// The kernel gives the whole text at once to whoever has room for it.
fn read_info<T>(dir: BorrowedFd<'_>, fd: u32, look: impl FnOnce(&[u8]) -> T) -> std::io::Result<T> {
    use rustix::fs::{Mode, OFlags};
    let mut buffer = [0; FDINFO_BYTES];
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, number(fd), flags, Mode::empty())?);
    let len = file.read(&mut buffer)?;
    if len < buffer.len() {
        return Ok(look(&buffer[..len]));
    }
    let mut text = buffer.to_vec();
    file.read_to_end(&mut text)?;
    Ok(look(&text))
}
