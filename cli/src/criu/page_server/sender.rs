//! A dump whose pages go to a page server.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, ensure};
use rcr_engine::image::schema::{PagemapEntry, PagemapHead};
use rcr_engine::image::{ImageReader, ImageSink, Kind, Scratch, names};

use super::{Head, Owner, PAGE, PRESENT, What};
use crate::criu::Error;

/// Keeps pages and their lists until the end, and gives all else to another.
///
/// They are sent at the end, when nothing can fail any more: a server never
/// has the pages of a dump that was refused.
pub struct Sender<'a> {
    stream: TcpStream,
    rest: &'a mut dyn ImageSink,
    lists: Vec<(String, Vec<u8>)>,
    pages: Vec<(String, Scratch)>,
    /// The lists go to both.
    keep_lists: bool,
}

impl<'a> Sender<'a> {
    /// Over a connection to a server. `keep_lists`: what comes after refers to
    /// these images.
    pub fn new(stream: TcpStream, rest: &'a mut dyn ImageSink, keep_lists: bool) -> Self {
        Self {
            stream,
            rest,
            lists: Vec::new(),
            pages: Vec::new(),
            keep_lists,
        }
    }

    /// Sends all, and waits until the server has it.
    pub fn finish(mut self) -> Result<(), Error> {
        for (name, list) in std::mem::take(&mut self.lists) {
            self.send(&name, &list).context(name)?;
        }
        Head::new(What::Close, None).send(&mut self.stream)?;
        let mut status = [0; 4];
        self.stream
            .read_exact(&mut status)
            .context("the page server's answer")?;
        ensure!(status == [0; 4], "the page server failed");
        Ok(())
    }

    fn send(&mut self, name: &str, list: &[u8]) -> Result<(), Error> {
        let owner = Owner::of_pagemap(name).context("it is nobody's")?;
        let mut reader = ImageReader::new(name, Kind::Pagemap, list)?;
        let head: PagemapHead = reader.record()?.context("no head")?;
        let pages = names::pages(head.pages_id);
        let pages = self.pages.iter().find(|(n, _)| *n == pages);
        let mut rest = pages.map_or(&[][..], |(_, s)| s.bytes());
        let to = Head::new(What::OpenAnswered, Some(owner));
        to.send(&mut self.stream)?;
        let mut before = [0];
        self.stream
            .read_exact(&mut before)
            .context("the page server's answer")?;
        while let Some(e) = reader.record::<PagemapEntry>()? {
            let (flags, pages) = (e.flags.unwrap_or(PRESENT), e.nr_pages.unwrap_or(0));
            let to = Head {
                what: What::Add,
                ..to
            }
            .pages(e.vaddr, pages, flags);
            to.send(&mut self.stream)?;
            if flags & PRESENT != 0 {
                let here = rest.split_at_checked((pages * PAGE) as usize);
                let (here, behind) = here.context("it lists more than there is")?;
                self.stream.write_all(here)?;
                rest = behind;
            }
        }
        Ok(())
    }
}

impl ImageSink for Sender<'_> {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let list = Owner::of_pagemap(name).is_some();
        if list {
            self.lists.push((name.to_owned(), bytes.to_vec()));
        }
        match list && !self.keep_lists {
            true => Ok(()),
            false => self.rest.put(name, bytes),
        }
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        if !(name.starts_with("pages-") && name.ends_with(".img")) {
            return self.rest.reserve(name, len);
        }
        self.pages.push((name.to_owned(), Scratch::new(len)?));
        Ok(self.pages.last_mut().expect("just pushed").1.bytes_mut())
    }
}
