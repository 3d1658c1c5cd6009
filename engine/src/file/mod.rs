//! Open files: examined and made again from outside.
//!
//! On dump a [`FileSaver`] holds a duplicate of each of a task's descriptors
//! (pidfd_getfd(2)) and looks at it with ordinary calls; nothing runs in the
//! task. On restore a [`FileBuilder`] makes each open file description once,
//! and remote programs let the tasks take them.
//!
//! ```text
//!   task ── fd 7 ──┐                                     ┌── fd 7 ── task
//!                  ├─ description ─▶ FileEntry ─▶ description
//!   task ── fd 9 ──┘   (kcmp)       files.img    (builder)└── fd 9 ── task
//! ```
//!
//! Each kind of file has one module with its `save`, what it refuses, and its
//! `restore`; sockets are in [`crate::socket`].

pub(crate) mod bpf;
mod builder;
mod epoll;
pub(crate) mod error;
mod eventfd;
pub(crate) mod examined;
mod fanotify;
pub(crate) mod fdinfo;
mod foreign;
mod ghost;
pub(crate) mod identity;
mod inotify;
mod late;
mod memfd;
mod mqueue;
mod nsfd;
mod pidfd;
pub(crate) mod pipe;
pub(crate) mod record;
pub(crate) mod reg;
mod saver;
mod signalfd;
pub(crate) mod sys;
mod timerfd;
mod tty;
pub(crate) mod uring;
mod watch;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

pub use builder::{FileBuilder, SilentConnections};
pub use error::{BuildError, FileError};
pub(crate) use late::spare_number;
pub use mqueue::{RcrQueue, RcrQueueNotify};
pub use record::{
    Fate, LineEnd, RcrFile, RcrFilesHead, RcrLine, RcrLock, RcrNamespaceFd, RcrPidfd, RcrSocket,
    RcrSocketOption, RcrTerminal, RcrWatched, TerminalEnd,
};
pub use saver::FileSaver;
pub use uring::{RcrRingBuffer, RcrRingFile, RcrRingThread, RcrUring};

/// A task whose files are to be saved.
#[derive(Debug, Clone, Copy)]
pub struct TaskFiles<'a> {
    /// Process id, as we see it.
    pub pid: i32,
    /// A living thread of it, for paths in `/proc`.
    pub voice: i32,
    /// A pidfd of that thread.
    pub pidfd: BorrowedFd<'a>,
    /// Its name, for messages.
    pub comm: &'a str,
    /// Id of its mount namespace in the images; 0 is our own.
    pub mnt_ns: u32,
}

/// What becomes of established TCP connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TcpPolicy {
    /// They stand in the way of a checkpoint.
    #[default]
    Refuse,
    /// They come back as if the peer had closed them.
    Close,
    /// They go on: their packets are kept away until they stand again.
    Carry,
}

/// What becomes of unix stream connections that lead out of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnixPolicy {
    /// They stand in the way of a checkpoint.
    #[default]
    Refuse,
    /// Those to servers whose clients connect again come back as if the peer had
    /// closed them; others stand in the way.
    Reopened,
    /// They come back as if the peer had closed them.
    Close,
}

/// TCP connections of a dumped tree. Their packets are kept away as long as
/// this value lives.
#[derive(Debug, Default)]
pub struct Connections(crate::socket::tcp::Held);

impl Connections {
    /// To be called right before the tree is killed: its connections end
    /// without a word to the peers, and their packets are kept away until they
    /// are restored. Hold on to the value until the tree is gone.
    pub fn silence(&mut self) -> Result<(), FileError> {
        Ok(self.0.silence()?)
    }
}

/// How files are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePolicy {
    /// Established TCP connections.
    pub tcp: TcpPolicy,
    /// With [`TcpPolicy::Carry`]: connections that wait to be accepted are lost
    /// instead of standing in the way.
    pub skip_in_flight: bool,
    /// Unix stream connections to other processes. Those to the journal are
    /// always kept track of and connected again.
    pub unix: UnixPolicy,
    /// Read what is buffered in pipes and sockets. Only for frozen tasks;
    /// without it nothing is done that a running task could notice, and what
    /// closes in between is no error.
    pub payload: bool,
    /// The largest unlinked file that is carried by content.
    pub ghost_bytes_max: u64,
    /// Terminals whose other end is outside are those of a shell's job: the
    /// terminal of whoever restores takes their place.
    pub shell_job: bool,
    /// Other ends of the pipes that the first process has for its standard
    /// streams may be outside: whoever restores gives ends of others, by name.
    pub stdio_outside: bool,
}

impl FilePolicy {
    /// For frozen tasks.
    pub fn frozen() -> Self {
        Self {
            tcp: TcpPolicy::default(),
            skip_in_flight: false,
            unix: UnixPolicy::default(),
            payload: true,
            ghost_bytes_max: 1 << 30,
            shell_job: false,
            stdio_outside: false,
        }
    }

    /// For a look at running tasks: finds the same refusals, reads no data.
    pub fn live() -> Self {
        Self {
            payload: false,
            ..Self::frozen()
        }
    }
}

/// A process that was just born: root, and without files.
#[derive(Debug, Clone, Copy)]
pub struct Newborn {
    /// To run programs in it.
    pub tracee: crate::remote::Tracee,
    /// Where they run.
    pub arena: crate::remote::Arena,
    /// Its number for a pidfd of ours.
    pub pidfd: i32,
}

/// What files need of the place where they come back.
pub trait RestoreEnv {
    /// The root directory of the mount namespace with that id; 0 is our own.
    fn root_dir(&self, mnt_ns: u32) -> io::Result<BorrowedFd<'_>>;

    /// The network namespace with that id.
    fn net_ns(&self, id: u32) -> io::Result<BorrowedFd<'_>> {
        Err(io::Error::other(format!("no network namespace {id}")))
    }

    /// A file that takes what is written to the journal stream `id` until it
    /// is connected again; opened anew for each call.
    fn journal_interim(&self, id: u32) -> io::Result<OwnedFd>;

    /// The namespace of that kind (as `/proc/PID/ns` calls it) that a process
    /// of the images has, or our own.
    fn namespace(&self, kind: &str, pid: Option<i32>) -> io::Result<OwnedFd>;

    /// How long the tasks were away, by the wall clock.
    fn away(&self) -> Duration;

    /// Our number for a task of the images.
    fn pid_here(&self, id: i32) -> i32 {
        id
    }

    /// A task of the images that stands and has nothing of its own yet, for
    /// calls that have to be its.
    fn newborn(&self, id: i32) -> Option<Newborn> {
        let _ = id;
        None
    }

    /// The number by which task `viewer` knows task `id`, both as the images
    /// number them; 0 for none.
    fn pid_seen(&self, viewer: i32, id: i32) -> i32 {
        let _ = viewer;
        id
    }
}

/// A file that another one refers to.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    /// Opened for the purpose.
    Opened(OwnedFd),
    /// One of those that are carried.
    Carried(BorrowedFd<'a>),
}

impl AsFd for Target<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Opened(fd) => fd.as_fd(),
            Self::Carried(fd) => *fd,
        }
    }
}
