//! A helper process holds files; they are saved from here, made again here,
//! given to a second helper and saved once more: both dumps must agree.

mod plain;
mod sockets;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::*;
use crate::image::schema::{FdTypes, FdinfoEntry, FileEntry};
use crate::image::{DirSink, DirSource};
use crate::sys::process::pidfd_open;

/// A stopped process that has exactly the given descriptors.
struct Holder(Pid);

impl Holder {
    fn new(fds: &[(RawFd, BorrowedFd<'_>)]) -> Self {
        let pairs: Vec<_> = fds.iter().map(|(n, f)| (*n, f.as_raw_fd())).collect();
        assert!(
            pairs.iter().all(|(n, f)| *n >= 500 && *f < 500),
            "numbers are apart"
        );
        // SAFETY: the child makes plain system calls only, on memory made before.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                for &(number, ours) in &pairs {
                    // SAFETY: numbers only.
                    unsafe { libc::dup2(ours, number) };
                }
                // SAFETY: numbers only; nothing owned is used any more.
                unsafe {
                    libc::close_range(0, 499, 0);
                    loop {
                        libc::raise(libc::SIGSTOP);
                    }
                }
            }
            ForkResult::Parent { child } => {
                waitpid(child, Some(WaitPidFlag::WUNTRACED)).unwrap();
                Self(child)
            }
        }
    }

    fn save(&self, saver: &mut FileSaver) -> Vec<FdinfoEntry> {
        let pid = self.0.as_raw();
        let pidfd = pidfd_open(pid).unwrap();
        let task = TaskFiles {
            pid,
            voice: pid,
            pidfd: pidfd.as_fd(),
            comm: "holder",
            mnt_ns: 0,
        };
        saver.save_fds(&task).unwrap()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGKILL).unwrap();
        waitpid(self.0, None).unwrap();
    }
}

struct Env {
    root: File,
    journal: tempfile::TempDir,
}

impl Env {
    fn new() -> Self {
        Self {
            root: File::open("/").unwrap(),
            journal: tempfile::tempdir().unwrap(),
        }
    }
}

impl RestoreEnv for Env {
    fn root_dir(&self, mnt_ns: u32) -> io::Result<BorrowedFd<'_>> {
        assert_eq!(mnt_ns, 0);
        Ok(self.root.as_fd())
    }
    fn journal_interim(&self, id: u32) -> io::Result<OwnedFd> {
        let path = self.journal.path().join(id.to_string());
        Ok(OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)?
            .into())
    }
    fn namespace(&self, kind: &str, pid: Option<i32>) -> io::Result<OwnedFd> {
        assert_eq!(pid, None);
        Ok(File::open(format!("/proc/self/ns/{kind}"))?.into())
    }
    fn away(&self) -> Duration {
        Duration::ZERO
    }
}

const CLOSING: fn() -> FilePolicy = || FilePolicy {
    tcp: TcpPolicy::Close,
    unix: UnixPolicy::Close,
    ..FilePolicy::frozen()
};

/// Everything of a file that another kernel must not change.
fn essence(entry: &FileEntry) -> FileEntry {
    let mut e = entry.clone();
    if let Some(p) = &mut e.pipe {
        p.pipe_id = 0;
    }
    if let Some(f) = &mut e.fifo {
        f.pipe_id = 0;
    }
    if let Some(s) = &mut e.isk {
        s.ino = 0;
    }
    if let Some(s) = &mut e.usk {
        (s.ino, s.peer) = (0, u32::from(s.peer != 0));
    }
    if let Some(n) = &mut e.nlsk {
        n.ino = 0;
    }
    if let Some(r) = &mut e.reg {
        // An unlinked file's name is made of its inode number.
        r.name = r.name.split('#').next().unwrap().to_owned();
    }
    if let Some(t) = &mut e.tfd {
        t.vnsec = 0;
    }
    if let Some(p) = &mut e.epfd {
        for t in &mut p.tfd {
            (t.tfd, t.inode, t.dev) = (0, None, None);
        }
    }
    e
}

struct RoundTrip {
    files: Vec<(RawFd, OwnedFd)>,
}

impl RoundTrip {
    fn get(&self, number: RawFd) -> BorrowedFd<'_> {
        self.files
            .iter()
            .find(|(n, _)| *n == number)
            .unwrap()
            .1
            .as_fd()
    }
}

/// The images of what a process holds, all of which is carried, and its table.
fn images_of(holder: &Holder, policy: FilePolicy) -> (tempfile::TempDir, Vec<FdinfoEntry>) {
    let mut saver = FileSaver::new(policy).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let dir = tempfile::tempdir().unwrap();
    let mut sink = DirSink::create(dir.path()).unwrap();
    saver.finish(&mut sink).unwrap();
    (dir, table)
}

/// Saves, lets `between` undo what is in the way, makes again, saves again.
fn round_trip(fds: &[(RawFd, BorrowedFd<'_>)], between: impl FnOnce()) -> RoundTrip {
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(fds);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let before: Vec<_> = table
        .iter()
        .map(|e| (e.fd, essence(saver.entry(e.id).unwrap())))
        .collect();
    let mut sink = DirSink::create(dir.path()).unwrap();
    saver.finish(&mut sink).unwrap();
    drop(holder);
    between();

    let source = DirSource::open(dir.path()).unwrap();
    let env = Env::new();
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let mut files = Vec::new();
    for e in &table {
        let fd = builder.open(e.id).unwrap().try_clone_to_owned().unwrap();
        files.push((e.fd as RawFd, fd));
    }
    builder.seal().unwrap();
    drop(builder);

    let again: Vec<_> = files.iter().map(|(n, f)| (*n, f.as_fd())).collect();
    let holder = Holder::new(&again);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table_again = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let after: Vec<_> = table_again
        .iter()
        .map(|e| (e.fd, essence(saver.entry(e.id).unwrap())))
        .collect();
    for ((fd_a, a), (fd_b, b)) in before.iter().zip(&after) {
        assert_eq!(fd_a, fd_b);
        // What epoll watches is added by a task, not by the builder.
        if a.epfd.is_none() {
            assert_eq!(a, b);
        }
    }
    assert_eq!(before.len(), after.len());
    RoundTrip { files }
}

fn refusals(fds: &[(RawFd, BorrowedFd<'_>)], policy: FilePolicy) -> Vec<String> {
    let holder = Holder::new(fds);
    let mut saver = FileSaver::new(policy).unwrap();
    holder.save(&mut saver);
    saver.settle().unwrap();
    saver.refusals().iter().map(ToString::to_string).collect()
}

fn read_some(fd: BorrowedFd<'_>) -> Vec<u8> {
    let mut b = [0; 4096];
    let n = nix::unistd::read(fd, &mut b).unwrap();
    b[..n].to_vec()
}

fn nonblocking(fd: impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}
