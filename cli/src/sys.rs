//! The calls that no safe wrapper offers.

use std::io;
use std::mem::MaybeUninit;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

/// Blocked signals that wait for this thread or its process (sigpending(2)).
pub fn pending_signals() -> io::Result<SigSet> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigpending only writes the set it is given, whole if it succeeds.
    let result = unsafe { libc::sigpending(set.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the set is initialised and valid.
    Ok(unsafe { SigSet::from_sigset_t_unchecked(set.assume_init()) })
}

/// Ends this program silently when its reader has gone (`rcr list | head`).
pub fn end_with_reader() -> nix::Result<()> {
    // SAFETY: the default action involves no code of ours, and no handler was
    // installed before that could be relied on.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map(drop)
}
