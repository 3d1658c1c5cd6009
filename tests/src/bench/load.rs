//! The trees that are measured: each holds much of one thing and waits.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{ForkResult, fork, pause, setsid};

use super::sys;
use crate::conformance::sys::{Map, PAGE};

/// What a tree holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// One process that waits.
    Sleep,
    /// A process with children.
    Flat(usize),
    /// Each process the only child of another.
    Chain(usize),
    /// One process with threads.
    Threads(usize),
    /// Open regular files.
    Files(usize),
    /// Open event descriptors.
    Eventfds(usize),
    /// Open pipes.
    Pipes(usize),
    /// Mappings of one page and different protection.
    Vmas(usize),
    /// MiB of anonymous memory in pages of 4 KiB, all different.
    Small(usize),
    /// The same in huge pages, as far as the kernel has them.
    Huge(usize),
}

impl Load {
    /// Its name on a command line.
    pub fn name(self) -> String {
        match self {
            Load::Sleep => "sleep".into(),
            Load::Flat(n) => format!("flat-{n}"),
            Load::Chain(n) => format!("chain-{n}"),
            Load::Threads(n) => format!("threads-{n}"),
            Load::Files(n) => format!("files-{n}"),
            Load::Eventfds(n) => format!("eventfds-{n}"),
            Load::Pipes(n) => format!("pipes-{n}"),
            Load::Vmas(n) => format!("vmas-{n}"),
            Load::Small(n) => format!("small-{n}"),
            Load::Huge(n) => format!("huge-{n}"),
        }
    }

    /// The load of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn parse(name: &str) -> Result<Self> {
        if name == "sleep" {
            return Ok(Load::Sleep);
        }
        let (kind, number) = name.split_once('-').context("no number in the load")?;
        let n = number.parse()?;
        Ok(match kind {
            "flat" => Load::Flat(n),
            "chain" => Load::Chain(n),
            "threads" => Load::Threads(n),
            "files" => Load::Files(n),
            "eventfds" => Load::Eventfds(n),
            "pipes" => Load::Pipes(n),
            "vmas" => Load::Vmas(n),
            "small" => Load::Small(n),
            "huge" => Load::Huge(n),
            _ => bail!("no such load: {name}"),
        })
    }

    /// Becomes the tree: the root leads a session, says so by making `ready`,
    /// and waits for ever.
    ///
    /// # Errors
    /// When the machine does not give what it needs.
    pub fn hold(self, dir: &Path) -> Result<()> {
        setsid()?;
        let mut held = Held::default();
        match self {
            Load::Sleep => {}
            Load::Flat(n) => flat(n)?,
            Load::Chain(n) => {
                if !chain(n)? {
                    return Ok(());
                }
            }
            Load::Threads(n) => threads(n)?,
            Load::Files(n) => {
                descriptors(n)?;
                for i in 0..n {
                    let path = dir.join(format!("file-{i}"));
                    let file = OpenOptions::new().create(true).append(true).open(&path);
                    held.files
                        .push(file.with_context(|| path.display().to_string())?);
                }
            }
            Load::Eventfds(n) => {
                descriptors(n)?;
                for _ in 0..n {
                    held.events.push(EventFd::new()?);
                }
            }
            Load::Pipes(n) => {
                descriptors(2 * n)?;
                for _ in 0..n {
                    held.pipes.push(nix::unistd::pipe()?);
                }
            }
            Load::Vmas(n) => held.memory.push(patchwork(n)?),
            Load::Small(mib) => held.memory.push(filled(mib, libc::MADV_NOHUGEPAGE)?),
            Load::Huge(mib) => held.memory.push(filled(mib, libc::MADV_HUGEPAGE)?),
        }
        File::create(dir.join("ready"))?;
        wait();
        drop(held);
        Ok(())
    }
}

#[derive(Default)]
struct Held {
    files: Vec<File>,
    events: Vec<EventFd>,
    pipes: Vec<(OwnedFd, OwnedFd)>,
    memory: Vec<Map>,
}

fn wait() {
    loop {
        pause();
    }
}

fn flat(n: usize) -> Result<()> {
    for _ in 1..n {
        // SAFETY: there is one thread, and the child does nothing but wait.
        if let ForkResult::Child = unsafe { fork() }? {
            wait();
        }
    }
    Ok(())
}

/// Whether this is the first of them, which goes on.
fn chain(n: usize) -> Result<bool> {
    let (done, tell) = nix::unistd::pipe()?;
    for depth in 1..n {
        // SAFETY: there is one thread; the child forks on or waits.
        match unsafe { fork() }? {
            ForkResult::Child => {}
            ForkResult::Parent { .. } if depth == 1 => {
                drop(tell);
                // Ends when the last of them has closed its end.
                let mut byte = [0];
                nix::unistd::read(&done, &mut byte)?;
                return Ok(true);
            }
            ForkResult::Parent { .. } => {
                drop((done, tell));
                wait();
                return Ok(false);
            }
        }
    }
    drop((done, tell));
    if n > 1 {
        wait();
    }
    Ok(n <= 1)
}

fn threads(n: usize) -> Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    for _ in 1..n {
        let tell = tell.clone();
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || {
                let _ = tell.send(());
                wait();
            })?;
    }
    for _ in 1..n {
        told.recv()?;
    }
    Ok(())
}

fn descriptors(n: usize) -> Result<()> {
    let limit = n as u64 + 100;
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).context("descriptors")
}

/// Every second page may be written: no two neighbours merge.
fn patchwork(n: usize) -> Result<Map> {
    let map = Map::private(n * PAGE)?;
    for page in (0..n).step_by(2) {
        sys::make_read_only(&map, page)?;
    }
    Ok(map)
}

fn filled(mib: usize, advice: i32) -> Result<Map> {
    let mut map = Map::private(mib << 20)?;
    map.advise(advice)?;
    for (i, page) in map.bytes_mut().chunks_exact_mut(PAGE).enumerate() {
        // Different in every page.
        let word = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for to in page.chunks_exact_mut(8) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
    Ok(map)
}
