//! What can go wrong with namespaces.

use std::io;
use std::path::{Path, PathBuf};

use crate::content::ContentError;
use crate::image::ImageError;

/// A namespace that cannot be read, saved or built.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A call failed.
    #[error("{call} {}", path.display())]
    Call {
        /// The system call or what it was for.
        call: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of `/proc` is not what its documentation says.
    #[error("{}: line {line} is not understood", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// An image could not be written or read, or contradicts itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The content of a tree.
    #[error("content of {}", path.display())]
    Content {
        /// Where the tree is.
        path: PathBuf,
        /// What failed.
        source: ContentError,
    },
    /// A file system did not take one of its options.
    #[error("{fstype} for {}: option {option}: {message}", path.display())]
    Option {
        /// Type of the file system.
        fstype: String,
        /// Where it is mounted.
        path: PathBuf,
        /// The option.
        option: String,
        /// The kernel's own words, else the error's.
        message: String,
    },
    /// A mount was not saved, and nothing is given for it.
    #[error("mount {}: it is external, and nothing is given for its name {name:?}", path.display())]
    NotGiven {
        /// Where it is.
        path: PathBuf,
        /// Its name.
        name: String,
    },
    /// A mount that the service's mounts derive from is not on this host.
    #[error("the host has no {fstype} at {}", path.display())]
    HostMount {
        /// Type of the file system that was there.
        fstype: String,
        /// Where it was.
        path: PathBuf,
    },
    /// The kernel's network side did not answer or refused a change.
    #[error("{what}")]
    Netlink {
        /// What was asked for, and the kernel's words.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A helper thread or process ended unexpectedly.
    #[error("the helper for {what} ended unexpectedly")]
    Helper {
        /// Its work.
        what: &'static str,
    },
}

impl NamespaceError {
    /// For `map_err`: names the call and its object.
    pub(super) fn call<'a, E: Into<io::Error>>(
        call: &'static str,
        path: impl AsRef<Path> + 'a,
    ) -> impl FnOnce(E) -> Self + 'a {
        move |e| Self::Call {
            call,
            path: path.as_ref().to_owned(),
            source: e.into(),
        }
    }

    /// The number of the kernel's error, if there is one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } | Self::Netlink { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// For `map_err`: content at that place.
    pub(super) fn content(path: &Path) -> impl FnOnce(ContentError) -> Self + '_ {
        move |source| Self::Content {
            path: path.to_owned(),
            source,
        }
    }
}
