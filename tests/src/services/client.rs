//! A client that opens its connection once and holds it: before, through and
//! after upgrades. Every byte of every answer is checked; a lost connection and
//! a wrong answer are counted, and the client goes on with a new connection, so
//! that the upgrades after it are seen too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

/// Longer than any blackout, also that of an emulated machine on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// Between a good answer and the next question.
const INTERVAL: Duration = Duration::from_millis(400);

/// How long a client may be in the middle of a question when it is ended.
const LAST_ANSWER: Duration = Duration::from_secs(10);

/// Host ports that lead to the guest's, by the guest's number.
#[derive(Debug, Clone, Default)]
pub struct Doors(pub BTreeMap<u16, u16>);

impl Doors {
    /// The host's port for one of the guest.
    ///
    /// # Errors
    /// When none was opened.
    pub fn to(&self, guest: u16) -> Result<u16> {
        let port = self.0.get(&guest);
        port.copied()
            .with_context(|| format!("no port leads to the guest's {guest}"))
    }
}

/// What went wrong in a turn.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The answer has other bytes.
    #[error("{got:?} instead of {expected:?}")]
    Wrong {
        /// What came.
        got: String,
        /// What should have come.
        expected: String,
    },
    /// The connection ended, or nothing came for too long.
    #[error("the connection is lost: {0:#}")]
    Lost(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Trouble::Lost(error)
    }
}

/// Compares, and says how many bytes were right.
///
/// # Errors
/// When they differ.
pub fn same(got: &[u8], expected: &[u8]) -> Result<u64, Trouble> {
    if got == expected {
        return Ok(got.len() as u64);
    }
    Err(Trouble::Wrong {
        got: String::from_utf8_lossy(got).into_owned(),
        expected: String::from_utf8_lossy(expected).into_owned(),
    })
}

/// One open connection, or several that belong together.
pub trait Talk: Send {
    /// A question and its answer; gives the bytes that were checked.
    ///
    /// # Errors
    /// When the answer is not the right one or none comes.
    fn turn(&mut self, number: u64) -> Result<u64, Trouble>;
}

/// Connects.
pub type Open = fn(&Doors) -> Result<Box<dyn Talk>>;

/// What a client saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Answers, all of them right.
    pub turns: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Connections that ended.
    pub resets: u64,
    /// Answers that were not right.
    pub wrong: u64,
    /// The longest wait for an answer.
    pub longest: Duration,
    /// What went wrong first.
    pub first_trouble: Option<String>,
}

/// A client at work.
pub struct Holding {
    /// What it holds, for people.
    pub holds: &'static str,
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    thread: JoinHandle<()>,
}

impl Holding {
    /// Connects, gets a first answer, and goes on in the background.
    ///
    /// # Errors
    /// When there is no good answer.
    pub fn open(holds: &'static str, open: Open, doors: &Doors) -> Result<Holding> {
        let mut talk = open(doors).context(holds)?;
        let bytes = talk.turn(0).context(holds)?;
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Mutex::new(Tally {
            turns: 1,
            bytes,
            ..Tally::default()
        }));
        let (stopped, told, doors) = (stop.clone(), tally.clone(), doors.clone());
        let thread = std::thread::spawn(move || go_on(talk, open, &doors, &stopped, &told));
        Ok(Holding {
            holds,
            stop,
            tally,
            thread,
        })
    }

    /// What it saw so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().map(|t| t.clone()).unwrap_or_default()
    }

    /// Waits for `more` right answers from now on.
    ///
    /// # Errors
    /// When they do not come.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let start = Instant::now();
        let wanted = self.tally().turns + more;
        while self.tally().turns < wanted {
            if self.thread.is_finished() || start.elapsed() > PATIENCE {
                bail!("{}: {:?}", self.holds, self.tally());
            }
            std::thread::sleep(INTERVAL);
        }
        Ok(())
    }

    /// Ends it. One that waits for an answer that does not come is left behind.
    ///
    /// # Errors
    /// When its thread panicked.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let start = Instant::now();
        while !self.thread.is_finished() {
            if start.elapsed() > LAST_ANSWER {
                return Ok(self.tally());
            }
            std::thread::sleep(INTERVAL);
        }
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the client of {} panicked", self.holds))?;
        let tally = self.tally.lock().map(|t| t.clone());
        tally.map_err(|_| anyhow!("the client of {} panicked", self.holds))
    }
}

fn go_on(
    mut talk: Box<dyn Talk>,
    open: Open,
    doors: &Doors,
    stop: &AtomicBool,
    tally: &Mutex<Tally>,
) {
    let mut number = 1;
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let turn = talk.turn(number);
        let Ok(mut told) = tally.lock() else { return };
        let trouble = match turn {
            Ok(bytes) => {
                told.turns += 1;
                told.bytes += bytes;
                told.longest = told.longest.max(start.elapsed());
                number += 1;
                drop(told);
                std::thread::sleep(INTERVAL);
                continue;
            }
            Err(_) if stop.load(Ordering::Relaxed) => return,
            Err(trouble) => trouble,
        };
        match &trouble {
            Trouble::Wrong { .. } => told.wrong += 1,
            Trouble::Lost(_) => told.resets += 1,
        }
        let said = format!("turn {number}: {trouble}");
        told.first_trouble.get_or_insert(said);
        drop(told);
        let Some(again) = reopen(open, doors, stop) else {
            return;
        };
        talk = again;
        number = 0;
    }
}

fn reopen(open: Open, doors: &Doors, stop: &AtomicBool) -> Option<Box<dyn Talk>> {
    while !stop.load(Ordering::Relaxed) {
        if let Ok(talk) = open(doors) {
            return Some(talk);
        }
        std::thread::sleep(INTERVAL);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counted(u64);

    impl Talk for Counted {
        fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
            same(&number.to_le_bytes(), &number.to_le_bytes())?;
            if number == self.0 {
                return Err(anyhow!("reset").into());
            }
            Ok(8)
        }
    }

    #[test]
    fn a_lost_connection_is_counted_and_opened_again() {
        let open: Open = |_| Ok(Box::new(Counted(2)));
        let held = Holding::open("numbers", open, &Doors::default()).unwrap();
        held.wait_for(3).unwrap();
        let tally = held.finish().unwrap();
        assert!(tally.resets >= 1 && tally.wrong == 0, "{tally:?}");
        assert_eq!(tally.bytes, tally.turns * 8);
        assert!(tally.first_trouble.unwrap().contains("turn 2"));
    }

    #[test]
    fn a_wrong_answer_is_told() {
        let wrong = same(b"a", b"b").unwrap_err();
        assert!(matches!(wrong, Trouble::Wrong { .. }));
    }
}
