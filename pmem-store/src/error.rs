//! What can be wrong with a store.

use std::io;

/// Why a store cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The region has no room for even the two superblocks and an empty index.
    #[error("a region of {len} bytes is too small for a store; {needed} are needed")]
    TooSmall {
        /// Length of the region in bytes.
        len: u64,
        /// The least it has to be.
        needed: u64,
    },
    /// An image does not fit any more.
    #[error(
        "the store is full: image {name} of {len} bytes needs {missing} bytes more than the region has"
    )]
    Full {
        /// The image that was being stored.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// How many bytes larger the region would have to be, counting padding and index.
        missing: u64,
    },
    /// An image of that name was stored before.
    #[error("image {name} is stored already")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A name is empty, too long, or holds a NUL byte.
    #[error("{name:?} is no name for an image (1 to {max} bytes, no NUL)")]
    BadName {
        /// The name.
        name: String,
        /// Longest name in bytes.
        max: usize,
    },
    /// No superblock of ours is there.
    #[error("no store in this region")]
    Foreign,
    /// The store was written by a program that speaks another format.
    #[error("the store has format version {found}; this program reads version {supported}")]
    Version {
        /// Version in the superblock.
        found: u32,
        /// The version read by this program.
        supported: u32,
    },
    /// The store belongs to another hand-over, for example to one before a cold reset.
    #[error("the store is left over from another upgrade (its nonce differs)")]
    Stale,
    /// The old kernel never finished the store.
    #[error("the store was not sealed: the dump did not finish")]
    NotSealed,
    /// The store was restored before. Its processes may have run since.
    #[error("the store was restored before; restoring it twice would double its processes")]
    Consumed,
    /// Metadata contradicts itself or its checksum.
    #[error("the store is damaged: {what}")]
    Damaged {
        /// What was found wrong.
        what: &'static str,
    },
    /// The bytes of an image do not have their checksum.
    #[error("image {name} is damaged: checksum {found:016x} instead of {expected:016x}")]
    ImageDamaged {
        /// The image's name.
        name: String,
        /// Checksum in the index.
        expected: u64,
        /// Checksum of the bytes as they are.
        found: u64,
    },
    /// The region's medium failed.
    #[error("writing the store through to its region failed")]
    Sync(#[source] io::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Full { .. } | Error::TooSmall { .. } => io::ErrorKind::StorageFull,
            Error::Duplicate { .. } => io::ErrorKind::AlreadyExists,
            Error::BadName { .. } => io::ErrorKind::InvalidInput,
            Error::Sync(source) => source.kind(),
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, error)
    }
}
