//! As much of the Redis protocol (RESP2) as the harness needs: commands with
//! any arguments, pipelined, and their replies.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest string and longest array taken from a server.
const LENGTH_MAX: usize = 64 << 20;

/// Deepest nesting of arrays taken from a server.
const DEPTH_MAX: usize = 8;

/// A reply of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A status such as `OK`.
    Simple(String),
    /// A number.
    Integer(i64),
    /// A string of bytes.
    Bulk(Vec<u8>),
    /// No value.
    Nil,
    /// Several values.
    Array(Vec<Value>),
    /// The command failed.
    Error(String),
}

/// A connection to a Redis server.
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects to a port of this host.
    ///
    /// # Errors
    /// When nobody answers in `timeout`, which also bounds each reply.
    pub fn connect(port: u16, timeout: Duration) -> Result<Client> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let stream =
            TcpStream::connect_timeout(&address, timeout).context("connecting to redis")?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        Ok(Client {
            reader: BufReader::with_capacity(1 << 16, stream),
        })
    }

    /// Sends one command and returns its reply; an error reply is an error.
    ///
    /// # Errors
    /// When the server reports one or hangs up.
    pub fn call(&mut self, arguments: &[&[u8]]) -> Result<Value> {
        let mut replies = self.pipeline(&[arguments.to_vec()])?;
        replies.pop().context("redis sent no reply")
    }

    /// Sends commands in one go and returns their replies.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn pipeline(&mut self, commands: &[Vec<&[u8]>]) -> Result<Vec<Value>> {
        let mut bytes = Vec::new();
        for command in commands {
            encode(command, &mut bytes);
        }
        self.reader
            .get_mut()
            .write_all(&bytes)
            .context("writing to redis")?;
        let mut replies = Vec::with_capacity(commands.len());
        for _ in commands {
            match decode(&mut self.reader, 0).context("reading from redis")? {
                Value::Error(message) => bail!("redis said: {message}"),
                value => replies.push(value),
            }
        }
        Ok(replies)
    }
}

fn encode(command: &[&[u8]], bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
    for argument in command {
        bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        bytes.extend_from_slice(argument);
        bytes.extend_from_slice(b"\r\n");
    }
}

fn decode(reader: &mut impl BufRead, depth: usize) -> Result<Value> {
    let mut line = Vec::new();
    reader.by_ref().take(1 << 16).read_until(b'\n', &mut line)?;
    let line = String::from_utf8(line)?;
    let Some(line) = line.strip_suffix("\r\n") else {
        bail!("a reply broke off")
    };
    let Some(kind) = line.chars().next().filter(char::is_ascii) else {
        bail!("an empty reply")
    };
    let rest = &line[1..];
    let length = || -> Result<Option<usize>> {
        match rest.parse::<i64>().context("a length is not a number")? {
            -1 => Ok(None),
            length => match usize::try_from(length) {
                Ok(length) if length <= LENGTH_MAX => Ok(Some(length)),
                _ => bail!("a reply has the length {length}"),
            },
        }
    };
    Ok(match kind {
        '+' => Value::Simple(rest.to_owned()),
        '-' => Value::Error(rest.to_owned()),
        ':' => Value::Integer(rest.parse().context("a number is none")?),
        '$' => {
            let Some(length) = length()? else {
                return Ok(Value::Nil);
            };
            let mut bytes = vec![0; length + 2];
            reader.read_exact(&mut bytes)?;
            if !bytes.ends_with(b"\r\n") {
                bail!("a string is longer than it says");
            }
            bytes.truncate(length);
            Value::Bulk(bytes)
        }
        '*' => {
            let Some(length) = length()? else {
                return Ok(Value::Nil);
            };
            if depth == DEPTH_MAX {
                bail!("arrays are nested too deep");
            }
            let mut values = Vec::new();
            for _ in 0..length {
                values.push(decode(reader, depth + 1)?);
            }
            Value::Array(values)
        }
        other => bail!("a reply begins with {other:?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut bytes: &[u8]) -> Result<Value> {
        decode(&mut bytes, 0)
    }

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut bytes = Vec::new();
        encode(&[b"SET", b"k", b"\r\n"], &mut bytes);
        assert_eq!(bytes, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n\r\n\r\n");
    }

    #[test]
    fn every_kind_of_reply() {
        assert_eq!(read(b"+OK\r\n").unwrap(), Value::Simple("OK".into()));
        assert_eq!(read(b"-ERR no\r\n").unwrap(), Value::Error("ERR no".into()));
        assert_eq!(read(b":-7\r\n").unwrap(), Value::Integer(-7));
        assert_eq!(read(b"$-1\r\n").unwrap(), Value::Nil);
        assert_eq!(
            read(b"*2\r\n$2\r\na\n\r\n*0\r\n").unwrap(),
            Value::Array(vec![Value::Bulk(b"a\n".to_vec()), Value::Array(vec![])])
        );
    }

    #[test]
    fn broken_replies_are_errors() {
        let deep = b"*1\r\n".repeat(20);
        let broken: [&[u8]; 7] = [
            b"",
            b"+OK",
            b"$5\r\nab\r\n",
            b"$99999999999\r\n",
            b"*-3\r\n",
            b"?\r\n",
            &deep,
        ];
        for bytes in broken {
            assert!(read(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
