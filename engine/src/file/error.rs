//! What goes wrong with files.

use crate::image::ImageError;
use crate::sys::SysError;

/// A dump or a restore of files that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A call on a task's descriptor failed.
    #[error("pid {pid}, {object}")]
    Task {
        /// The task.
        pid: i32,
        /// Which file of it.
        object: String,
        /// What failed.
        source: SysError,
    },
    /// Something in `/proc` cannot be read or makes no sense.
    #[error("pid {pid}: {path}: {what}")]
    Proc {
        /// The task.
        pid: i32,
        /// The file in `/proc`.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A call of our own failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// An image cannot be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Files were refused; nothing is written then.
    #[error("{count} files cannot be carried, the first: {first}")]
    Refused {
        /// How many.
        count: usize,
        /// The first of them.
        first: String,
    },
    /// A file cannot be made again.
    #[error("file {id} ({what})")]
    Build {
        /// Its id in `files.img`.
        id: u32,
        /// What it is.
        what: String,
        /// What failed.
        source: BuildError,
    },
}

/// Why a file cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The environment could not provide what the file needs.
    #[error("{what}")]
    Env {
        /// What was asked for.
        what: String,
        /// Why it is not there.
        source: std::io::Error,
    },
    /// Its other end was outside of the tree, and no other is there.
    #[error("nothing is given for {name}, whose other end was outside")]
    NotGiven {
        /// Its name.
        name: String,
    },
    /// What is there now is not what was there at the dump.
    #[error("{what}: was {was}, is {is}")]
    Changed {
        /// Which property.
        what: String,
        /// At the dump.
        was: String,
        /// Now.
        is: String,
    },
    /// The images do not fit together.
    #[error("the images are inconsistent: {0}")]
    Images(String),
}

/// Why a file is not saved: it cannot be carried, or looking at it failed.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It cannot be carried.
    Refuse {
        /// What it is: `io_uring`, `tty`.
        kind: String,
        /// Why.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// A call failed.
    Sys(SysError),
}

impl From<SysError> for Stop {
    fn from(e: SysError) -> Self {
        Stop::Sys(e)
    }
}

/// A refusal of something that is simply not carried.
pub(crate) fn refuse<T>(
    kind: impl Into<String>,
    reason: impl Into<String>,
    advice: impl Into<String>,
) -> Result<T, Stop> {
    Err(Stop::Refuse {
        kind: kind.into(),
        reason: reason.into(),
        advice: advice.into(),
    })
}
