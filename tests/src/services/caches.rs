//! Clients of stores of keys and values.

use anyhow::Result;

use super::client::{Doors, Talk, Trouble, same};
use super::wire::Wire;

/// Text of a length that differs from turn to turn.
fn text(number: u64) -> Vec<u8> {
    let length = 100 + (number * 37 % 3000) as usize;
    let word = format!("turn {number} ");
    word.bytes().cycle().take(length).collect()
}

/// memcached's text protocol: a value set and read back, and a counter.
pub struct Memcached {
    wire: Wire,
    key: String,
}

impl Memcached {
    /// Connects and starts a counter.
    ///
    /// # Errors
    /// When the server does not take it.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        Self::at(doors.to(port)?, port)
    }

    /// The same, over any port of this host; `name` sets clients apart.
    ///
    /// # Errors
    /// When the server does not take it.
    pub fn at(host_port: u16, name: u16) -> Result<Box<dyn Talk>> {
        let mut wire = Wire::connect(host_port)?;
        wire.send(format!("set c{name} 0 0 1\r\n0\r\n").as_bytes())?;
        anyhow::ensure!(wire.line()? == "STORED", "memcached did not store");
        let key = name.to_string();
        Ok(Box::new(Memcached { wire, key }))
    }
}

impl Talk for Memcached {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let (value, key) = (text(number), self.key.clone());
        let mut ask = format!("set v{key} 0 0 {}\r\n", value.len()).into_bytes();
        ask.extend(&value);
        ask.extend(format!("\r\nget v{key}\r\nincr c{key} 1\r\n").bytes());
        self.wire.send(&ask)?;
        let mut expected = format!("STORED\r\nVALUE v{key} 0 {}\r\n", value.len()).into_bytes();
        expected.extend(&value);
        expected.extend(format!("\r\nEND\r\n{}\r\n", number + 1).bytes());
        let got = self.wire.take(expected.len())?;
        same(&got, &expected)
    }
}

/// Fifty INCRs in one go, whose answers leave out no number and give none twice.
pub struct Pipelined {
    wire: Wire,
    next: u64,
}

const BATCH: u64 = 50;

impl Pipelined {
    /// Connects and clears the counter.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let mut wire = Wire::connect(doors.to(port)?)?;
        wire.send(b"SET counted 0\r\n")?;
        anyhow::ensure!(wire.line()? == "+OK", "SET was not answered");
        Ok(Box::new(Pipelined { wire, next: 1 }))
    }
}

impl Talk for Pipelined {
    fn turn(&mut self, _: u64) -> Result<u64, Trouble> {
        self.wire
            .send(&b"INCR counted\r\n".repeat(BATCH as usize))?;
        let mut checked = 0;
        for number in self.next..self.next + BATCH {
            let expected = format!(":{number}");
            checked += same(self.wire.line()?.as_bytes(), expected.as_bytes())?;
        }
        self.next += BATCH;
        Ok(checked)
    }
}

/// One connection subscribed to a channel, one that publishes to it.
pub struct PubSub {
    subscriber: Wire,
    publisher: Wire,
}

impl PubSub {
    /// Connects twice and subscribes.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn open(doors: &Doors, port: u16) -> Result<Box<dyn Talk>> {
        let port = doors.to(port)?;
        let mut subscriber = Wire::connect(port)?;
        subscriber.send(b"SUBSCRIBE held\r\n")?;
        let greeting = b"*3\r\n$9\r\nsubscribe\r\n$4\r\nheld\r\n:1\r\n";
        same(&subscriber.take(greeting.len())?, greeting)?;
        let publisher = Wire::connect(port)?;
        Ok(Box::new(PubSub {
            subscriber,
            publisher,
        }))
    }
}

impl Talk for PubSub {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let word = format!("news-{number}");
        self.publisher
            .send(format!("PUBLISH held {word}\r\n").as_bytes())?;
        let checked = same(self.publisher.line()?.as_bytes(), b":1")?;
        let message = format!(
            "*3\r\n$7\r\nmessage\r\n$4\r\nheld\r\n${}\r\n{word}\r\n",
            word.len()
        );
        let got = self.subscriber.take(message.len())?;
        Ok(checked + same(&got, message.as_bytes())?)
    }
}
