//! Linux AIO contexts (io_setup(2)): a ring of events in the address space,
//! whose address is the context's id.
//!
//! Only requests that have completed come along: the kernel has no way to tell
//! which are still under way, and those of files end soon after the freeze.
//! The new ring begins at its first slot; who uses it reads its head and tail
//! from it anyway. Where completed events wait, as many requests to
//! `/dev/null` are made, which moves the kernel's own idea of the tail.

use super::MemoryError;
use super::pagemap::PAGE;
use super::pages::Piece;
use super::vma::status;
use crate::image::schema::{AioRingEntry, VmaEntry};
use crate::remote::{Arena, Program, Tracee};
use crate::sys::process::{Span, read_memory, write_parts};

/// `struct aio_ring` before its events.
const HEAD_BYTES: usize = 32;
const EVENT_BYTES: usize = 32;
const IOCB_BYTES: usize = 64;
/// Events waiting that are made again with one call.
const BATCH: usize = 4096;

/// How a ring's name begins in `maps`.
pub const NAME: &[u8] = b"/[aio]";

/// How many requests io_setup(2) has to be asked for to make a ring of that
/// length: it doubles the number, adds two, and fills pages.
fn requests(len: u64) -> u64 {
    let slots = (len / PAGE * PAGE - HEAD_BYTES as u64) / EVENT_BYTES as u64;
    (slots - 2) / 2
}

/// The schema's records of the rings among `vmas`.
pub fn save(vmas: &[VmaEntry]) -> Vec<AioRingEntry> {
    let ring = |e: &VmaEntry| AioRingEntry {
        id: e.start,
        nr_req: requests(e.end - e.start) as u32,
        ring_len: (e.end - e.start) as u32,
    };
    rings(vmas).map(ring).collect()
}

/// The rings among `vmas`.
pub fn rings(vmas: &[VmaEntry]) -> impl Iterator<Item = &VmaEntry> {
    vmas.iter().filter(|e| e.status & status::AIO_RING != 0)
}

/// The events that wait in a ring, in their order.
pub(crate) fn waiting(ring: &[u8]) -> Option<Vec<u8>> {
    let word = |n: usize| {
        let bytes = ring.get(n * 4..n * 4 + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let (slots, head, tail) = (word(1)?, word(2)?, word(3)?);
    let fits = ring.len() >= HEAD_BYTES + slots.checked_mul(EVENT_BYTES)?;
    if slots == 0 || !fits || head >= slots || tail >= slots {
        return None;
    }
    let count = (tail + slots - head) % slots;
    let event = |n: usize| &ring[HEAD_BYTES + n * EVENT_BYTES..][..EVENT_BYTES];
    let events = (0..count).map(|n| event((head + n) % slots));
    Some(events.collect::<Vec<_>>().concat())
}

/// Makes a ring in a process where something holds its place.
pub fn restore(
    tracee: Tracee,
    arena: Arena,
    e: &VmaEntry,
    content: &[Piece<'_>],
) -> Result<(), MemoryError> {
    let len = e.end - e.start;
    let torn = |what: &str| MemoryError::Aio {
        at: e.start,
        what: what.into(),
    };
    let bytes: Vec<u8> = content.iter().flat_map(|p| p.bytes).copied().collect();
    let events = waiting(&bytes).ok_or_else(|| torn("its image is torn"))?;
    let mut p = Program::new();
    let id = p.zeroed(8);
    let args = [requests(len).into(), id.into()];
    p.call(libc::SYS_io_setup, "make an AIO context", &args);
    let out = tracee.run(arena, &p)?;
    let made = u64::from_le_bytes(out.data(id).try_into().expect("8 bytes"));

    let mut head = [0; HEAD_BYTES];
    let span = Span {
        start: made,
        len: HEAD_BYTES,
    };
    read_memory(tracee.tid, &[span], &mut head)?;
    let slots = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes"));
    if HEAD_BYTES as u64 + u64::from(slots) * EVENT_BYTES as u64 > len {
        return Err(torn("this kernel makes larger ones"));
    }
    let mut p = Program::new();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let args = [
        made.into(),
        len.into(),
        len.into(),
        flags.into(),
        e.start.into(),
    ];
    p.call(libc::SYS_mremap, "move the AIO ring", &args);
    let count = events.len() / EVENT_BYTES;
    if count > 0 {
        submit(&mut p, e.start, count);
    }
    tracee.run(arena, &p)?;
    if count > 0 {
        write_parts(tracee.tid, &[(e.start + HEAD_BYTES as u64, &events)])?;
    }
    Ok(())
}

/// Adds calls that make `count` requests which are complete at once.
fn submit(p: &mut Program, context: u64, count: usize) {
    const PREAD: u16 = 0;
    const NULL_FD: i32 = 901;
    let path = p.cstr(b"/dev/null");
    let args = [
        libc::AT_FDCWD.into(),
        path.into(),
        libc::O_RDONLY.into(),
        0.into(),
    ];
    let fd = p.call(libc::SYS_openat, "open /dev/null", &args);
    // The number has to stand in the request, so it is a chosen one.
    let args = [fd.into(), NULL_FD.into(), 0.into()];
    p.call(libc::SYS_dup3, "place /dev/null", &args);
    let mut iocb = [0; IOCB_BYTES];
    iocb[16..18].copy_from_slice(&PREAD.to_le_bytes());
    iocb[20..24].copy_from_slice(&NULL_FD.to_le_bytes());
    let iocb = p.bytes(&iocb);
    let batch = count.min(BATCH);
    let list = p.zeroed(batch * 8);
    for n in 0..batch {
        p.point(list, n * 8, iocb);
    }
    let mut left = count;
    while left > 0 {
        let now = left.min(batch);
        let args = [context.into(), (now as u64).into(), list.into()];
        p.call(libc::SYS_io_submit, "fill the AIO ring", &args);
        left -= now;
    }
    p.call(libc::SYS_close, "close /dev/null", &[NULL_FD.into()]);
    p.call(libc::SYS_close, "close /dev/null", &[fd.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(slots: u32, head: u32, tail: u32) -> Vec<u8> {
        let mut r = [0, slots, head, tail, 0xa10a_10a1, 1, 0, 32]
            .map(u32::to_le_bytes)
            .concat();
        for n in 0..slots {
            r.extend([n as u8; EVENT_BYTES]);
        }
        r
    }

    #[test]
    fn events_come_in_their_order() {
        let found = waiting(&ring(5, 3, 1)).unwrap();
        let first: Vec<u8> = found.chunks(EVENT_BYTES).map(|e| e[0]).collect();
        assert_eq!(first, [3, 4, 0]);
        assert_eq!(waiting(&ring(5, 2, 2)), Some(vec![]));
    }

    #[test]
    fn torn_rings_are_none() {
        assert_eq!(waiting(&ring(5, 9, 1)), None);
        assert_eq!(waiting(&ring(0, 0, 0)), None);
        assert_eq!(waiting(&ring(5, 1, 2)[..40]), None);
    }
}
