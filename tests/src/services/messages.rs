//! Clients of message brokers.

use anyhow::{Result, ensure};

use super::client::{Doors, Talk, Trouble, same};
use super::wire::Wire;

/// MQTT 3.1.1: one connection that publishes and one that is subscribed, both
/// with quality of service 1. The subscriber acknowledges a message only when
/// the next one has come: one is always on its way.
pub struct Mqtt {
    publisher: Wire,
    subscriber: Wire,
    unacknowledged: Option<[u8; 2]>,
}

const TOPIC: &str = "held/messages";

/// A packet: its first byte and what follows its length.
fn packet(first: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut length = rest.len();
    while length > 0x7f {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(rest);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u16).to_be_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes
}

fn read_packet(wire: &mut Wire) -> Result<(u8, Vec<u8>)> {
    let first = wire.take(1)?[0];
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = wire.take(1)?[0];
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return Ok((first, wire.take(length)?));
        }
        ensure!(shift < 28, "a length is too long");
    }
}

impl Mqtt {
    /// Connects twice and subscribes.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let mut publisher = mqtt_session(doors, port, "publisher")?;
        let mut subscriber = mqtt_session(doors, port, "subscriber")?;
        let mut subscribe = vec![0, 1];
        subscribe.extend(string(TOPIC));
        subscribe.push(1);
        subscriber.send(&packet(0x82, &subscribe))?;
        let answer = read_packet(&mut subscriber)?;
        ensure!(answer == (0x90, vec![0, 1, 1]), "SUBACK {answer:?}");
        // A ping each: nothing else is on its way.
        for wire in [&mut publisher, &mut subscriber] {
            wire.send(&[0xc0, 0])?;
            ensure!(read_packet(wire)? == (0xd0, vec![]), "no PINGRESP");
        }
        Ok(Box::new(Mqtt {
            publisher,
            subscriber,
            unacknowledged: None,
        }))
    }
}

/// A clean session without keep-alive.
fn mqtt_session(doors: &Doors, port: u16, name: &str) -> Result<Wire> {
    let mut wire = Wire::connect(doors.to(port)?)?;
    let mut connect = string("MQTT");
    connect.extend([4, 2, 0, 0]);
    connect.extend(string(name));
    wire.send(&packet(0x10, &connect))?;
    let answer = read_packet(&mut wire)?;
    ensure!(answer == (0x20, vec![0, 0]), "CONNACK {answer:?}");
    Ok(wire)
}

impl Talk for Mqtt {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let id = (number as u16 % 60_000 + 1).to_be_bytes();
        let text = format!("message {number} ").repeat(20);
        let mut publish = string(TOPIC);
        publish.extend(id);
        publish.extend(text.bytes());
        self.publisher.send(&packet(0x32, &publish))?;
        let (first, puback) = read_packet(&mut self.publisher)?;
        let mut checked = same(&[first], &[0x40])? + same(&puback, &id)?;
        let (first, got) = read_packet(&mut self.subscriber)?;
        // Sent again (the DUP flag) would be another first byte.
        checked += same(&[first], &[0x32])?;
        let at = 2 + TOPIC.len();
        checked += same(got.get(..at).unwrap_or_default(), &string(TOPIC))?;
        checked += same(got.get(at + 2..).unwrap_or_default(), text.as_bytes())?;
        if let Some(last) = self.unacknowledged {
            self.subscriber.send(&packet(0x40, &last))?;
        }
        self.unacknowledged = Some([got[at], got[at + 1]]);
        Ok(checked)
    }
}

/// STOMP 1.2: one connection sends to a queue and is subscribed to it. It
/// acknowledges a message only when the next one has come.
pub struct Stomp {
    wire: Wire,
    unacknowledged: Option<String>,
}

impl Stomp {
    /// Connects and subscribes.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let mut wire = Wire::connect(doors.to(port)?)?;
        wire.send(
            b"CONNECT\naccept-version:1.2\nhost:/\nlogin:guest\npasscode:guest\nheart-beat:0,0\n\n\0",
        )?;
        let frame = read_frame(&mut wire)?;
        ensure!(frame.starts_with("CONNECTED\n"), "{frame}");
        wire.send(
            b"SUBSCRIBE\nid:0\ndestination:/queue/held\nack:client-individual\n\
              prefetch-count:10\nreceipt:s\n\n\0",
        )?;
        let frame = read_frame(&mut wire)?;
        ensure!(frame.starts_with("RECEIPT\n"), "{frame}");
        Ok(Box::new(Stomp {
            wire,
            unacknowledged: None,
        }))
    }
}

/// A frame without its end.
fn read_frame(wire: &mut Wire) -> Result<String> {
    let mut bytes = wire.until(0)?;
    bytes.pop();
    // Ends of lines may stand between frames.
    Ok(String::from_utf8(bytes)?
        .trim_start_matches('\n')
        .to_owned())
}

impl Talk for Stomp {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let text = format!("message {number}");
        self.wire
            .send(format!("SEND\ndestination:/queue/held\n\n{text}\0").as_bytes())?;
        let frame = read_frame(&mut self.wire)?;
        let (head, body) = frame.split_once("\n\n").unwrap_or((&frame, ""));
        let mut checked = same(
            head.lines().next().unwrap_or_default().as_bytes(),
            b"MESSAGE",
        )?;
        checked += same(body.as_bytes(), text.as_bytes())?;
        let ack = head.lines().find_map(|line| line.strip_prefix("ack:"));
        let ack = ack.map(|id| format!("ACK\nid:{id}\n\n\0"));
        if let Some(last) = std::mem::replace(&mut self.unacknowledged, ack) {
            self.wire.send(last.as_bytes())?;
        }
        Ok(checked)
    }
}
