//! A connection to a guest's port, with what protocols of lines and lengths
//! need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Result, ensure};

use super::client::PATIENCE;

/// A connection.
pub struct Wire {
    reader: BufReader<TcpStream>,
}

impl Wire {
    /// Connects to a port of this host.
    ///
    /// # Errors
    /// When nobody accepts.
    pub fn connect(port: u16) -> Result<Wire> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        // Small, so that what is on its way waits in the guest.
        Ok(Wire {
            reader: BufReader::with_capacity(4096, stream),
        })
    }

    /// Sends all of it.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.reader.get_mut().write_all(bytes)?)
    }

    /// The next bytes.
    ///
    /// # Errors
    /// When the connection ends before.
    pub fn take(&mut self, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The next bytes up to and with `end`.
    ///
    /// # Errors
    /// When the connection ends before.
    pub fn until(&mut self, end: u8) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader.read_until(end, &mut bytes)?;
        ensure!(
            bytes.ends_with(&[end]),
            "the connection ended after {:?}",
            String::from_utf8_lossy(&bytes)
        );
        Ok(bytes)
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// When the connection ends before, or it is no text.
    pub fn line(&mut self) -> Result<String> {
        let line = String::from_utf8(self.until(b'\n')?)?;
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}
