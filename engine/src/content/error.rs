//! What can go wrong with a tree's content.

use std::io;
use std::path::PathBuf;

use crate::image::ImageError;

/// A tree that cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A call on one of the tree's nodes failed.
    #[error("{call} {}", path.display())]
    Node {
        /// The system call.
        call: &'static str,
        /// The node, relative to its tree.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The image of a tree could not be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A path to be carried is not absolute or climbs with `..`.
    #[error("{} is not a plain absolute path", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
}

impl ContentError {
    /// For `map_err`: names the call and the node.
    pub(super) fn node<'a, E: Into<io::Error>>(
        call: &'static str,
        path: &'a std::path::Path,
    ) -> impl FnOnce(E) -> Self + 'a {
        move |e| Self::Node {
            call,
            path: path.to_owned(),
            source: e.into(),
        }
    }
}
