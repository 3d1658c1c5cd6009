//! Memory over the network: CRIU's page server and those who talk to it.
//!
//! ```text
//! dump, pre-dump --page-server ─ OPEN2, ADD_F + pages, CLOSE ─► page-server ─► pagemap, pages images
//! lazy-pages --page-server     ─ GET ─► dump --lazy-pages    ─► ADD_F + pages
//! ```
//! Each message is a [`Head`], as CRIU since 4.1 has it; pages follow one that
//! says that there are any.

mod sender;
mod serve;
mod source;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, bail};

pub use sender::Sender;
pub use serve::{run, serve_in_child};
pub use source::{Asker, give_pages};

use super::Error;
use super::options::Options;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a message without its pages.
const HEAD_BYTES: usize = 32;

/// What is asked for or told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Pages, as the flags say.
    Add,
    /// Pages that are in the images before these: the older spelling.
    Hole,
    /// What follows is of another process or object.
    Open,
    /// The same, and whether there are images before these is answered: a byte.
    OpenAnswered,
    /// Whether there are images before these: a number is answered.
    Parent,
    /// Pages are wanted.
    Get,
    /// That was all: a number is answered.
    Close,
}

/// The numbers that they have; the first is the one we write.
const NUMBERS: [(u32, What); 9] = [
    (6, What::Add),
    (1, What::Add),
    (2, What::Hole),
    (3, What::Open),
    (4, What::OpenAnswered),
    (5, What::Parent),
    (7, What::Get),
    (0x1023, What::Close),
    (0x1024, What::Close),
];
/// The only message with pages that has no flags.
const PLAIN_ADD: u32 = 1;
/// Flags of pages are above the number.
const FLAGS_SHIFT: u32 = 16;

/// Flags of pages: they are in the images before, may come later, follow.
pub const IN_PARENT: u32 = 1;
pub const LAZY: u32 = 2;
pub const PRESENT: u32 = 4;

/// Whose pages they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A process, by its id in the images.
    Process(u64),
    /// A shared memory object.
    Object(u64),
}

impl Owner {
    /// The name of the image with the list of its pages.
    pub fn pagemap(self) -> String {
        match self {
            Self::Process(id) => format!("pagemap-{id}.img"),
            Self::Object(id) => format!("pagemap-shmem-{id}.img"),
        }
    }

    /// Whose list that image is.
    pub fn of_pagemap(name: &str) -> Option<Self> {
        let name = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
        match name.strip_prefix("shmem-") {
            Some(id) => id.parse().ok().map(Self::Object),
            None => name.parse().ok().map(Self::Process),
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::Process(id) => id << 8 | 1,
            Self::Object(id) => id << 8 | 2,
        }
    }

    fn from_number(number: u64) -> Result<Self, Error> {
        match number & 0xff {
            1 => Ok(Self::Process(number >> 8)),
            2 => Ok(Self::Object(number >> 8)),
            kind => bail!("pages of an unknown kind {kind}"),
        }
    }
}

/// A message without its pages: number and flags, then number of pages,
/// address, and owner, 64 bits each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub what: What,
    pub flags: u32,
    pub pages: u64,
    pub address: u64,
    /// As [`Owner`] numbers it; closing needs none.
    owner: u64,
}

impl Head {
    /// One without pages.
    pub fn new(what: What, owner: Option<Owner>) -> Self {
        let owner = owner.map_or(0, Owner::number);
        Self {
            what,
            flags: 0,
            pages: 0,
            address: 0,
            owner,
        }
    }

    /// So many pages from an address on.
    pub fn pages(self, address: u64, pages: u64, flags: u32) -> Self {
        Self {
            flags,
            pages,
            address,
            ..self
        }
    }

    /// Whose pages.
    pub fn owner(&self) -> Result<Owner, Error> {
        Owner::from_number(self.owner)
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> Result<u64, Error> {
        let bytes = self.pages.checked_mul(PAGE);
        let bytes = bytes.filter(|b| {
            self.address.is_multiple_of(PAGE) && self.address.checked_add(*b).is_some()
        });
        bytes.with_context(|| format!("{} pages at {:#x}", self.pages, self.address))
    }

    /// Sends it.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let number = NUMBERS
            .iter()
            .find(|(_, w)| *w == self.what)
            .map_or(0, |(n, _)| *n);
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&(number | self.flags << FLAGS_SHIFT).to_le_bytes());
        for (at, value) in [(8, self.pages), (16, self.address), (24, self.owner)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        to.write_all(&bytes)
    }

    /// Receives one; `None` when the other side has ended.
    pub fn receive(from: &mut impl Read) -> Result<Option<Self>, Error> {
        let mut bytes = [0; HEAD_BYTES];
        let mut have = 0;
        while have < HEAD_BYTES {
            match from.read(&mut bytes[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => bail!("a message ends too early"),
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("the other side of the page server"),
            }
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let first = u32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"));
        let number = first & ((1 << FLAGS_SHIFT) - 1);
        let what = NUMBERS.iter().find(|(n, _)| *n == number);
        let (_, what) = *what.with_context(|| format!("an unknown message {number:#x}"))?;
        let flags = match number {
            PLAIN_ADD => PRESENT,
            _ => first >> FLAGS_SHIFT,
        };
        let (pages, address, owner) = (word(8), word(16), word(24));
        Ok(Some(Self {
            what,
            flags,
            pages,
            address,
            owner,
        }))
    }
}

/// The host of `--address`; `anyone` if it is not given.
fn host(options: &Options, otherwise: &str) -> String {
    let given = options.address.as_ref();
    given.map_or(otherwise.to_owned(), |a| a.display().to_string())
}

/// A socket that was given by number.
fn given_socket(options: &Options) -> Result<Option<TcpStream>, Error> {
    let Some(number) = options.page_socket else {
        return Ok(None);
    };
    if !std::path::Path::new(&format!("/proc/self/fd/{number}")).exists() {
        bail!("option --ps-socket: {number} is not open");
    }
    // SAFETY: the number was given to us to use and close, it is open, and
    // nothing else here knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    Ok(Some(socket.into()))
}

/// Connects to the page server of the options.
pub fn connect(options: &Options) -> Result<TcpStream, Error> {
    if let Some(socket) = given_socket(options)? {
        return Ok(socket);
    }
    let port = options
        .port
        .context("option --page-server: --port is missing")?;
    let host = host(options, "127.0.0.1");
    let stream = TcpStream::connect((host.as_str(), port))
        .with_context(|| format!("the page server at {host} port {port}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens as the options say; without a port on any.
pub fn listen(options: &Options) -> Result<TcpListener, Error> {
    let (host, port) = (host(options, "0.0.0.0"), options.port.unwrap_or(0));
    let listener = TcpListener::bind((host.as_str(), port))
        .with_context(|| format!("listening at {host} port {port}"))?;
    tracing::info!("page server listens at {}", listener.local_addr()?);
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_what_criu_sends() {
        let owner = Owner::Process(0x1234);
        let head = Head::new(What::Add, Some(owner)).pages(0x7000, 3, PRESENT | LAZY);
        let mut bytes = Vec::new();
        head.send(&mut bytes).unwrap();
        let mut want = vec![6, 0, 6, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        want.extend([0, 0x70, 0, 0, 0, 0, 0, 0, 1, 0x34, 0x12, 0, 0, 0, 0, 0]);
        assert_eq!(bytes, want);
        let back = Head::receive(&mut bytes.as_slice()).unwrap().unwrap();
        assert_eq!((back, back.owner().unwrap()), (head, owner));
        assert_eq!(back.bytes().unwrap(), 3 * PAGE);
        assert_eq!(Head::receive(&mut [].as_slice()).unwrap(), None);
        assert!(Head::receive(&mut &bytes[..9]).is_err());
        bytes[0] = 0x77;
        assert!(Head::receive(&mut bytes.as_slice()).is_err());
        let plain = [&[1, 0, 0, 0], &want[4..]].concat();
        let plain = Head::receive(&mut plain.as_slice()).unwrap().unwrap();
        assert_eq!((plain.what, plain.flags), (What::Add, PRESENT));
        assert!(head.pages(0x7001, 1, 0).bytes().is_err());
        assert!(head.pages(0x7000, u64::MAX, 0).bytes().is_err());
    }

    #[test]
    fn images_have_owners() {
        for name in ["pagemap-7.img", "pagemap-shmem-12.img"] {
            assert_eq!(Owner::of_pagemap(name).unwrap().pagemap(), name);
        }
        for name in ["pages-7.img", "pagemap-x.img", "pagemap-7"] {
            assert_eq!(Owner::of_pagemap(name), None);
        }
        assert!(Owner::from_number(7 << 8 | 3).is_err());
    }
}
