//! Clients that sit in a session: mail, names, shells.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::caches::Memcached;
use super::client::{Doors, PATIENCE, Talk, Trouble, same};
use super::piped::Piped;
use super::wire::Wire;

/// IMAP: one connection idles (RFC 2177), another appends messages that it must
/// hear of.
pub struct Idle {
    idle: Wire,
    other: Wire,
    have: u64,
}

fn imap(doors: &Doors) -> Result<(Wire, u64)> {
    let mut wire = Wire::connect(doors.to(143)?)?;
    let greeting = wire.line()?;
    ensure!(greeting.starts_with("* OK"), "{greeting}");
    wire.send(b"a LOGIN held held\r\n")?;
    imap_end(&mut wire, "a ")?;
    wire.send(b"b SELECT INBOX\r\n")?;
    let said = imap_end(&mut wire, "b ")?;
    let exists = said.iter().find_map(|line| line.strip_suffix(" EXISTS"));
    let have = exists.and_then(|line| line.strip_prefix("* ")?.parse().ok());
    Ok((wire, have.context("the number of messages")?))
}

/// The lines up to the one that ends a command, which must be an OK.
fn imap_end(wire: &mut Wire, tag: &str) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let line = wire.line()?;
        if let Some(end) = line.strip_prefix(tag) {
            ensure!(end.starts_with("OK"), "{line}");
            return Ok(lines);
        }
        lines.push(line);
    }
}

impl Idle {
    /// Logs in twice and idles.
    ///
    /// # Errors
    /// When the server does not let us in.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let (mut idle, have) = imap(doors)?;
        let (other, _) = imap(doors)?;
        idle.send(b"i IDLE\r\n")?;
        let line = idle.line()?;
        ensure!(line.starts_with("+ "), "{line}");
        Ok(Box::new(Idle { idle, other, have }))
    }
}

impl Talk for Idle {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let text = format!("Subject: held {number}\r\n\r\nmessage {number}\r\n");
        self.other
            .send(format!("c APPEND INBOX {{{}}}\r\n", text.len()).as_bytes())?;
        loop {
            let line = self.other.line()?;
            if line.starts_with("+ ") {
                break;
            }
            if !line.starts_with("* ") {
                return Err(anyhow::anyhow!("{line}").into());
            }
        }
        self.other.send(format!("{text}\r\n").as_bytes())?;
        imap_end(&mut self.other, "c ")?;
        self.have += 1;
        let expected = format!("* {} EXISTS", self.have);
        loop {
            let line = self.idle.line()?;
            // The server may say that it is still there, and what is new.
            if line.starts_with("* OK") || line.ends_with(" RECENT") {
                continue;
            }
            return same(line.as_bytes(), expected.as_bytes());
        }
    }
}

/// DNS over one TCP connection (RFC 7766): the same name, another id each time.
pub struct Dns(Wire);

/// What `held.example.` is in the server's own data.
const ADDRESS: [u8; 4] = [127, 1, 2, 3];

impl Dns {
    /// Connects.
    ///
    /// # Errors
    /// When nobody accepts.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        Ok(Box::new(Dns(Wire::connect(doors.to(53)?)?)))
    }
}

impl Talk for Dns {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        let id = (number as u16).to_be_bytes();
        let question = b"\x04held\x07example\0\0\x01\0\x01";
        let mut query = id.to_vec();
        query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        query.extend(question);
        let mut message = (query.len() as u16).to_be_bytes().to_vec();
        message.extend(&query);
        self.0.send(&message)?;
        let length = self.0.take(2)?;
        let answer = self
            .0
            .take(usize::from(u16::from_be_bytes([length[0], length[1]])))?;
        let checked = same(answer.get(..2).unwrap_or_default(), &id)?;
        let asked = answer.get(12..12 + question.len()).unwrap_or_default();
        // The address ends the only record.
        let last = answer.get(answer.len().saturating_sub(4)..);
        Ok(checked + same(asked, question)? + same(last.unwrap_or_default(), &ADDRESS)?)
    }
}

/// Where the key lies that the guest's account knows.
pub fn ssh_key() -> PathBuf {
    std::env::temp_dir().join(format!("rcr-services-{}.key", std::process::id()))
}

fn ssh(doors: &Doors) -> Result<Command> {
    let port = doors.to(22)?.to_string();
    let mut command = Command::new("ssh");
    command
        .args(["-F", "none", "-o", "StrictHostKeyChecking=no"])
        .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"])
        .args(["-o", "IdentitiesOnly=yes", "-p", &port, "-i"])
        .arg(ssh_key());
    Ok(command)
}

/// A shell on a terminal, by the real client.
pub struct Shell(Piped);

impl Shell {
    /// Logs in.
    ///
    /// # Errors
    /// When the client does not start or there is no shell.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let mut shell = Piped::start(ssh(doors)?.args(["-tt", "held@127.0.0.1", "exec", "sh"]))?;
        shell.say("PS1=; stty -echo; held=0; echo be\"gun\"")?;
        // What was typed ends with a quotation mark.
        while !shell.hear()?.trim_end().ends_with("begun") {}
        Ok(Box::new(Shell(shell)))
    }
}

impl Talk for Shell {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        self.0.say(&format!(
            "held=$((held + {number})); echo \"sum $held tty $(tty)\""
        ))?;
        let expected = format!("sum {} tty /dev/pts/", number * (number + 1) / 2);
        let line = self.0.hear()?;
        same(
            line.get(..expected.len()).unwrap_or(&line).as_bytes(),
            expected.as_bytes(),
        )
    }
}

/// A port forward of the real client, to a memcached of the guest.
pub struct Forward {
    ssh: Child,
    through: Box<dyn Talk>,
}

impl Forward {
    /// Logs in and connects through.
    ///
    /// # Errors
    /// When the client does not start or nothing answers at its port.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let ssh = ssh(doors)?
            .args(["-N", "-L", &format!("127.0.0.1:{port}:127.0.0.1:11211")])
            .arg("held@127.0.0.1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let start = std::time::Instant::now();
        let through = loop {
            match Memcached::at(port, 22) {
                Ok(through) => break through,
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(200)),
            }
        };
        Ok(Box::new(Forward { ssh, through }))
    }
}

impl Talk for Forward {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        self.through.turn(number)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
    }
}
