//! One address space whose pages come later.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;

use super::PageOrigin;
use super::pending::{Pending, Run};
use crate::memory::pagemap::PAGE;
use crate::sys::paging::{Brought, PageEvent, PageServer};
use crate::sys::{SysError, SysResult};

/// Brought with the page that somebody waits for.
const AROUND: u64 = 64 << 10;
/// Brought in one step while nobody waits.
const AHEAD: u64 = 512 << 10;

/// Memory that is still being filled.
#[derive(Debug)]
pub struct Space<'a> {
    server: PageServer,
    /// The process, or the one it was forked from.
    owner: Rc<OwnedFd>,
    pending: Pending<'a>,
    /// Where to go on: behind what was asked for last.
    next: u64,
    gone: bool,
}

impl<'a> Space<'a> {
    /// Memory of a process (a pidfd), whose content is `pending`.
    pub fn new(server: PageServer, owner: OwnedFd, pending: Pending<'a>) -> Self {
        Self {
            server,
            owner: Rc::new(owner),
            pending,
            next: 0,
            gone: false,
        }
    }

    /// Its process, or the restored one from which that was forked.
    pub fn owner(&self) -> BorrowedFd<'_> {
        self.owner.as_fd()
    }

    /// Whether nothing is left to do: closing the userfaultfd makes the memory
    /// ordinary.
    pub fn is_done(&self) -> bool {
        self.gone || self.pending.is_empty()
    }

    /// Sees what its owner has done and brings what it waits for. Gives the
    /// memories of children.
    pub fn answer(&mut self, origin: &mut Origin<'_>) -> SysResult<Vec<Self>> {
        let mut children = Vec::new();
        let mut waiting = Vec::new();
        loop {
            let events = self.server.events()?;
            if events.is_empty() {
                break;
            }
            for e in events {
                match e {
                    PageEvent::Fault(at) => waiting.push(at / PAGE * PAGE),
                    PageEvent::Fork(server) => children.push(Self {
                        server,
                        owner: self.owner.clone(),
                        pending: self.pending.clone(),
                        next: 0,
                        gone: false,
                    }),
                    PageEvent::Moved { from, to, len } => self.pending.shift(from, to, len),
                    PageEvent::Dropped(range) | PageEvent::Unmapped(range) => {
                        self.pending.drop_within(&range);
                    }
                }
            }
        }
        for at in waiting {
            // If mappings change meanwhile, whoever waits asks once more.
            self.bring_page(at, origin)?;
        }
        Ok(children)
    }

    /// Brings some pages that nobody has asked for yet.
    pub fn advance(&mut self, origin: &mut Origin<'_>) -> SysResult<Brought> {
        let Some((at, run)) = self.pending.next(self.next, AHEAD) else {
            return Ok(Brought::Gone);
        };
        let brought = self.bring(at, run, origin)?;
        if let Brought::Some(n) = brought {
            self.next = at + n;
        }
        Ok(brought)
    }

    fn bring_page(&mut self, at: u64, origin: &mut Origin<'_>) -> SysResult<()> {
        let Some(run) = self.pending.at(at, AROUND) else {
            let page = at..at + PAGE;
            match self.server.zero(&page)? {
                Brought::Gone => self.gone = true,
                // Woken, it finds the page, or the mapping changed, or asks again.
                Brought::Some(_) => {}
                _ => self.server.wake(&page)?,
            }
            return Ok(());
        };
        match self.bring(at, run, origin)? {
            Brought::Some(n) => self.next = at + n,
            Brought::Gone => {}
            _ => self.server.wake(&(at..at + PAGE))?,
        }
        Ok(())
    }

    /// Copies content to its place and forgets it.
    fn bring(&mut self, at: u64, run: Run<'a>, origin: &mut Origin<'_>) -> SysResult<Brought> {
        let fetched;
        let bytes = match run {
            Run::Here(bytes) => bytes,
            Run::Far { id, at, len } => {
                fetched = fetch(origin, id, at, len)?;
                &fetched
            }
        };
        let mut brought = self.server.copy(at, bytes)?;
        let one = &bytes[..bytes.len().min(PAGE as usize)];
        if bytes.len() > one.len() && matches!(brought, Brought::NoMapping | Brought::NoMemory) {
            // Its owner has split the mapping, or is short of memory.
            brought = self.server.copy(at, one)?;
        }
        let page = at..at + PAGE;
        match brought {
            Brought::Some(n) => self.pending.drop_within(&(at..at + n)),
            Brought::Present => {
                self.pending.drop_within(&page);
                self.server.wake(&page)?;
            }
            Brought::NoMapping => self.pending.drop_within(&page),
            Brought::Gone => self.gone = true,
            Brought::Changing | Brought::NoMemory => {}
        }
        Ok(brought)
    }
}

/// Gets pages from where they still are.
fn fetch(origin: &mut Origin<'_>, id: i32, at: u64, len: u64) -> SysResult<Vec<u8>> {
    let failed = |e: io::Error| {
        let errno = e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        SysError::new("fetch pages", format!("process {id}: {e}"), errno)
    };
    let nobody = || failed(io::Error::other("nobody has them"));
    let bytes = origin.as_mut().ok_or_else(nobody)?.fetch(id, at, len);
    let bytes = bytes.map_err(failed)?;
    match bytes.len() as u64 {
        n if n > 0 && n <= len && n.is_multiple_of(PAGE) => Ok(bytes),
        n => Err(failed(io::Error::other(format!(
            "{n} bytes came instead of {len}"
        )))),
    }
}

/// Who has what is in no image.
pub type Origin<'o> = Option<&'o mut dyn PageOrigin>;

impl AsFd for Space<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.server.as_fd()
    }
}
