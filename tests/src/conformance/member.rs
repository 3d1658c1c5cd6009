//! Further processes of a program: forks that build their own part of the
//! state and check it when the first process tells them to.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::stage::POLL;
use super::sys::Map;
use super::{Check, Findings, Unavailable};

/// Room for a member's words.
const BOARD_BYTES: usize = 64 << 10;
const ROUND: usize = 0;
const DONE: usize = 1;
const LENGTH: usize = 2;
const TEXT: usize = 64;
/// What a member has done when it is set up.
const READY: u64 = 1;

/// A forked process. It shares a page with its parent, through which it is
/// told to check and tells what it found.
#[derive(Debug)]
pub struct Member {
    name: String,
    /// Its process id.
    pub pid: i32,
    board: Map,
}

impl Member {
    /// Forks; the child runs `setup` and then waits for its turns.
    ///
    /// The caller must have a single thread.
    pub fn start(name: &str, setup: impl FnOnce() -> Result<Check>) -> Result<Self> {
        Self::begin(name, move |board| i32::from(live(board, setup).is_err()))
    }

    fn begin(name: &str, work: impl FnOnce(Map) -> i32) -> Result<Self> {
        let board = Map::shared(BOARD_BYTES)?;
        // SAFETY: there is one thread, so no lock is held that the child would miss.
        match unsafe { fork() }? {
            ForkResult::Child => std::process::exit(work(board)),
            ForkResult::Parent { child } => {
                let member = Self {
                    name: name.to_owned(),
                    pid: child.as_raw(),
                    board,
                };
                let lines = member.wait(READY)?;
                if let [only] = &lines[..]
                    && let Some(why) = only.strip_prefix(Unavailable::PREFIX)
                {
                    return Err(Unavailable::because(why));
                }
                if !lines.is_empty() {
                    bail!("{}: {}", member.name, lines.join("; "));
                }
                Ok(member)
            }
        }
    }

    /// As [`Member::start`], and the child's first thread ends: another one
    /// does all the work.
    pub fn start_headless(
        name: &str,
        setup: impl FnOnce() -> Result<Check> + Send + 'static,
    ) -> Result<Self> {
        Self::begin(name, move |board| {
            std::thread::spawn(move || {
                let status = i32::from(live(board, setup).is_err());
                std::process::exit(status);
            });
            loop {
                // SAFETY: only this thread ends; what its stack holds stays.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
        })
    }

    /// Lets it check and takes over what it found.
    pub fn check(&self, f: &mut Findings) -> Result<()> {
        let round = self.board.word(ROUND).fetch_add(1, Ordering::SeqCst) + 1;
        let lines = self.wait(READY + round)?;
        f.extend(&format!("{}: ", self.name), lines);
        Ok(())
    }

    fn wait(&self, done: u64) -> Result<Vec<String>> {
        while self.board.word(DONE).load(Ordering::SeqCst) < done {
            let pid = Pid::from_raw(self.pid);
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                // A stranger's child after its parent's death: nobody to ask.
                Ok(WaitStatus::StillAlive) | Err(_) => std::thread::sleep(POLL),
                Ok(status) => bail!("{}: ended: {status:?}", self.name),
            }
        }
        let len = self.board.word(LENGTH).load(Ordering::SeqCst) as usize;
        let text = std::str::from_utf8(&self.board.bytes()[TEXT..TEXT + len]).context("board")?;
        Ok(text.lines().map(str::to_owned).collect())
    }
}

fn live(mut board: Map, setup: impl FnOnce() -> Result<Check>) -> Result<()> {
    let mut check = match setup() {
        Ok(check) => check,
        Err(e) => {
            say(&mut board, &[format!("{e:#}")], READY);
            return Err(e);
        }
    };
    say(&mut board, &[], READY);
    for round in 1.. {
        while load(board.word(ROUND)) < round {
            std::thread::sleep(POLL);
        }
        let mut findings = Findings::default();
        findings.run(&mut check);
        say(&mut board, findings.lines(), READY + round);
    }
    Ok(())
}

fn say(board: &mut Map, lines: &[String], done: u64) {
    let text = lines.join("\n");
    let len = text.len().min(BOARD_BYTES - TEXT);
    board.bytes_mut()[TEXT..TEXT + len].copy_from_slice(&text.as_bytes()[..len]);
    board.word(LENGTH).store(len as u64, Ordering::SeqCst);
    board.word(DONE).store(done, Ordering::SeqCst);
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::SeqCst)
}
