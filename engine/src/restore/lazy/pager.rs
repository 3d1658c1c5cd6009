//! The process that brings pages to restored processes while they run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use prost::Message;

use super::super::RestoreError;
use super::PageOrigin;
use super::pending::Pending;
use super::space::Space;
use crate::file::sys::pidfd_getfd;
use crate::memory::pages::Saved;
use crate::sys::SysResult;
use crate::sys::keeper;
use crate::sys::paging::{self, Brought, PageServer};
use crate::sys::process::pidfd_open;
use crate::tree::Tree;

/// Between two attempts when memory is short, or its owner busy with it.
const PAUSE: Duration = Duration::from_millis(1);

/// What the restorer tells the pager.
#[derive(Clone, PartialEq, Message)]
pub struct Order {
    /// A process whose pages are to come later; none: the tree runs.
    #[prost(message, optional, tag = "1")]
    pub space: Option<NewSpace>,
}

/// Memory of a process.
#[derive(Clone, PartialEq, Message)]
pub struct NewSpace {
    /// The process.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// Number of its userfaultfd in it.
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
    /// First addresses of the mappings, ascending.
    #[prost(uint64, repeated, tag = "3")]
    pub starts: Vec<u64>,
    /// Their ends.
    #[prost(uint64, repeated, tag = "4")]
    pub ends: Vec<u64>,
    /// Its id in the images.
    #[prost(int32, required, tag = "5")]
    pub id: i32,
}

/// What the pager answers.
#[derive(Clone, PartialEq, Message)]
pub struct Answer {
    /// Why it cannot; none: done.
    #[prost(string, optional, tag = "1")]
    pub error: Option<String>,
}

/// Sends a message with its length in front.
pub fn send(stream: &mut UnixStream, message: &impl Message) -> io::Result<()> {
    stream.write_all(&message.encode_length_delimited_to_vec())
}

/// Receives a message; `None` when the other side has ended.
pub fn receive<M: Message + Default>(stream: &mut UnixStream) -> io::Result<Option<M>> {
    let mut head = Vec::new();
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => head.push(byte[0]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let len = prost::decode_length_delimiter(head.as_slice())?;
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(Some(M::decode(body.as_slice())?))
}

/// Serves until all memory is filled. Gives the process's exit code.
pub fn run(restorer: UnixStream, content: &BTreeMap<i32, Saved<'_>>) -> i32 {
    let done = fill(restorer, content, &BTreeMap::new(), None);
    done.is_err().into()
}

/// Serves until all memory is filled, by `content` and, where pages are `far`,
/// by their origin. `false`: the restorer was gone before the tree ran.
pub fn fill(
    restorer: UnixStream,
    content: &BTreeMap<i32, Saved<'_>>,
    far: &BTreeMap<i32, Vec<Range<u64>>>,
    origin: Option<&mut dyn PageOrigin>,
) -> Result<bool, RestoreError> {
    // Not the first to go when memory is short. Without the right to ask for
    // that we are like everybody else.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let mut pager = Pager {
        restorer: Some(restorer),
        content,
        far,
        origin,
        spaces: Vec::new(),
        live: false,
        guard: None,
    };
    let done = pager.serve();
    if let Err(e) = &done {
        // Nobody reads what we would print, and memory that is not whole
        // must not be run with.
        if let Ok(mut log) = fs::OpenOptions::new().append(true).open("/dev/kmsg") {
            let _ = writeln!(log, "rcr-pager: {e}: the processes that wait for it end");
        }
        pager.end_owners();
    }
    done
}

struct Pager<'a, 'c, 'o> {
    restorer: Option<UnixStream>,
    content: &'c BTreeMap<i32, Saved<'a>>,
    far: &'c BTreeMap<i32, Vec<Range<u64>>>,
    origin: Option<&'o mut dyn PageOrigin>,
    spaces: Vec<Space<'a>>,
    /// The processes run: their memory may only become whole.
    live: bool,
    guard: Option<i32>,
}

impl Pager<'_, '_, '_> {
    /// Whether all memory is filled; else the restorer was gone before the tree ran.
    fn serve(&mut self) -> Result<bool, RestoreError> {
        let (mut turn, mut idle) = (0, 0);
        loop {
            self.spaces.retain(|s| !s.is_done() || !self.live);
            if self.live && self.spaces.is_empty() {
                self.end_guard();
                return Ok(true);
            }
            if self.live {
                turn = (turn + 1) % self.spaces.len();
                match self.spaces[turn].advance(&mut self.origin)? {
                    Brought::Changing | Brought::NoMemory => idle += 1,
                    _ => idle = 0,
                }
            }
            if !self.wait(idle > self.spaces.len())? {
                return Ok(false);
            }
        }
    }

    /// Answers whoever has asked; when there is nothing else to do, waits for
    /// somebody. `false`: the restorer is gone before the tree ran.
    fn wait(&mut self, short: bool) -> Result<bool, RestoreError> {
        let timeout = match (self.live, short) {
            (false, _) => PollTimeout::NONE,
            (true, false) => PollTimeout::ZERO,
            (true, true) => PollTimeout::try_from(PAUSE).unwrap_or(PollTimeout::ZERO),
        };
        let of = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = self.spaces.iter().map(|s| of(s.as_fd())).collect();
        fds.extend(self.restorer.iter().map(|r| of(r.as_fd())));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(talking()(e.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|f| f.any().unwrap_or(true)).collect();
        let mut born = Vec::new();
        for (space, _) in self.spaces.iter_mut().zip(&ready).filter(|(_, r)| **r) {
            born.extend(space.answer(&mut self.origin)?);
        }
        let order = ready.get(self.spaces.len()) == Some(&true);
        self.spaces.extend(born);
        match order {
            true => self.order().map_err(talking()),
            false => Ok(true),
        }
    }

    fn order(&mut self) -> io::Result<bool> {
        let Some(restorer) = &mut self.restorer else {
            return Ok(true);
        };
        let Some(order) = receive::<Order>(restorer)? else {
            return Ok(false);
        };
        let done = match &order.space {
            Some(new) => self.take(new).map_err(|e| e.to_string()),
            None => self.go_live().map_err(|e| e.to_string()),
        };
        let answer = Answer { error: done.err() };
        if let Some(restorer) = &mut self.restorer {
            send(restorer, &answer)?;
        }
        if self.live {
            self.restorer = None;
        }
        Ok(true)
    }

    fn take(&mut self, new: &NewSpace) -> SysResult<()> {
        let owner = pidfd_open(new.pid)?;
        let server = PageServer::new(pidfd_getfd(owner.as_fd(), new.fd)?)?;
        let mut pending = Pending::default();
        for (&start, &end) in new.starts.iter().zip(&new.ends) {
            server.add(&(start..end))?;
            let saved = self.content.get(&new.id);
            let pieces = saved.into_iter().flat_map(|s| s.within(start, end));
            pieces.for_each(|p| pending.add(&p));
            for r in self.far.get(&new.id).into_iter().flatten() {
                pending.add_far(new.id, r.start.max(start)..r.end.min(end));
            }
        }
        self.spaces.push(Space::new(server, owner, pending));
        Ok(())
    }

    fn go_live(&mut self) -> SysResult<()> {
        // Before any of the processes runs: should we be killed, they must not
        // go on with zeros where their memory was.
        let owners = self.spaces.iter().map(Space::owner);
        let owners: Vec<BorrowedFd<'_>> = owners.collect();
        self.guard = Some(paging::guard(c"rcr-guard", || end(&owners))?);
        self.live = true;
        Ok(())
    }

    /// Ends every process that waits for us.
    fn end_owners(&mut self) {
        if self.live {
            let owners: Vec<_> = self.spaces.iter().map(Space::owner).collect();
            end(&owners);
        }
        self.end_guard();
    }

    fn end_guard(&mut self) {
        if let Some(pid) = self.guard.take() {
            let pid = Pid::from_raw(pid);
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}

fn talking() -> impl FnOnce(io::Error) -> RestoreError {
    RestoreError::io("waiting for the restorer and for faults")
}

/// Ends processes and whom they have forked: nothing else can be done for those
/// whose memory is lost.
fn end(owners: &[BorrowedFd<'_>]) {
    let mut heirs = BTreeSet::new();
    for pid in owners.iter().filter_map(|fd| pid_of(*fd)) {
        let all = Tree::Root(pid).scan().unwrap_or_default();
        heirs.extend(all.iter().map(|p| p.pid).filter(|p| *p != pid));
    }
    for owner in owners {
        let _ = keeper::end(*owner);
    }
    for pid in heirs {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The process behind a pidfd, unless it has ended (`Pid:` of its fdinfo,
/// proc_pid_fdinfo(5)).
fn pid_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = fs::read_to_string(path).ok()?;
    let pid = text.lines().find_map(|l| l.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}
