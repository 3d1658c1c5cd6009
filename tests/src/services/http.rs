//! Clients of web servers: kept-alive connections, downloads in flight,
//! websockets.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::client::{Doors, Talk, Trouble, same};
use super::wire::Wire;

/// What is asked in a turn and the body that must come back.
pub type Page = fn(u64) -> (String, Vec<u8>);

/// The head of an answer: its status and the length of its body.
struct Head {
    status: String,
    length: Option<usize>,
    chunked: bool,
}

fn head(wire: &mut Wire) -> Result<Head> {
    let status = wire.line()?;
    let mut head = Head {
        status,
        length: None,
        chunked: false,
    };
    loop {
        let line = wire.line()?;
        if line.is_empty() {
            return Ok(head);
        }
        let line = line.to_ascii_lowercase();
        if let Some(length) = line.strip_prefix("content-length:") {
            head.length = Some(length.trim().parse()?);
        }
        head.chunked |= line.starts_with("transfer-encoding:") && line.contains("chunked");
        ensure!(!line.contains("connection: close"), "the server hangs up");
    }
}

fn body(wire: &mut Wire, head: &Head) -> Result<Vec<u8>> {
    if let Some(length) = head.length {
        return wire.take(length);
    }
    if !head.chunked {
        bail!("an answer without a length");
    }
    let mut body = Vec::new();
    loop {
        let length = usize::from_str_radix(wire.line()?.trim(), 16).context("a chunk's length")?;
        body.extend(wire.take(length)?);
        wire.line()?;
        if length == 0 {
            return Ok(body);
        }
    }
}

/// A kept-alive connection with one request after another.
pub struct KeptAlive {
    wire: Wire,
    page: Page,
}

impl KeptAlive {
    /// Connects.
    ///
    /// # Errors
    /// When nobody accepts.
    pub fn open(doors: &Doors, port: u16, page: Page) -> Result<Box<dyn Talk>> {
        let wire = Wire::connect(doors.to(port)?)?;
        Ok(Box::new(KeptAlive { wire, page }))
    }
}

impl Talk for KeptAlive {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let (path, expected) = (self.page)(number);
        self.wire
            .send(format!("GET {path} HTTP/1.1\r\nHost: held\r\n\r\n").as_bytes())?;
        let head = head(&mut self.wire)?;
        let body = body(&mut self.wire, &head)?;
        same(
            head.status.get(..12).unwrap_or_default().as_bytes(),
            b"HTTP/1.1 200",
        )?;
        same(&body, &expected)
    }
}

/// Connections that are held at once.
const CROWD: usize = 1000;

/// How many of them ask in one turn.
const CROWD_TURN: usize = 100;

/// Very many kept-alive connections, which ask a hundred at a time.
pub struct Crowd {
    wires: Vec<Wire>,
}

impl Crowd {
    /// Connects them all; each asks once.
    ///
    /// # Errors
    /// When one is not accepted or not answered.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let port = doors.to(port)?;
        let mut crowd = Crowd { wires: Vec::new() };
        // One by one: what is between us and the guest lets few wait.
        for number in 0..CROWD {
            crowd.wires.push(Wire::connect(port)?);
            if let Err(trouble) = crowd.ask(number..number + 1) {
                bail!("connection {number}: {trouble}");
            }
        }
        Ok(Box::new(crowd))
    }

    /// Some of them ask, all at once, and are answered.
    fn ask(&mut self, who: Range<usize>) -> Result<u64, Trouble> {
        let from = who.start;
        let wires = &mut self.wires[who];
        let mut expected = Vec::new();
        for (number, wire) in wires.iter_mut().enumerate() {
            let at = (from + number) * 16;
            let range = format!("Range: bytes={at}-{}", at + 15);
            wire.send(
                format!("GET /numbers HTTP/1.1\r\nHost: held\r\n{range}\r\n\r\n").as_bytes(),
            )?;
            expected.push(format!("{:015}\n", from + number).into_bytes());
        }
        let mut checked = 0;
        for (wire, expected) in wires.iter_mut().zip(expected) {
            let head = head(wire)?;
            let body = body(wire, &head)?;
            same(
                head.status.get(..12).unwrap_or_default().as_bytes(),
                b"HTTP/1.1 206",
            )?;
            checked += same(&body, &expected)?;
        }
        Ok(checked)
    }
}

impl Talk for Crowd {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let turns = (CROWD / CROWD_TURN) as u64;
        let from = (number % turns) as usize * CROWD_TURN;
        self.ask(from..from + CROWD_TURN)
    }
}

/// Lines in the file that is downloaded, each its number.
const LINES: u64 = 1_000_000;

/// A page of 256 lines, always the same.
pub fn held_page(_: u64) -> (String, Vec<u8>) {
    ("/held".into(), held())
}

fn held() -> Vec<u8> {
    (0..256).fold(Vec::new(), |mut page, i| {
        page.extend(format!("line-{i:03}-of-a-page\n").bytes());
        page
    })
}

/// A download that is read slowly, so that it is on its way all the time; once
/// at its end the next begins on the same connection.
pub struct Download {
    wire: Wire,
    line: u64,
}

/// Lines of sixteen bytes that a turn reads.
const LINES_A_TURN: u64 = 256;

impl Download {
    /// Connects.
    ///
    /// # Errors
    /// When nobody accepts.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let wire = Wire::connect(doors.to(port)?)?;
        Ok(Box::new(Download { wire, line: LINES }))
    }
}

impl Talk for Download {
    fn turn(&mut self, _: u64) -> Result<u64, Trouble> {
        if self.line == LINES {
            self.wire
                .send(b"GET /numbers HTTP/1.1\r\nHost: held\r\n\r\n")?;
            let head = head(&mut self.wire)?;
            same(
                head.status.get(..12).unwrap_or_default().as_bytes(),
                b"HTTP/1.1 200",
            )?;
            same(
                head.length.unwrap_or(0).to_string().as_bytes(),
                (LINES * 16).to_string().as_bytes(),
            )?;
            self.line = 0;
        }
        let count = LINES_A_TURN.min(LINES - self.line);
        let got = self.wire.take(count as usize * 16)?;
        let mut expected = Vec::with_capacity(got.len());
        for line in self.line..self.line + count {
            expected.extend(format!("{line:015}\n").bytes());
        }
        self.line += count;
        same(&got, &expected)
    }
}

/// A websocket whose server sends back what it gets (RFC 6455).
pub struct WebSocket {
    wire: Wire,
}

impl WebSocket {
    /// Connects and upgrades the connection.
    ///
    /// # Errors
    /// When the server does not switch.
    pub fn open(doors: &Doors, port: u16, path: &str) -> Result<Box<dyn Talk>> {
        let mut wire = Wire::connect(doors.to(port)?)?;
        wire.send(
            format!(
                "GET {path} HTTP/1.1\r\nHost: held\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            .as_bytes(),
        )?;
        let head = head(&mut wire)?;
        ensure!(head.status.contains(" 101 "), "{}", head.status);
        Ok(Box::new(WebSocket { wire }))
    }
}

impl Talk for WebSocket {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let text = format!("message {number} over a websocket");
        let mask = (number as u32).to_le_bytes();
        let mut frame = vec![0x81, 0x80 | text.len() as u8];
        frame.extend(mask);
        frame.extend(text.bytes().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
        self.wire.send(&frame)?;
        let head = self.wire.take(2)?;
        let got = self.wire.take(usize::from(head[1] & 0x7f))?;
        Ok(same(&head, &[0x81, text.len() as u8])? + same(&got, text.as_bytes())?)
    }
}
