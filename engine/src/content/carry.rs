//! Carrying chosen paths of a root: `/run/redis` with all below it, `/run/nginx.pid`.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::save::{TreeStats, Walk};
use super::{ContentError, restore_tree};
use crate::image::{ImageSink, ImageSource};

///
/// Directories above a path are made again where they are missing. Everything
/// below one that is a directory comes along, as far as it is on the same mount.
pub fn save_paths(
    root: BorrowedFd<'_>,
    paths: &[PathBuf],
    name: &str,
    sink: &mut dyn ImageSink,
) -> Result<TreeStats, ContentError> {
    walk(root, paths)?.store(name, sink)
}

/// How many bytes [`save_paths`] would put into the store, about.
pub fn estimate_paths(root: BorrowedFd<'_>, paths: &[PathBuf]) -> Result<u64, ContentError> {
    Ok(walk(root, paths)?.estimate())
}

/// Brings back what [`save_paths`] took, relative to `root`.
///
/// What is there under the same names is replaced.
pub fn restore_paths(
    root: BorrowedFd<'_>,
    source: &dyn ImageSource,
    name: &str,
) -> Result<(), ContentError> {
    restore_tree(source, name, root)
}

fn walk(root: BorrowedFd<'_>, paths: &[PathBuf]) -> Result<Walk, ContentError> {
    let mut walk = Walk::default();
    for path in outermost(paths) {
        let names = names_of(path)?;
        let mut dir = reopen(root, Path::new("."))?;
        let mut at = PathBuf::new();
        let Some((leaf, above)) = names.split_last() else {
            return Err(ContentError::Path { path: path.clone() });
        };
        let mut on_the_way = Vec::new();
        let mut missing = false;
        for name in above {
            at.push(name);
            match open_below(dir.as_fd(), Path::new(name)) {
                Ok(child) => {
                    let parent = std::mem::replace(&mut dir, child);
                    on_the_way.push((parent, name, at.clone()));
                }
                Err(Errno::NOENT) => missing = true,
                Err(e) => return Err(ContentError::node("open", &at)(e)),
            }
            if missing {
                break;
            }
        }
        at.push(leaf);
        if missing || !present(dir.as_fd(), leaf, &at)? {
            continue;
        }
        for (parent, name, at) in on_the_way {
            walk.on_the_way(parent.as_fd(), name, &at)?;
        }
        walk.node(dir.as_fd(), leaf, &at, None)?;
    }
    Ok(walk)
}

/// The paths without those that lie below another one or are named twice.
fn outermost(paths: &[PathBuf]) -> impl Iterator<Item = &PathBuf> {
    paths.iter().enumerate().filter_map(|(i, p)| {
        let covered = paths
            .iter()
            .enumerate()
            .any(|(j, other)| (p.starts_with(other) && p != other) || (p == other && j < i));
        (!covered).then_some(p)
    })
}

fn names_of(path: &Path) -> Result<Vec<&OsStr>, ContentError> {
    let mut names = Vec::new();
    let mut absolute = false;
    for c in path.components() {
        match c {
            Component::RootDir => absolute = true,
            Component::Normal(name) => names.push(name),
            _ => {
                return Err(ContentError::Path {
                    path: path.to_owned(),
                });
            }
        }
    }
    if !absolute || names.is_empty() {
        return Err(ContentError::Path {
            path: path.to_owned(),
        });
    }
    Ok(names)
}

fn reopen(dir: BorrowedFd<'_>, path: &Path) -> Result<std::os::fd::OwnedFd, ContentError> {
    open_below(dir, path).map_err(ContentError::node("open", path))
}

fn open_below(dir: BorrowedFd<'_>, path: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(dir, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

fn present(dir: BorrowedFd<'_>, leaf: &OsStr, path: &Path) -> Result<bool, ContentError> {
    match rustix::fs::statat(dir, leaf, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(ContentError::node("stat", path)(e)),
    }
}
