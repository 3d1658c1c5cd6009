//! Bringing the numbers that the kernel keeps for itself to where they were.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::record::*;
use crate::file::error::BuildError;
use crate::file::sys::{self, RingMemory};
use crate::sys::SysResult;

/// Calls that are made with one program.
const CALLS: usize = 200;
const SQE_FLAGS: usize = 1;
const CQE_SKIP_SUCCESS: u8 = 1 << 6;
const OP_MSG_RING: u8 = 40;
/// `IORING_CQ_EVENTFD_DISABLED`.
pub(super) const EVENTFD_DISABLED: u32 = 1;

/// A ring that is as new.
pub(super) struct Fresh<'a> {
    pub fd: BorrowedFd<'a>,
    pub layout: Layout,
    pub memory: RingMemory,
    pub sqes: RingMemory,
}

impl Fresh<'_> {
    /// Makes requests until the kernel's numbers are those of `old`, and then
    /// its memory. `enter` submits that many requests with each of its calls.
    pub(super) fn forward<E: From<BuildError>>(
        &self,
        old: &RcrUring,
        enter: &mut dyn FnMut(&[u32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (l, ring) = (&self.layout, &self.memory);
        let word = |at| Layout::word(&old.ring, at).unwrap_or(0);
        let (sq_goal, cq_goal) = (word(l.sq_head), word(l.cq_tail));
        // Not further: what was not taken out yet stays in.
        let head_goal = word(l.cq_head);
        let unread = cq_goal.wrapping_sub(head_goal);
        if unread > old.cq_entries {
            let what = "an io_uring holds more completions than it has room for";
            return Err(BuildError::Images(what.into()).into());
        }
        let follow = |cq: u32| match cq_goal.wrapping_sub(cq) >= unread {
            true => cq,
            false => head_goal,
        };
        self.requests(0);
        ring.set_word(l.cq_flags, EVENTFD_DISABLED);
        ring.set_word(l.sq_tail, sq_goal);
        let (mut sq, mut cq) = (0, 0);
        while cq < sq_goal.min(cq_goal) {
            let room = old.cq_entries - (cq - follow(cq));
            let now = room.min(sq_goal.min(cq_goal) - cq);
            let batches = batches(now, old.sq_entries);
            let now = batches.iter().sum::<u32>();
            enter(&batches)?;
            (sq, cq) = (sq + now, cq + now);
            ring.set_word(l.cq_head, follow(cq));
        }
        if sq < sq_goal {
            self.requests(CQE_SKIP_SUCCESS);
        }
        while sq < sq_goal {
            let batches = batches(sq_goal - sq, old.sq_entries);
            enter(&batches)?;
            sq += batches.iter().sum::<u32>();
        }
        if cq < cq_goal {
            self.messages(cq_goal - cq, |done| {
                ring.set_word(l.cq_head, follow(cq + done));
            })
            .map_err(BuildError::from)?;
        }
        let now = (ring.word(l.sq_head), ring.word(l.cq_tail));
        if now != (sq_goal, cq_goal) {
            let changed = BuildError::Changed {
                what: "numbers of an io_uring".into(),
                was: format!("{sq_goal}, {cq_goal}"),
                is: format!("{}, {}", now.0, now.1),
            };
            return Err(changed.into());
        }
        ring.write(0, &old.ring);
        self.sqes.write(0, &old.sqes);
        Ok(())
    }

    /// Fills it with requests that do nothing.
    fn requests(&self, flags: u8) {
        let mut one = vec![0; self.layout.sqe_bytes];
        one[SQE_FLAGS] = flags;
        let count = self.layout.sqes_bytes / self.layout.sqe_bytes;
        self.sqes.write(0, &one.repeat(count));
        if let Some(array) = self.layout.sq_array {
            let order: Vec<u8> = (0..count as u32).flat_map(u32::to_le_bytes).collect();
            self.memory.write(array as usize, &order);
        }
    }

    /// Completions without requests: messages of another ring.
    fn messages(&self, count: u32, taken: impl Fn(u32)) -> SysResult<()> {
        let mut p = parameters(0, 16);
        let other = sys::ring_setup(8, &mut p)?;
        let layout = Layout::new(0, p.sq_entries(), p.cq_entries(), p.offsets());
        let odd = || crate::sys::SysError::new("io_uring_setup", 8, nix::errno::Errno::EBADMSG);
        let layout = layout.ok_or_else(odd)?;
        let (memory, sqes) = layout.map(other.as_fd())?;
        let mut one = [0; 64];
        one[0] = OP_MSG_RING;
        one[4..8].copy_from_slice(&self.fd.as_raw_fd().to_le_bytes());
        sqes.write(0, &one);
        for done in 1..=count {
            // The array says 0 everywhere.
            memory.set_word(layout.sq_tail, done);
            sys::ring_enter(other.as_fd(), 1)?;
            memory.set_word(layout.cq_head, memory.word(layout.cq_tail));
            taken(done);
        }
        Ok(())
    }
}

/// Numbers of requests for one call each.
fn batches(count: u32, most: u32) -> Vec<u32> {
    let mut out = Vec::new();
    let mut left = count;
    while left > 0 && out.len() < CALLS {
        out.push(left.min(most));
        left -= left.min(most);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_fit() {
        assert_eq!(batches(20, 8), [8, 8, 4]);
        assert_eq!(batches(1 << 20, 8).len(), CALLS);
        assert!(batches(0, 8).is_empty());
    }
}
