//! Stretches of physical memory.

use std::fmt;

/// Physical addresses `start` up to, not including, `start + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysRange {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl PhysRange {
    /// First address after the range.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether all of `inner` lies in this range.
    pub fn contains(&self, inner: &PhysRange) -> bool {
        self.start <= inner.start && inner.end() <= self.end()
    }

    /// Whether both share a byte.
    pub fn overlaps(&self, other: &PhysRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Display for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}
