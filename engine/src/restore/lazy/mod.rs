//! Lazy restore: processes run as soon as their mappings stand, and their pages
//! come when they are touched, the others meanwhile.
//!
//! ```text
//! restorer ─fork─► pager ◄─ userfaultfd of each process
//!                    └─ guard: shares the pager's descriptors
//! ```
//! The pager has the images mapped like the restorer. Where nothing is left to
//! come it closes the userfaultfd, and the memory is ordinary: the kernel keeps
//! no trace of it. Its guard sees to it that processes end rather than find
//! zeros if the pager should be killed before.

mod pager;
mod pending;
mod space;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::image::ImageSource;
use crate::image::schema::VmaEntry;
use crate::memory::heritage::{self, Kept};
use crate::memory::pages::{self, Piece, Saved};
use crate::memory::vma::status;
use crate::remote::{Arena, OpId, Program, Tracee};
use crate::sys::paging::{USERFAULTFD_IOC_NEW, fork_off};
use crate::tree::Process;

use super::RestoreError;
use super::worlds::take;
use pager::{Answer, NewSpace, Order};

/// Mappings with less content than this are filled at once: that takes less
/// than the faults would.
pub const WORTH_WAITING: u64 = 1 << 20;

/// `comm` of a pager.
const NAME: &CStr = c"rcr-pager";

/// The processes of this machine that fill memory after a lazy restore.
///
/// While there are any, what a restored process has in memory is not all that
/// belongs to it, and it cannot be dumped.
pub fn pagers() -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if Process::read(pid)?
            .is_some_and(|p| p.comm.as_bytes() == NAME.to_bytes() && !p.is_zombie())
        {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The pager, as its restorer sees it.
#[derive(Debug)]
pub struct Lazy {
    stream: UnixStream,
    /// `None`: it is not our child.
    pid: Option<i32>,
    device: File,
    live: bool,
    at_least: u64,
}

/// A process's wish, part of the program that makes its mappings.
pub struct Asked {
    op: OpId,
    ranges: Vec<Range<u64>>,
}

impl Lazy {
    /// Starts the pager; `content` is what processes are filled with. Mappings
    /// with less than `at_least` bytes of it are not its business.
    pub fn start(content: BTreeMap<i32, Saved<'_>>, at_least: u64) -> Result<Self, RestoreError> {
        let failed = || RestoreError::io("starting the pager of a lazy restore");
        let device = device()?;
        let (stream, theirs) = UnixStream::pair().map_err(failed())?;
        let work = |theirs| pager::run(UnixStream::from(theirs), &content);
        let pid = fork_off(NAME, theirs.into(), work).map_err(failed())?;
        Ok(Self {
            stream,
            pid: Some(pid),
            device,
            live: false,
            at_least,
        })
    }

    /// Somebody else is the pager, and listens at the other end.
    pub fn connected(stream: &UnixStream, at_least: u64) -> Result<Self, RestoreError> {
        let stream = stream.try_clone();
        Ok(Self {
            stream: stream.map_err(RestoreError::io("the pager of a lazy restore"))?,
            pid: None,
            device: device()?,
            live: false,
            at_least,
        })
    }

    /// The pager's pid, if it is a child of ours.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Splits content into what is written at once and the mappings whose
    /// content comes later. Mappings in `kept` hold pages already, and only
    /// what is missing can come. Pages in `far` are in no image.
    pub fn split<'a>(
        &self,
        vmas: &[VmaEntry],
        kept: &BTreeMap<u64, Kept>,
        pieces: Vec<Piece<'a>>,
        far: &[Range<u64>],
    ) -> (Vec<Piece<'a>>, Vec<Range<u64>>) {
        let saved = Saved { pieces };
        let bytes = |e: &VmaEntry| -> u64 {
            let within = saved.within(e.start, e.end);
            within.map(|p| p.bytes.len() as u64).sum()
        };
        let overlaps = |e: &VmaEntry, r: &Range<u64>| r.start < e.end && e.start < r.end;
        let later: Vec<_> = vmas
            .iter()
            .filter(|e| {
                let waits = can_wait(e) && !kept.contains_key(&e.start);
                waits && bytes(e) >= self.at_least.max(1) || far.iter().any(|r| overlaps(e, r))
            })
            .map(|e| e.start..e.end)
            .collect();
        let mut now = Vec::new();
        let mut from = 0;
        for r in &later {
            now.extend(saved.within(from, r.start));
            from = r.end;
        }
        now.extend(saved.within(from, u64::MAX));
        (now, later)
    }

    /// Adds the calls by which a process opens its userfaultfd; `pidfd` is one
    /// of ours in it.
    pub fn ask(&self, prog: &mut Program, pidfd: OpId, ranges: Vec<Range<u64>>) -> Asked {
        let device = take(prog, pidfd, self.device.as_raw_fd());
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let args = [device.into(), USERFAULTFD_IOC_NEW.into(), flags.into()];
        let op = prog.call(libc::SYS_ioctl, "open a userfaultfd", &args);
        prog.call(libc::SYS_close, "close /dev/userfaultfd", &[device.into()]);
        Asked { op, ranges }
    }

    /// Gives the memory of a process that has asked to the pager.
    pub fn hand_over(
        &mut self,
        task: Tracee,
        arena: Arena,
        id: i32,
        fd: i32,
        asked: &Asked,
    ) -> Result<(), RestoreError> {
        let space = NewSpace {
            pid: task.tid,
            id,
            fd,
            starts: asked.ranges.iter().map(|r| r.start).collect(),
            ends: asked.ranges.iter().map(|r| r.end).collect(),
        };
        self.order(&Order { space: Some(space) })?;
        let mut prog = Program::new();
        prog.call(libc::SYS_close, "close the userfaultfd", &[fd.into()]);
        task.run(arena, &prog)?;
        Ok(())
    }

    /// The processes are about to run. From here on the pager is on its own.
    pub fn go_live(mut self) -> Result<(), RestoreError> {
        self.order(&Order { space: None })?;
        self.live = true;
        Ok(())
    }

    fn order(&mut self, order: &Order) -> Result<(), RestoreError> {
        let failed = || RestoreError::io("the pager of a lazy restore");
        pager::send(&mut self.stream, order).map_err(failed())?;
        let answer = pager::receive::<Answer>(&mut self.stream).map_err(failed())?;
        let error = match answer {
            Some(Answer { error: None }) => return Ok(()),
            Some(Answer { error: Some(e) }) => io::Error::other(e),
            None => io::Error::other("it has ended"),
        };
        Err(failed()(error))
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        if !self.live {
            // It ends when it has nobody to listen to.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            if let Some(pid) = self.pid {
                let _ = waitpid(Pid::from_raw(pid), None);
            }
        }
    }
}

impl Asked {
    /// The call that gives the descriptor's number.
    pub fn op(&self) -> OpId {
        self.op
    }
}

fn device() -> Result<File, RestoreError> {
    let mut how = File::options();
    let device = how.read(true).write(true).open("/dev/userfaultfd");
    device.map_err(RestoreError::io("open /dev/userfaultfd"))
}

/// Where pages come from that no image has: the process that was dumped.
pub trait PageOrigin {
    /// The pages of a process, by its id in the images, from an address on:
    /// so many bytes, at least one page. Fewer may come.
    fn fetch(&mut self, id: i32, at: u64, bytes: u64) -> io::Result<Vec<u8>>;
}

/// Fills the memory of a tree for a restorer, which is at the other end of
/// `stream` and has the same images. Returns `true` when all is there, `false`
/// when the restorer has given up before the tree ran.
pub fn serve(
    stream: UnixStream,
    source: &dyn ImageSource,
    origin: Option<&mut dyn PageOrigin>,
) -> Result<bool, RestoreError> {
    nix::sys::prctl::set_name(NAME).map_err(|e| RestoreError::io("naming the pager")(e.into()))?;
    let (mut content, mut far) = (BTreeMap::new(), BTreeMap::new());
    for name in source.names() {
        let id = name
            .strip_prefix("pagemap-")
            .and_then(|n| n.strip_suffix(".img"));
        let Some(id) = id.and_then(|id| id.parse::<i32>().ok()) else {
            continue;
        };
        let pieces = heritage::pages(source, id)?;
        content.insert(id, Saved { pieces });
        far.insert(id, pages::far(source, &name)?);
    }
    pager::fill(stream, &content, &far, origin)
}

/// Ordinary private memory that may be read and written. What is locked has to
/// be there; a stack grows, and is needed at once.
pub(crate) fn can_wait(e: &VmaEntry) -> bool {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let never = libc::MAP_LOCKED | libc::MAP_GROWSDOWN | libc::MAP_HUGETLB;
    let merged = e.madv.unwrap_or(0) >> libc::MADV_MERGEABLE & 1 == 1;
    e.status & status::ANON_PRIVATE != 0
        && e.status & (status::AIO_RING | status::VDSO) == 0
        && e.prot as i32 & rw == rw
        && e.flags as i32 & never == 0
        && !merged
}
