//! File systems that show a PID namespace: they belong to the one that the
//! mounting process is in, so they can be made only when there is one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{UnmountFlags, move_mount, open_tree, unmount};

use super::assembly::{Assembly, Piece, open_below};
use super::build::{CLONE, NOWHERE, place_of};
use super::create::Recipe;
use crate::namespace::NamespaceError;
use crate::namespace::sys::{Propagation, mount_setattr};
use crate::namespace::view::inside;

/// A proc to be mounted by a process of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proc {
    /// Which of the namespace's own file systems it is.
    pub at: u32,
    /// The process, by the images' ids.
    pub process: i32,
    /// fsconfig(2): keys, and values for those that have one.
    pub options: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

/// A mount namespace without its procs, and what is mounted on them.
#[derive(Debug)]
pub struct Unfinished {
    pub(super) ns: OwnedFd,
    pub(super) all: Assembly,
}

impl Unfinished {
    /// What is missing.
    pub fn procs(&self) -> Vec<Proc> {
        let owns = (0..).zip(&self.all.image.owns);
        let late = owns.filter_map(|(at, own)| Some((at, own, own.pid_ns_of?)));
        late.map(|(at, own, process)| {
            let seen = Path::new("/proc");
            let recipe = Recipe {
                fstype: &own.fstype,
                source: OsStr::from_bytes(&own.source),
                options: &own.options,
                seen,
            };
            Proc {
                at,
                process,
                options: recipe.settings(),
            }
        })
        .collect()
    }

    /// Puts the mounts in that were waiting; `made` has them by [`Proc::at`],
    /// not attached anywhere.
    pub fn finish(mut self, made: &BTreeMap<u32, OwnedFd>) -> Result<(), NamespaceError> {
        let ns = self
            .ns
            .try_clone()
            .map_err(NamespaceError::call("dup", "mount namespace"))?;
        inside(&ns, "mount namespace", || {
            for (&at, mount) in made {
                self.clone_parts(at, mount)?;
            }
            self.attach()?;
            self.all.propagation()
        })
    }

    /// Clones what each mount shows of a proc. Only what is attached can be
    /// cloned: it lies over the root for that long, where nobody is yet.
    fn clone_parts(&mut self, at: u32, mount: &OwnedFd) -> Result<(), NamespaceError> {
        let all = &mut self.all;
        let err = |call| NamespaceError::call(call, "/proc");
        let Some(Some(root)) = all.pieces.first() else {
            return Ok(());
        };
        move_mount(mount, "", &root.mount, "", NOWHERE).map_err(err("move_mount"))?;
        for (m, piece) in all.image.mounts.iter().zip(&mut all.pieces) {
            if m.own != Some(at) || m.external.is_some() {
                continue;
            }
            let err = |call| NamespaceError::call(call, place_of(m));
            let shown = match open_below(mount, Path::new(OsStr::from_bytes(&m.root))) {
                // Another kernel may lack the file.
                Err(rustix::io::Errno::NOENT) => continue,
                other => other.map_err(err("open"))?,
            };
            let mount = open_tree(&shown, "", CLONE).map_err(err("open_tree"))?;
            mount_setattr(&mount, false, Some(m.attrs), Some(Propagation::Private))
                .map_err(err("mount_setattr"))?;
            *piece = Some(Piece { mount, place: None });
        }
        rustix::process::fchdir(mount).map_err(err("fchdir"))?;
        unmount(".", UnmountFlags::DETACH).map_err(err("umount"))
    }

    fn attach(&self) -> Result<(), NamespaceError> {
        let all = &self.all;
        let each = all.image.mounts.iter().zip(&all.pieces).zip(&all.waiting);
        for ((m, piece), _) in each.filter(|(_, waits)| **waits) {
            let (Some(piece), Some(parent)) = (piece, m.parent) else {
                continue;
            };
            let Some(place) = all.place(m, parent as usize)? else {
                continue;
            };
            move_mount(&piece.mount, "", &place, "", NOWHERE)
                .map_err(NamespaceError::call("move_mount", place_of(m)))?;
        }
        Ok(())
    }
}
