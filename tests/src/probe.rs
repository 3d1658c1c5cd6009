//! Looks at the services from outside the guest, over a fresh connection each
//! time, and records for how long they did not answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Time between the end of one attempt and the next.
const INTERVAL: Duration = Duration::from_millis(50);

/// After this long an attempt counts as failed.
const ATTEMPT: Duration = Duration::from_millis(500);

/// What is asked and how the answer begins.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// Name for people.
    pub name: &'static str,
    /// Sent after connecting.
    pub ask: &'static [u8],
    /// The first bytes of a good answer.
    pub expect: &'static [u8],
}

/// Redis' `PING`.
pub const REDIS: Question = Question {
    name: "redis",
    ask: b"PING\r\n",
    expect: b"+PONG",
};

/// A GET of nginx' start page.
pub const NGINX: Question = Question {
    name: "nginx",
    ask: b"GET / HTTP/1.0\r\nHost: probe\r\n\r\n",
    expect: b"HTTP/1.1 200",
};

/// What one probe saw.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Good answers.
    pub answers: u32,
    /// Failed attempts.
    pub failures: u32,
    /// The longest time from one good answer to the next.
    pub longest_gap: Duration,
}

/// A thread that asks again and again.
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Probe {
    /// Starts asking.
    pub fn start(question: Question, port: u16) -> Probe {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || watch(question, port, &stopped));
        Probe { stop, thread }
    }

    /// Ends it.
    ///
    /// # Errors
    /// When its thread panicked.
    pub fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a probe panicked"))
    }
}

fn watch(question: Question, port: u16, stop: &AtomicBool) -> Seen {
    let mut seen = Seen {
        answers: 0,
        failures: 0,
        longest_gap: Duration::ZERO,
    };
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if ask(question, port).is_ok() {
            seen.answers += 1;
            seen.longest_gap = seen.longest_gap.max(last.elapsed());
            last = Instant::now();
        } else {
            seen.failures += 1;
        }
        std::thread::sleep(INTERVAL);
    }
    seen.longest_gap = seen.longest_gap.max(last.elapsed());
    seen
}

/// Asks once.
///
/// # Errors
/// When the answer does not come in half a second or is not the expected one.
pub fn ask(question: Question, port: u16) -> Result<()> {
    let start = Instant::now();
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), ATTEMPT)?;
    stream.write_all(question.ask)?;
    let mut answer = vec![0; question.expect.len()];
    let mut have = 0;
    while have < answer.len() {
        let left = ATTEMPT
            .checked_sub(start.elapsed())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| anyhow!("no answer"))?;
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut answer[have..])? {
            0 => return Err(anyhow!("hung up")),
            count => have += count,
        }
    }
    if answer != question.expect {
        return Err(anyhow!("{} answered {answer:?}", question.name));
    }
    Ok(())
}

/// Asks until there is a good answer.
///
/// # Errors
/// When there is none in `timeout`.
pub fn wait_for(question: Question, port: u16, timeout: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        match ask(question, port) {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() > timeout => {
                return Err(
                    error.context(format!("{} did not answer in {timeout:?}", question.name))
                );
            }
            Err(_) => std::thread::sleep(INTERVAL),
        }
    }
}
