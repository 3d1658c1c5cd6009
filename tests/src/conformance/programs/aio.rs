//! Linux AIO contexts (io_setup(2)).

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Result, ensure};

use crate::conformance::sys::{self, PAGE};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("aio/idle", "an AIO context with nothing to do", idle),
    Case::new(
        "aio/events",
        "AIO events that nobody has taken yet, around the end of the ring",
        events,
    ),
    Case::new(
        "aio/several",
        "three AIO contexts of several sizes",
        several,
    ),
];

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// A context and the file it reads.
struct Context {
    id: u64,
    file: File,
    buffer: Box<[u8; 512]>,
}

impl Context {
    fn new(stage: &Stage, requests: u64) -> Result<Self> {
        let path = stage.path("data");
        std::fs::write(&path, [b'x'; PAGE])?;
        let mut id = 0_u64;
        let args = [requests, &raw mut id as u64, 0, 0, 0, 0];
        // SAFETY: the id is a live local.
        unsafe { sys::call(libc::SYS_io_setup, args) }?;
        Ok(Self {
            id,
            file: File::open(path)?,
            buffer: Box::new([0; 512]),
        })
    }

    /// Reads 512 bytes; `data` comes back with the event.
    fn submit(&mut self, data: u64) -> Result<()> {
        let mut iocb = [0_u64; 8];
        iocb[0] = data;
        // Operation 0 is IOCB_CMD_PREAD; the descriptor is the upper half.
        iocb[2] = (self.file.as_raw_fd() as u64) << 32;
        iocb[3] = self.buffer.as_mut_ptr() as u64;
        iocb[4] = self.buffer.len() as u64;
        let list = [iocb.as_ptr() as u64];
        let args = [self.id, 1, list.as_ptr() as u64, 0, 0, 0];
        // SAFETY: the request, its list, and the buffer it names are live.
        let n = unsafe { sys::call(libc::SYS_io_submit, args) }?;
        ensure!(n == 1, "submitted {n}");
        Ok(())
    }

    /// Takes what has completed, at least `least`.
    fn take(&self, least: u64) -> Result<Vec<Event>> {
        let mut events = vec![Event::default(); 64];
        let at = events.as_mut_ptr() as u64;
        let args = [self.id, least, events.len() as u64, at, 0, 0];
        // SAFETY: the buffer has room for the events asked for.
        let n = unsafe { sys::call(libc::SYS_io_getevents, args) }?;
        events.truncate(n as usize);
        Ok(events)
    }

    /// A read and its event.
    fn works(&mut self, data: u64) -> Result<bool> {
        self.buffer.fill(0);
        self.submit(data)?;
        let events = self.take(1)?;
        let fine = |e: &Event| e.data == data && e.res == 512;
        Ok(events.len() == 1 && events.iter().all(fine) && self.buffer.iter().all(|&b| b == b'x'))
    }
}

fn idle(stage: &Stage) -> Result<Check> {
    let mut context = Context::new(stage, 16)?;
    ensure!(context.works(1)?);
    Ok(Box::new(move |f| {
        f.same("events", &0, &context.take(0)?.len());
        for n in 0..300 {
            f.that(format!("request {n}"), context.works(n)?);
        }
        Ok(())
    }))
}

fn events(stage: &Stage) -> Result<Check> {
    let mut context = Context::new(stage, 4)?;
    // So far that the next ones go around the end.
    for n in 0..120 {
        ensure!(context.works(n)?);
    }
    let submit = move |context: &mut Context| -> Result<()> {
        for n in 0..10 {
            context.submit(1000 + n)?;
        }
        Ok(())
    };
    submit(&mut context)?;
    Ok(Box::new(move |f| {
        let found = context.take(10)?;
        let data: Vec<u64> = found.iter().map(|e| e.data).collect();
        f.same("events", &(1000..1010).collect::<Vec<u64>>(), &data);
        f.that("results", found.iter().all(|e| e.res == 512));
        f.same("more events", &0, &context.take(0)?.len());
        f.that("another request", context.works(7)?);
        submit(&mut context)
    }))
}

fn several(stage: &Stage) -> Result<Check> {
    let mut contexts = Vec::new();
    for requests in [1, 200, 3000] {
        contexts.push(Context::new(stage, requests)?);
    }
    Ok(Box::new(move |f| {
        for (n, context) in contexts.iter_mut().enumerate() {
            f.that(format!("context {n}"), context.works(n as u64)?);
        }
        Ok(())
    }))
}
