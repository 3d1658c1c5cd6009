//! What `rcr-files.img` says of a ring.

use crate::file::sys::{RingMemory, RingParameters};

pub(super) const IOPOLL: u32 = 1 << 0;
pub(super) const SQPOLL: u32 = 1 << 1;
pub(super) const CQSIZE: u32 = 1 << 3;
pub(super) const CLAMP: u32 = 1 << 4;
pub(super) const ATTACH_WQ: u32 = 1 << 5;
pub(super) const R_DISABLED: u32 = 1 << 6;
pub(super) const SUBMIT_ALL: u32 = 1 << 7;
pub(super) const COOP_TASKRUN: u32 = 1 << 8;
pub(super) const TASKRUN_FLAG: u32 = 1 << 9;
pub(super) const SQE128: u32 = 1 << 10;
pub(super) const CQE32: u32 = 1 << 11;
pub(super) const SINGLE_ISSUER: u32 = 1 << 12;
pub(super) const DEFER_TASKRUN: u32 = 1 << 13;
pub(super) const NO_MMAP: u32 = 1 << 14;
pub(super) const NO_SQARRAY: u32 = 1 << 16;

/// An io_uring without requests in flight.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RcrUring {
    /// `IORING_SETUP_*`.
    #[prost(uint32, required, tag = "1")]
    pub flags: u32,
    /// Room for submissions.
    #[prost(uint32, required, tag = "2")]
    pub sq_entries: u32,
    /// Room for completions.
    #[prost(uint32, required, tag = "3")]
    pub cq_entries: u32,
    /// `sq_off` and `cq_off` of `struct io_uring_params`, words.
    #[prost(uint32, repeated, tag = "4")]
    pub offsets: Vec<u32>,
    /// The memory that is mapped at `IORING_OFF_SQ_RING`.
    #[prost(bytes = "vec", required, tag = "5")]
    pub ring: Vec<u8>,
    /// The memory that is mapped at `IORING_OFF_SQES`.
    #[prost(bytes = "vec", required, tag = "6")]
    pub sqes: Vec<u8>,
    /// The one thread that may submit (`IORING_SETUP_SINGLE_ISSUER`).
    #[prost(message, optional, tag = "7")]
    pub submitter: Option<RcrRingThread>,
    /// Slots for registered files.
    #[prost(uint32, required, tag = "8")]
    pub file_slots: u32,
    /// Registered files.
    #[prost(message, repeated, tag = "9")]
    pub files: Vec<RcrRingFile>,
    /// Registered buffers; empty slots have length 0.
    #[prost(message, repeated, tag = "10")]
    pub buffers: Vec<RcrRingBuffer>,
    /// The eventfd that is told of completions: its id in `files.img`.
    #[prost(uint32, optional, tag = "11")]
    pub eventfd: Option<u32>,
    /// It is told of completions by workers only.
    #[prost(bool, required, tag = "12")]
    pub eventfd_of_workers: bool,
    /// Threads that have the ring registered for themselves
    /// (`IORING_REGISTER_RING_FDS`).
    #[prost(message, repeated, tag = "13")]
    pub registered: Vec<RcrRingThread>,
}

/// A thread that has to do with a ring.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrRingThread {
    /// Its process.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
    /// Its id.
    #[prost(int32, required, tag = "2")]
    pub tid: i32,
    /// The ring's number among those it has registered.
    #[prost(uint32, required, tag = "3")]
    pub index: u32,
}

/// A registered file.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrRingFile {
    /// Its slot.
    #[prost(uint32, required, tag = "1")]
    pub slot: u32,
    /// Its id in `files.img`.
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
}

/// A registered buffer.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RcrRingBuffer {
    /// Its address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Its length in bytes.
    #[prost(uint64, required, tag = "2")]
    pub len: u64,
}

/// Where the parts of a ring's memory are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub sq_head: u32,
    pub sq_tail: u32,
    /// Where there is one.
    pub sq_array: Option<u32>,
    pub cq_head: u32,
    pub cq_tail: u32,
    pub cq_flags: u32,
    pub ring_bytes: usize,
    pub sqe_bytes: usize,
    pub sqes_bytes: usize,
}

impl Layout {
    /// That of a ring; `None`: the numbers make no sense.
    pub(super) fn new(flags: u32, sq_entries: u32, cq_entries: u32, off: &[u32]) -> Option<Self> {
        const MOST: u32 = 1 << 20;
        let (sq, cq) = (off.get(..10)?, off.get(10..20)?);
        if sq_entries == 0 || sq_entries > MOST || cq_entries > MOST {
            return None;
        }
        let cqe_bytes = if flags & CQE32 != 0 { 32 } else { 16 };
        let sqe_bytes = if flags & SQE128 != 0 { 128 } else { 64 };
        let sq_array = (flags & NO_SQARRAY == 0).then_some(sq[6]);
        let sq_end = sq_array.map_or(0, |at| u64::from(at) + 4 * u64::from(sq_entries));
        let cq_end = u64::from(cq[5]) + u64::from(cq_entries) * cqe_bytes;
        let words = [sq[0], sq[1], cq[0], cq[1], cq[6]];
        let ring_bytes = sq_end.max(cq_end);
        let inside = words.iter().all(|&w| u64::from(w) + 4 <= ring_bytes);
        (inside && ring_bytes < 1 << 30).then_some(Self {
            sq_head: sq[0],
            sq_tail: sq[1],
            sq_array,
            cq_head: cq[0],
            cq_tail: cq[1],
            cq_flags: cq[6],
            ring_bytes: ring_bytes as usize,
            sqe_bytes,
            sqes_bytes: sq_entries as usize * sqe_bytes,
        })
    }

    /// A word of a ring's memory.
    pub(super) fn word(ring: &[u8], at: u32) -> Option<u32> {
        let bytes = ring.get(at as usize..at as usize + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Maps both parts.
    pub(super) fn map(
        &self,
        ring: std::os::fd::BorrowedFd<'_>,
    ) -> crate::sys::SysResult<(RingMemory, RingMemory)> {
        let sqes = crate::file::sys::OFFSET_OF_SQES;
        Ok((
            RingMemory::map(ring, 0, self.ring_bytes)?,
            RingMemory::map(ring, sqes, self.sqes_bytes)?,
        ))
    }
}

/// What makes such a ring.
pub(super) fn parameters(flags: u32, cq_entries: u32) -> RingParameters {
    let mut p = RingParameters::default();
    p.0[1] = cq_entries;
    p.0[2] = flags | CQSIZE;
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_bounded() {
        let off = [
            0, 4, 16, 24, 36, 32, 320, 0, 0, 0, 8, 12, 20, 28, 44, 64, 40, 0, 0, 0,
        ];
        let l = Layout::new(0, 8, 16, &off).unwrap();
        assert_eq!((l.ring_bytes, l.sqes_bytes), (352, 512));
        let l = Layout::new(NO_SQARRAY | CQE32 | SQE128, 8, 16, &off).unwrap();
        assert_eq!((l.ring_bytes, l.sqes_bytes), (576, 1024));
        assert!(Layout::new(0, 8, u32::MAX, &off).is_none());
        assert!(Layout::new(0, 8, 16, &off[..19]).is_none());
        let far = [u32::MAX; 20];
        assert!(Layout::new(0, 8, 16, &far).is_none());
    }
}
