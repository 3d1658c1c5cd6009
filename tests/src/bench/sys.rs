//! The raw calls of the benchmarks.

use std::io;

use nix::sys::mman::{ProtFlags, mprotect};

use crate::conformance::sys::{Map, PAGE};

/// Takes the right to write one page of a mapping away.
///
/// # Errors
/// What mprotect(2) says; a page outside of the mapping is refused.
pub fn make_read_only(map: &Map, page: usize) -> io::Result<()> {
    if (page + 1) * PAGE > map.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the page lies in the mapping, as was just checked.
    let at = unsafe { map.ptr().byte_add(page * PAGE) };
    // SAFETY: nobody holds a reference into the mapping.
    unsafe { mprotect(at.cast(), PAGE, ProtFlags::PROT_READ) }?;
    Ok(())
}

/// What can be read from a pipe without waiting.
///
/// # Errors
/// What fcntl(2) says.
pub fn available(pipe: impl std::os::fd::AsFd + io::Read) -> io::Result<String> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let mut pipe = pipe;
    fcntl(pipe.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut bytes = Vec::new();
    match pipe.read_to_end(&mut bytes) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
        _ => {}
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
