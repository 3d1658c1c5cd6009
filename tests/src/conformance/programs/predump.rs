//! Memory that changes while generations of it are written.
//!
//! Works in bursts and rests in between in one and the same state, so that the
//! runner can compare what it sees. A pre-dump or dump falls anywhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::mman::ProtFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::conformance::sys::{Map, PAGE};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "pre-dump/writes",
        "pages written to, dropped and protected all the time",
        writes,
    ),
    Case::new(
        "pre-dump/mappings",
        "mappings replaced and moved onto each other all the time",
        mappings,
    ),
    Case::new(
        "pre-dump/children",
        "children that come and go between the generations",
        children,
    ),
    Case::new(
        "pre-dump/untouched",
        "much memory that does not change, some that does",
        untouched,
    ),
];

const BURST: Duration = Duration::from_millis(4);
const REST: Duration = Duration::from_millis(12);
const SLOTS: usize = 16;
const SLOT_PAGES: usize = 16;

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % sides
    }
}

/// Pages and what each must hold: a number, or 0 where it was dropped.
struct Ground {
    map: Map,
    expected: Vec<u64>,
    dice: Dice,
    stamp: u64,
}

impl Ground {
    fn new() -> Result<Self> {
        let pages = SLOTS * SLOT_PAGES;
        Ok(Self {
            map: Map::private(pages * PAGE)?,
            expected: vec![0; pages],
            dice: Dice(7),
            stamp: 0,
        })
    }

    fn write(&mut self, page: usize) {
        self.stamp += 1;
        self.map
            .word(page * PAGE / 8)
            .store(self.stamp, Ordering::SeqCst);
        self.map
            .word((page + 1) * PAGE / 8 - 1)
            .store(self.stamp, Ordering::SeqCst);
        self.expected[page] = self.stamp;
    }

    fn verify(&self) -> Result<()> {
        for (page, wanted) in self.expected.iter().enumerate() {
            for word in [page * PAGE / 8, (page + 1) * PAGE / 8 - 1] {
                let found = self.map.word(word).load(Ordering::SeqCst);
                if found != *wanted {
                    bail!("page {page}: wanted {wanted}, found {found}");
                }
            }
        }
        Ok(())
    }

    fn slot(&self, slot: usize) -> (*mut libc::c_void, usize) {
        let at = self.map.addr() + slot * SLOT_PAGES * PAGE;
        (at as *mut libc::c_void, SLOT_PAGES * PAGE)
    }

    fn drop_pages(&mut self, slot: usize) -> Result<()> {
        let (at, len) = self.slot(slot);
        // SAFETY: inside our map; its words may become zero at any time.
        if unsafe { libc::madvise(at, len, libc::MADV_DONTNEED) } < 0 {
            bail!("MADV_DONTNEED");
        }
        self.expected[slot * SLOT_PAGES..(slot + 1) * SLOT_PAGES].fill(0);
        Ok(())
    }

    /// New memory in the place of a slot.
    fn replace(&mut self, slot: usize) -> Result<()> {
        let (at, len) = self.slot(slot);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces a part of our map with memory of the same kind.
        if unsafe { libc::mmap(at, len, prot, flags, -1, 0) } != at {
            bail!("mmap");
        }
        self.expected[slot * SLOT_PAGES..(slot + 1) * SLOT_PAGES].fill(0);
        Ok(())
    }

    /// Moves a slot onto another one, and new memory to where it was.
    fn shift(&mut self, from: usize, to: usize) -> Result<()> {
        if from == to {
            return Ok(());
        }
        let ((old, len), (new, _)) = (self.slot(from), self.slot(to));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are parts of our map; the hole is filled below before
        // anything looks at it.
        if unsafe { libc::mremap(old, len, len, flags, new) } != new {
            bail!("mremap");
        }
        self.expected
            .copy_within(from * SLOT_PAGES..(from + 1) * SLOT_PAGES, to * SLOT_PAGES);
        self.replace(from)
    }
}

/// Runs a step again and again in bursts, in a thread of its own; the check
/// wants it to have gone on, without an error.
fn busy(mut step: impl FnMut() -> Result<()> + Send + 'static) -> Result<Check> {
    let rounds = Arc::new(AtomicU64::new(0));
    let failed = Arc::new(std::sync::Mutex::new(None));
    let (mine, said) = (rounds.clone(), failed.clone());
    std::thread::spawn(move || {
        loop {
            let end = Instant::now() + BURST;
            while Instant::now() < end {
                if let Err(e) = step() {
                    *said.lock().expect("no panic") = Some(format!("{e:#}"));
                    return;
                }
                mine.fetch_add(1, Ordering::SeqCst);
            }
            std::thread::sleep(REST);
        }
    });
    while rounds.load(Ordering::SeqCst) < 100 && failed.lock().expect("no panic").is_none() {
        std::thread::sleep(REST);
    }
    Ok(Box::new(move |f| {
        let before = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < before + 100 {
            if let Some(e) = failed.lock().expect("no panic").take() {
                f.note(e);
                return Ok(());
            }
            std::thread::sleep(REST);
        }
        Ok(())
    }))
}

fn writes(_: &Stage) -> Result<Check> {
    let mut ground = Ground::new()?;
    busy(move || {
        let page = ground.dice.roll(SLOTS * SLOT_PAGES);
        match ground.dice.roll(16) {
            0 => ground.drop_pages(page / SLOT_PAGES)?,
            1 => {
                ground.map.protect(ProtFlags::PROT_READ)?;
                ground.verify()?;
                ground
                    .map
                    .protect(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
            }
            _ => ground.write(page),
        }
        ground.verify()
    })
}

fn mappings(_: &Stage) -> Result<Check> {
    let mut ground = Ground::new()?;
    busy(move || {
        let (a, b) = (ground.dice.roll(SLOTS), ground.dice.roll(SLOTS));
        match ground.dice.roll(8) {
            0 => ground.replace(a)?,
            1 => ground.shift(a, b)?,
            _ => {
                let page = ground.dice.roll(SLOTS * SLOT_PAGES);
                ground.write(page);
            }
        }
        ground.verify()
    })
}

fn children(_: &Stage) -> Result<Check> {
    let mut ground = Ground::new()?;
    busy(move || {
        for _ in 0..8 {
            let page = ground.dice.roll(SLOTS * SLOT_PAGES);
            ground.write(page);
        }
        // SAFETY: the child only touches memory and leaves by `_exit`; the
        // other thread only sleeps and looks at files.
        match unsafe { fork() }? {
            ForkResult::Child => {
                for page in 0..8 {
                    ground.write(page);
                }
                let status = i32::from(ground.verify().is_err());
                // SAFETY: leaves at once.
                unsafe { libc::_exit(status) }
            }
            ForkResult::Parent { child } => {
                let status = waitpid(child, None).context("the child")?;
                if status != WaitStatus::Exited(child, 0) {
                    bail!("the child ended: {status:?}");
                }
            }
        }
        ground.verify()
    })
}

fn untouched(_: &Stage) -> Result<Check> {
    const PAGES: usize = 2048;
    let map = Map::private(PAGES * PAGE)?;
    for page in 0..PAGES {
        map.word(page * PAGE / 8)
            .store(page as u64 + 1, Ordering::SeqCst);
    }
    let mut count = 0_u64;
    busy(move || {
        count += 1;
        let last = map.word((PAGES - 1) * PAGE / 8);
        last.store(count, Ordering::SeqCst);
        for page in 0..PAGES - 1 {
            let found = map.word(page * PAGE / 8).load(Ordering::SeqCst);
            if found != page as u64 + 1 {
                bail!("page {page} holds {found}");
            }
        }
        Ok(())
    })
}
