//! What the harness and the in-guest agent say to each other: one JSON object
//! a line over a virtio-serial port.
//!
//! The port outlives the guest kernel while both ends may lose a line halfway
//! (the agent when the kernel is replaced under it, the harness when it is
//! interrupted). So every line carries an id, a side drops what it cannot
//! parse or did not ask for, and the harness starts each request with an empty
//! line that ends whatever was cut off before it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A message with the id that pairs a reply with its request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line<T> {
    /// Chosen at random by the harness.
    pub id: u64,
    /// The request or reply itself.
    pub body: T,
}

/// What the harness may ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Says which boot is answering.
    Ping,
    /// Runs a program as root with `/` as its working directory.
    Exec {
        /// Program (looked up in PATH) and arguments.
        argv: Vec<String>,
        /// Given on standard input, then end of file.
        #[serde(default)]
        stdin: Bytes,
        /// The program's process group is killed after this many milliseconds.
        timeout_ms: u64,
    },
    /// Reads a whole file.
    ReadFile {
        /// Absolute path in the guest.
        path: String,
    },
    /// Creates or replaces a file.
    WriteFile {
        /// Absolute path in the guest.
        path: String,
        /// New content.
        data: Bytes,
        /// Permission bits.
        mode: u32,
    },
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Answer to [`Request::Ping`].
    Pong {
        /// `/proc/sys/kernel/random/boot_id`.
        boot_id: String,
        /// `uname -r`.
        kernel: String,
    },
    /// Answer to [`Request::Exec`].
    Exited(Exit),
    /// Answer to [`Request::ReadFile`].
    File {
        /// The file's content.
        data: Bytes,
    },
    /// Answer to [`Request::WriteFile`].
    Written,
    /// The request could not be carried out.
    Failed {
        /// Why, for people.
        message: String,
    },
}

/// How a program ended and what it printed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, unless a signal ended the program.
    pub code: Option<i32>,
    /// The signal that ended the program.
    pub signal: Option<i32>,
    /// Whether the agent killed it because its time was up.
    pub timed_out: bool,
    /// Everything written to standard output.
    pub stdout: Bytes,
    /// Everything written to standard error.
    pub stderr: Bytes,
}

/// Bytes that travel as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD
            .decode(text)
            .map(Bytes)
            .map_err(serde::de::Error::custom)
    }
}

impl Exit {
    /// Whether the program exited with code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// Standard output as text, without white space at the ends.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout.0).trim().to_owned()
    }

    /// Standard error as text, without white space at the ends.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr.0).trim().to_owned()
    }

    /// How it ended, in words.
    pub fn how(&self) -> String {
        match (self.timed_out, self.code, self.signal) {
            (true, ..) => "was killed: its time was up".to_owned(),
            (_, Some(code), _) => format!("exited with {code}"),
            (_, _, Some(signal)) => format!("was killed by signal {signal}"),
            _ => "ended in an unknown way".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_and_comes_back_the_same() {
        let line = Line {
            id: u64::MAX,
            body: Request::Exec {
                argv: vec!["echo".into(), "a\nb".into()],
                stdin: Bytes(vec![0, 255, 10]),
                timeout_ms: 5,
            },
        };
        let text = serde_json::to_string(&line).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(serde_json::from_str::<Line<Request>>(&text).unwrap(), line);
    }

    #[test]
    fn a_reply_comes_back_the_same() {
        let exit = Exit {
            code: Some(3),
            stdout: Bytes(b"hi".to_vec()),
            ..Exit::default()
        };
        let line = Line {
            id: 7,
            body: Reply::Exited(exit),
        };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(serde_json::from_str::<Line<Reply>>(&text).unwrap(), line);
    }
}
