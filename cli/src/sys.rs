//! The calls that no safe wrapper offers.

use std::io;
use std::mem::MaybeUninit;

use nix::unistd::{ForkResult, Pid};

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

/// Splits this process in two, which must have one thread: the child (`None`)
/// and its parent.
pub fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: with a single thread no lock is held by anybody else, so the child
    // may do what its parent could.
    match unsafe { nix::unistd::fork()? } {
        ForkResult::Child => Ok(None),
        ForkResult::Parent { child } => Ok(Some(child)),
    }
}

/// Lets standard input and output lead nowhere, and standard error to the
/// kernel's log.
pub fn silence() -> io::Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    let log = std::fs::File::options().write(true).open("/dev/kmsg")?;
    nix::unistd::dup2_stderr(&log)?;
    Ok(())
}
