//! One client: requests in, answers and notifications out, a packet each.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, bail};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sendmsg, sockopt};
use prost::Message;

use super::schema::{self, Req, ReqType, Resp};
use crate::criu::Error;
use crate::criu::script::Notify;

/// The largest request; those of container engines have a few KiB.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// A connected packet socket.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// The client's process.
    pub client: i32,
}

impl Connection {
    /// Finds out who is at the other end.
    pub fn new(socket: OwnedFd) -> Result<Self, Error> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials).context("RPC socket")?;
        Ok(Self {
            socket,
            client: peer.pid(),
        })
    }

    /// The next request; `None` when the client has gone.
    pub fn request(&self) -> Result<Option<Req>, Error> {
        let mut bytes = vec![0; REQUEST_BYTES_MAX];
        let n = loop {
            match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_TRUNC) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other.context("RPC request")?,
            }
        };
        if n == 0 {
            return Ok(None);
        }
        let bytes = bytes.get(..n).context("the RPC request is too long")?;
        Ok(Some(Req::decode(bytes).context("RPC request")?))
    }

    /// Sends an answer.
    pub fn answer(&self, answer: &Resp) -> Result<(), Error> {
        let bytes = answer.encode_to_vec();
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(_) => Ok(()),
            Err(e) => Err(io::Error::from(e)).context("RPC answer"),
        }
    }
}

/// Tells the client of each stage and waits for its word.
#[derive(Debug)]
pub struct Told<'a> {
    /// Whom to tell.
    pub connection: &'a Connection,
    /// Whether it wants to be told.
    pub wanted: bool,
}

impl Notify for Told<'_> {
    fn stage(&mut self, stage: &str, pid: Option<i32>) -> Result<(), Error> {
        if !self.wanted {
            return Ok(());
        }
        self.connection.answer(&Resp {
            r#type: ReqType::Notify as i32,
            success: true,
            notify: Some(schema::Notify {
                script: Some(stage.to_owned()),
                pid,
            }),
            ..Resp::default()
        })?;
        let word = self
            .connection
            .request()?
            .with_context(|| format!("the client has gone at {stage}"))?;
        if word.r#type() != ReqType::Notify {
            bail!("the client answered {:?} at {stage}", word.r#type());
        }
        if word.notify_success != Some(true) {
            bail!("the client stops at {stage}");
        }
        Ok(())
    }
}
