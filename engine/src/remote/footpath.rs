//! Where a thread's way back lies in its process, and its arena's traces.

use crate::arch::{INTERPRETER, WayBack};
use crate::memory::maps::Vma;
use crate::memory::pagemap::PAGE;
use crate::sys::SysResult;
use crate::sys::process::{Span, read_memory};

use super::saved::SavedRegs;
use super::tracee::{ARENA_LEN_AT, CODE_BYTES, RemoteError, poke};

/// The end of a vDSO's text, where the way back of one thread at a time lies.
#[derive(Debug, Clone, Copy)]
pub struct Footpath {
    tid: i32,
    at: u64,
}

impl Footpath {
    /// Finds the place in the process of a stopped task, whose vDSO's text is
    /// given. What a killed program of ours has left there is taken away.
    pub fn find(tid: i32, text: Option<(u64, u64)>) -> Result<Self, RemoteError> {
        let (start, end) = text.ok_or(RemoteError::NoVdso { tid })?;
        // Within one page, so it is written whole or not at all.
        let len = WayBack::len().next_multiple_of(64) as u64;
        if len > PAGE || end - start < len {
            return Err(RemoteError::VdsoFull { tid });
        }
        let path = Self { tid, at: end - len };
        let mut now = vec![0; len as usize];
        let span = Span {
            start: path.at,
            len: now.len(),
        };
        read_memory(tid, &[span], &mut now)?;
        if now.starts_with(WayBack::code()) {
            path.clear()?;
        } else if now.iter().any(|&b| b != 0) {
            return Err(RemoteError::VdsoFull { tid });
        }
        Ok(path)
    }

    /// Puts the way back of a thread there: to its state, without the mapping of
    /// ours whose start (0: there is none yet) and length are given.
    pub fn lay(&self, saved: &SavedRegs, mapping: (u64, u64)) -> SysResult<()> {
        poke(self.tid, self.at, &saved.way_back(mapping))
    }

    /// Zeros again.
    pub fn clear(&self) -> SysResult<()> {
        poke(self.tid, self.at, &vec![0; WayBack::len()])
    }

    /// The instruction for calls that make our mapping.
    pub fn call(&self) -> u64 {
        self.at + WayBack::CALL
    }

    /// From where a thread goes its way back.
    pub fn leave(&self) -> u64 {
        self.at + WayBack::leave()
    }
}

/// Arenas that a killed program of ours left behind: start and length.
pub fn left_behind(tid: i32, vmas: &[Vma]) -> Vec<(u64, u64)> {
    let code = INTERPRETER.code();
    let mut out = Vec::new();
    let exec = libc::PROT_READ | libc::PROT_EXEC;
    let candidate = |v: &&Vma| v.prot == exec && v.inode == 0 && v.name.is_empty();
    for v in vmas.iter().filter(candidate) {
        let mut page = vec![0; CODE_BYTES as usize];
        let span = Span {
            start: v.start,
            len: page.len(),
        };
        // What cannot be read is not ours.
        if read_memory(tid, &[span], &mut page).is_err() {
            continue;
        }
        let len = &page[ARENA_LEN_AT..ARENA_LEN_AT + 8];
        if page.starts_with(code) {
            out.push((
                v.start,
                u64::from_le_bytes(len.try_into().expect("8 bytes")),
            ));
        }
    }
    out
}
