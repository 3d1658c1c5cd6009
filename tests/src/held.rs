//! Clients that open one connection and hold it: before, through and after an
//! upgrade. Every byte of every answer is checked; any end of the connection is
//! told.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

/// An answer that takes longer than any blackout.
const PATIENCE: Duration = Duration::from_secs(300);

/// Between a good answer and the next question.
const INTERVAL: Duration = Duration::from_millis(20);

/// What a client says and what must come back, by turns.
type Talk = fn(u64) -> (Vec<u8>, Vec<u8>);

/// Redis echoes a different word each time.
pub fn redis(turn: u64) -> (Vec<u8>, Vec<u8>) {
    let word = format!("turn-{turn}");
    let ask = format!("ECHO {word}\r\n");
    (
        ask.into_bytes(),
        format!("${}\r\n{word}\r\n", word.len()).into_bytes(),
    )
}

/// nginx on a kept-alive connection: a page that is not there, whose answer has
/// no body for a HEAD and the same first bytes each time.
pub fn nginx(_: u64) -> (Vec<u8>, Vec<u8>) {
    (
        b"HEAD / HTTP/1.1\r\nHost: held\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nServer: nginx".to_vec(),
    )
}

/// What a held connection saw.
#[derive(Debug, Clone)]
pub struct Told {
    /// Answers, all of them right.
    pub answers: u64,
    /// Of them after the moment of [`Held::look_from_here`].
    pub since: u64,
    /// The longest wait for one.
    pub longest: Duration,
}

/// A client with its connection.
pub struct Held {
    name: &'static str,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    from: u64,
    thread: JoinHandle<Result<Told>>,
}

impl Held {
    /// Connects, gets a first answer, and goes on in the background.
    ///
    /// # Errors
    /// When there is no good answer.
    pub fn open(name: &'static str, port: u16, talk: Talk) -> Result<Self> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        turn(&mut stream, talk, 0).context(name)?;
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(1));
        let (stopped, counted) = (stop.clone(), answers.clone());
        let thread = std::thread::spawn(move || go_on(&mut stream, talk, &stopped, &counted));
        Ok(Self {
            name,
            stop,
            answers,
            from: 0,
            thread,
        })
    }

    /// Answers from now on are counted apart.
    pub fn look_from_here(&mut self) {
        self.from = self.answers.load(Ordering::Relaxed);
    }

    /// Waits for `more` answers, ends, and tells what was seen.
    ///
    /// # Errors
    /// When the connection ended, or an answer was wrong or did not come.
    pub fn finish(self, more: u64) -> Result<Told> {
        let start = Instant::now();
        let wanted = self.from + more;
        while self.answers.load(Ordering::Relaxed) < wanted
            && !self.thread.is_finished()
            && start.elapsed() < PATIENCE
        {
            std::thread::sleep(INTERVAL);
        }
        self.stop.store(true, Ordering::Relaxed);
        let told = self.thread.join();
        let told = told.map_err(|_| anyhow!("the client of {} panicked", self.name))?;
        let mut told = told.with_context(|| format!("the held connection to {}", self.name))?;
        told.since = told.answers - self.from;
        ensure!(
            told.since >= more,
            "the held connection to {} gave {} answers more, not {more}",
            self.name,
            told.since
        );
        Ok(told)
    }
}

fn go_on(
    stream: &mut TcpStream,
    talk: Talk,
    stop: &AtomicBool,
    counted: &AtomicU64,
) -> Result<Told> {
    let mut told = Told {
        answers: 1,
        since: 0,
        longest: Duration::ZERO,
    };
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        turn(stream, talk, told.answers).with_context(|| format!("turn {}", told.answers))?;
        told.longest = told.longest.max(start.elapsed());
        told.answers += 1;
        counted.store(told.answers, Ordering::Relaxed);
        std::thread::sleep(INTERVAL);
    }
    Ok(told)
}

/// One question and its answer. An HTTP head is read to its end.
fn turn(stream: &mut TcpStream, talk: Talk, number: u64) -> Result<()> {
    let (ask, expect) = talk(number);
    stream.write_all(&ask)?;
    let mut answer = vec![0; expect.len()];
    stream.read_exact(&mut answer)?;
    ensure!(
        answer == expect,
        "{:?} instead of {:?}",
        String::from_utf8_lossy(&answer),
        String::from_utf8_lossy(&expect)
    );
    if expect.starts_with(b"HTTP/") {
        let mut byte = [0];
        let mut end = Vec::new();
        while !end.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            end.push(byte[0]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn server(answers: usize) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for number in 0..answers {
                let (ask, answer) = redis(number as u64);
                let mut got = vec![0; ask.len()];
                if stream.read_exact(&mut got).is_err() {
                    return;
                }
                assert_eq!(got, ask);
                stream.write_all(&answer).unwrap();
            }
        });
        port
    }

    #[test]
    fn answers_are_counted() {
        let mut held = Held::open("redis", server(1000), redis).unwrap();
        held.look_from_here();
        assert!(held.finish(3).unwrap().since >= 3);
    }

    #[test]
    fn an_end_is_told() {
        let mut held = Held::open("redis", server(2), redis).unwrap();
        held.look_from_here();
        assert!(held.finish(5).is_err());
    }
}
