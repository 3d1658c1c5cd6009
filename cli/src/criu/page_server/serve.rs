//! `criu page-server`: pages that a dump elsewhere sends become images here.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use nix::unistd::{ForkResult, fork};
use rcr_engine::image::schema::{PagemapEntry, PagemapHead};
use rcr_engine::image::{DirSource, ImageWriter, Kind, names};
use rcr_engine::predump;

use super::{Head, IN_PARENT, LAZY, Owner, PRESENT, What, given_socket, listen};
use crate::criu::options::Options;
use crate::criu::places::Places;
use crate::criu::{Error, daemon};

/// Flags that pages may have.
const KNOWN: u32 = IN_PARENT | LAZY | PRESENT;

/// Serves one dump.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    let places = Places::open(options)?;
    refer(options, &places)?;
    let given = given_socket(options)?;
    let listener = match &given {
        None => Some(listen(options)?),
        Some(_) => None,
    };
    if !daemon::stand(options, &places)? {
        return Ok(ExitCode::SUCCESS);
    }
    let done = (|| {
        let stream = match (given, &listener) {
            (Some(stream), _) => stream,
            (None, Some(listener)) => listener.accept().context("waiting for a dump")?.0,
            (None, None) => bail!("nobody can connect"),
        };
        serve(stream, options, &places)
    })();
    if let Err(e) = &done {
        tracing::error!("{e:#}");
    }
    Ok(done.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}

/// Serves one dump in a child; gives that and the port.
pub fn serve_in_child(options: &Options, places: &Places) -> Result<(i32, u16), Error> {
    refer(options, places)?;
    let listener = listen(options)?;
    let port = listener.local_addr()?.port();
    // SAFETY: this process has a single thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok((child.as_raw(), port)),
        ForkResult::Child => {
            let stream = listener.accept().context("waiting for a dump");
            let done = stream.and_then(|(stream, _)| serve(stream, options, places));
            if let Err(e) = &done {
                tracing::error!("{e:#}");
            }
            std::process::exit(done.is_err().into())
        }
    }
}

/// Names the images before those that come.
fn refer(options: &Options, places: &Places) -> Result<(), Error> {
    let Some(before) = options.values("prev-images-dir").last() else {
        return Ok(());
    };
    let told = || format!("option --prev-images-dir {before}");
    ensure!(
        places.images.join(&before).is_dir(),
        "{}: no directory",
        told()
    );
    let link = places.images.join(DirSource::PARENT);
    match std::fs::remove_file(&link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(told),
        _ => {}
    }
    symlink(&before, link).with_context(told)
}

/// Writes what comes; after a failure there is no list of pages for what was
/// not whole.
fn serve(mut stream: TcpStream, options: &Options, places: &Places) -> Result<(), Error> {
    stream.set_nodelay(true)?;
    let mut images = Images {
        dir: &places.images,
        next: 1,
        open: None,
    };
    loop {
        let Some(head) = Head::receive(&mut stream)? else {
            bail!("the dump has gone before its end");
        };
        match head.what {
            What::Open => images.open(head.owner()?)?,
            What::OpenAnswered => {
                images.open(head.owner()?)?;
                let before = images.has_parent(head.owner()?);
                stream.write_all(&[before.into()])?;
            }
            What::Parent => {
                let before = i32::from(images.has_parent(head.owner()?));
                stream.write_all(&before.to_le_bytes())?;
            }
            What::Hole => images.add(
                &Head {
                    flags: IN_PARENT,
                    ..head
                },
                &mut stream,
            )?,
            What::Add => images.add(&head, &mut stream)?,
            What::Get => bail!("pages are asked for, and nobody has any"),
            What::Close => {
                images.close()?;
                if options.has("auto-dedup") {
                    predump::dedup(&places.images)?;
                }
                stream.write_all(&0i32.to_le_bytes())?;
                return Ok(());
            }
        }
    }
}

/// The images that are being written.
struct Images<'a> {
    dir: &'a Path,
    next: u32,
    open: Option<Open>,
}

struct Open {
    owner: Owner,
    list: ImageWriter,
    pages: File,
    /// The first address that may come.
    from: u64,
}

impl Images<'_> {
    fn create(&self, name: &str) -> Result<File, Error> {
        let path = self.dir.join(name);
        let mut how = OpenOptions::new();
        how.write(true).create(true).truncate(true).mode(0o600);
        how.open(&path).with_context(|| path.display().to_string())
    }

    fn has_parent(&self, owner: Owner) -> bool {
        self.dir
            .join(DirSource::PARENT)
            .join(owner.pagemap())
            .exists()
    }

    fn open(&mut self, owner: Owner) -> Result<(), Error> {
        self.close()?;
        let pages_id = self.next;
        self.next += 1;
        let mut list = ImageWriter::new(Kind::Pagemap);
        list.record(&PagemapHead { pages_id });
        let pages = self.create(&names::pages(pages_id))?;
        self.open = Some(Open {
            owner,
            list,
            pages,
            from: 0,
        });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Error> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let name = open.owner.pagemap();
        self.create(&name)?
            .write_all(&open.list.finish())
            .context(name)
    }

    fn add(&mut self, head: &Head, stream: &mut TcpStream) -> Result<(), Error> {
        let elsewhere = head.flags & IN_PARENT != 0 && !self.has_parent(head.owner()?);
        ensure!(!elsewhere, "pages of images that are not here");
        let open = self
            .open
            .as_mut()
            .filter(|o| Some(o.owner) == head.owner().ok());
        let open = open.context("pages of nobody who was opened")?;
        let bytes = head.bytes()?;
        ensure!(
            head.flags & !KNOWN == 0,
            "pages with unknown flags {:#x}",
            head.flags
        );
        ensure!(
            open.from <= head.address,
            "pages at {:#x} come late",
            head.address
        );
        open.from = head.address + bytes;
        open.list.record(&PagemapEntry {
            vaddr: head.address,
            compat_nr_pages: 0,
            flags: Some(head.flags),
            nr_pages: Some(head.pages),
            ..PagemapEntry::default()
        });
        if head.flags & PRESENT != 0 {
            let n = io::copy(&mut stream.take(bytes), &mut open.pages).context("pages")?;
            ensure!(n == bytes, "pages end too early");
        }
        Ok(())
    }
}
