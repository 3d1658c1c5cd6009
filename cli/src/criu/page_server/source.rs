//! Pages that stay with a dumped process until the other machine wants them:
//! `dump --lazy-pages` on one side, `lazy-pages --page-server` on the other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail, ensure};
use rcr_engine::restore::PageOrigin;

use super::{Head, Owner, PAGE, PRESENT, What, connect};
use crate::criu::Error;
use crate::criu::options::Options;

/// The most that is sent at once, bytes.
const ANSWER_MAX: u64 = 1 << 20;

/// Gives the pages of stopped processes to whoever connects, until that has
/// all. `pids`: the processes by their ids in the images.
pub fn give_pages(listener: &TcpListener, pids: &BTreeMap<i32, i32>) -> Result<(), Error> {
    let (mut stream, peer) = listener.accept().context("waiting for lazy-pages")?;
    tracing::info!("{peer} asks for pages");
    stream.set_nodelay(true)?;
    let mut open: BTreeMap<u64, File> = BTreeMap::new();
    let mut bytes = Vec::new();
    loop {
        let Some(head) = Head::receive(&mut stream)? else {
            bail!("whoever asked for pages has gone before it had all");
        };
        match head.what {
            What::Get => {
                let Owner::Process(id) = head.owner()? else {
                    bail!("pages of an object are asked for");
                };
                let memory = match open.entry(id) {
                    std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
                    std::collections::btree_map::Entry::Vacant(e) => {
                        let pid = i32::try_from(id).ok().and_then(|id| pids.get(&id));
                        let pid = pid.with_context(|| format!("there is no process {id}"))?;
                        e.insert(File::open(format!("/proc/{pid}/mem"))?)
                    }
                };
                let len = head.bytes()?.min(ANSWER_MAX);
                bytes.resize(len as usize, 0);
                let told = || format!("pages of process {id} at {:#x}", head.address);
                memory
                    .read_exact_at(&mut bytes, head.address)
                    .with_context(told)?;
                let answer = Head::new(What::Add, Some(head.owner()?));
                let answer = answer.pages(head.address, len / PAGE, PRESENT);
                answer.send(&mut stream)?;
                stream.write_all(&bytes)?;
            }
            What::Close => {
                stream.write_all(&0i32.to_le_bytes())?;
                return Ok(());
            }
            other => bail!("a message {other:?} while pages are given"),
        }
    }
}

/// The other side: it asks for them.
#[derive(Debug)]
pub struct Asker(TcpStream);

impl Asker {
    /// Connects as the options say.
    pub fn new(options: &Options) -> Result<Self, Error> {
        Ok(Self(connect(options)?))
    }

    /// Says that nothing more is wanted: what was dumped can end.
    pub fn close(mut self) -> Result<(), Error> {
        Head::new(What::Close, None).send(&mut self.0)?;
        let mut status = [0; 4];
        self.0
            .read_exact(&mut status)
            .context("the answer of the dump")?;
        ensure!(status == [0; 4], "the dump failed");
        Ok(())
    }

    fn ask(&mut self, id: i32, at: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        let owner = Owner::Process(u64::try_from(id)?);
        let want = Head::new(What::Get, Some(owner)).pages(at, bytes.div_ceil(PAGE), 0);
        want.send(&mut self.0)?;
        let got = Head::receive(&mut self.0)?.context("the dump has gone")?;
        let same = got.what == What::Add && got.address == at && got.owner()? == owner;
        let fits = (1..=want.pages).contains(&got.pages) && got.flags & PRESENT != 0;
        ensure!(same && fits, "other pages came than were asked for");
        let mut content = vec![0; got.bytes()? as usize];
        self.0.read_exact(&mut content).context("pages")?;
        Ok(content)
    }
}

impl PageOrigin for Asker {
    fn fetch(&mut self, id: i32, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        self.ask(id, at, bytes)
            .map_err(|e| io::Error::other(format!("{e:#}")))
    }
}
