//! Messages to systemd (sd_notify(3)).

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};

/// Why systemd was not reached.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The process was not started by systemd, or not for a service that may
    /// send messages.
    #[error("NOTIFY_SOCKET is not set: systemd does not expect messages from here")]
    NoSocket,
    /// The message was not sent.
    #[error("the message did not reach systemd")]
    Send(#[source] io::Error),
    /// systemd did not confirm in time.
    #[error("systemd did not take the messages within {0:?}")]
    NotTaken(Duration),
}

/// The socket that systemd listens on.
#[derive(Debug)]
pub struct Notifier {
    socket: OwnedFd,
    address: UnixAddr,
}

impl Notifier {
    /// The socket named by `NOTIFY_SOCKET`.
    pub fn from_env() -> Result<Self, NotifyError> {
        let name = std::env::var_os("NOTIFY_SOCKET").ok_or(NotifyError::NoSocket)?;
        Self::new(&name)
    }

    /// A socket by its name; `@` begins an abstract one.
    pub fn new(name: &OsStr) -> Result<Self, NotifyError> {
        let send = |e: Errno| NotifyError::Send(e.into());
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(rest) => UnixAddr::new_abstract(rest),
            None => UnixAddr::new(name),
        }
        .map_err(send)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(send)?;
        Ok(Notifier { socket, address })
    }

    /// Sends one message of `KEY=VALUE` lines.
    pub fn send(&self, message: &str) -> Result<(), NotifyError> {
        self.send_with(message, &[])
    }

    /// Returns once systemd has worked off every message sent before.
    pub fn barrier(&self, timeout: Duration) -> Result<(), NotifyError> {
        let send = |e: Errno| NotifyError::Send(e.into());
        let (ours, theirs) = nix::unistd::pipe().map_err(send)?;
        self.send_with("BARRIER=1", &[theirs.as_raw_fd()])?;
        drop(theirs);
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        let wait = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
        loop {
            // The other end closes once the message is worked off.
            let mut fds = [PollFd::new(ours.as_fd(), PollFlags::empty())];
            match poll(&mut fds, wait) {
                Ok(0) => return Err(NotifyError::NotTaken(timeout)),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(send(e)),
            }
        }
    }

    fn send_with(&self, message: &str, fds: &[i32]) -> Result<(), NotifyError> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg(
            self.socket.as_raw_fd(),
            &[IoSlice::new(message.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            Some(&self.address),
        )
        .map(drop)
        .map_err(|e| NotifyError::Send(e.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn messages_arrive_and_the_barrier_waits_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let server = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(path.as_os_str()).unwrap();
        notifier.send("MAINPID=7\nREADY=1").unwrap();
        let mut buffer = [0; 64];
        let n = server.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"MAINPID=7\nREADY=1");

        // Reading without room for descriptors drops, and so closes, them.
        let reader = std::thread::spawn(move || {
            let n = server.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], b"BARRIER=1");
            server
        });
        notifier.barrier(Duration::from_secs(60)).unwrap();
        drop(reader.join().unwrap());
        assert!(matches!(
            notifier.send("READY=1"),
            Err(NotifyError::Send(_))
        ));
    }
}
