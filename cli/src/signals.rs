//! Ctrl-C and its like, held back while a half-done upgrade could be left.

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::geteuid;

/// The signals that ask a program to end.
const HELD: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// A signal asked the program to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}")]
pub struct Interrupted(Signal);

/// Blocks them for the rest of the program; to be called while it has one thread.
pub fn hold() -> nix::Result<()> {
    let mut set = SigSet::empty();
    HELD.iter().for_each(|signal| set.add(*signal));
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
}

/// An error if one of them has come.
pub fn check() -> Result<(), Interrupted> {
    let Ok(pending) = crate::sys::pending_signals() else {
        return Ok(());
    };
    match HELD.iter().find(|signal| pending.contains(**signal)) {
        Some(signal) => Err(Interrupted(*signal)),
        None => Ok(()),
    }
}

/// Whether this process has root's rights.
pub fn is_root() -> bool {
    geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_signal_is_seen() {
        hold().unwrap();
        check().unwrap();
        // Goes to this thread alone, which holds it back.
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert_eq!(check().unwrap_err().to_string(), "interrupted by SIGTERM");
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        assert_eq!(set.wait().unwrap(), Signal::SIGTERM);
        check().unwrap();
    }
}
