//! What can be wrong with an image.

use std::io;

/// An image that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The store failed.
    #[error("image {name}")]
    Io {
        /// The image.
        name: String,
        /// What the store said.
        source: io::Error,
    },
    /// An image that a restore needs is not there.
    #[error("image {name} is missing or empty")]
    Missing {
        /// The image.
        name: String,
    },
    /// The image starts with another magic number.
    #[error("image {name} starts with {found:#010x} instead of {wanted:#010x}")]
    Magic {
        /// The image.
        name: String,
        /// The word that is there.
        found: u32,
        /// The word that should be there.
        wanted: u32,
    },
    /// The image ends too early.
    #[error("image {name} is cut at byte {offset}: {wanted} bytes wanted, {left} left")]
    Truncated {
        /// The image.
        name: String,
        /// Where reading stopped.
        offset: u64,
        /// How much was to follow.
        wanted: u64,
        /// How much does.
        left: u64,
    },
    /// A record is not what the schema says.
    #[error("image {name}: record at byte {offset} does not decode")]
    Decode {
        /// The image.
        name: String,
        /// Where the record starts.
        offset: u64,
        /// What is wrong with it.
        source: prost::DecodeError,
    },
    /// The records contradict each other.
    #[error("image {name}: {what}")]
    Content {
        /// The image.
        name: String,
        /// The contradiction.
        what: String,
    },
}
