//! Building a mount namespace.
//!
//! Everything is made private first and attached by descriptor, never by
//! path, so nothing leaks into the host and hidden mounts come out right.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::thread::UnshareFlags;

use super::assembly::{Assembly, Piece, open_below};
use super::mountinfo;
use super::procs::Unfinished;
use super::schema::{MountEntry, MountsEntry};
use super::sources::{make_own, make_sources};
use super::{Beside, HostEnv, MountNamespace, ROOT, host, image_name, nodes};
use crate::image::{ImageError, ImageSource, Kind, get_record};
use crate::namespace::NamespaceError;
use crate::namespace::sys::{Propagation, mount_setattr, unshare};
use crate::namespace::view::{MountView, on_own_thread, open_path};

pub(super) const NOWHERE: MoveMountFlags =
    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH.union(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH);
pub(super) const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE
    .union(OpenTreeFlags::OPEN_TREE_CLOEXEC)
    .union(OpenTreeFlags::AT_EMPTY_PATH);

/// Builds the saved namespace `ns_id` over the calling thread's one.
///
/// The host must be shared where it was (`MS_REC|MS_SHARED` on `/`). On the
/// host itself this only adds: file systems and directories that early boot
/// has not made yet. After an error nothing of the new namespace is left.
pub fn build_mounts(
    source: &dyn ImageSource,
    ns_id: u32,
    env: &HostEnv,
    beside: &Beside<'_>,
) -> Result<MountNamespace, NamespaceError> {
    let image: MountsEntry = get_record(source, Kind::RcrNamespaces, &image_name(ns_id))?;
    check(&image).map_err(|what| ImageError::Content {
        name: image_name(ns_id),
        what,
    })?;
    for h in image.hosts.iter().filter(|_| !env.as_it_is) {
        host::ensure(h)?;
    }
    make_sources(&image, env, source)?;
    let owns = make_own(&image, source, beside)?;
    on_own_thread("mount namespace", || {
        Builder {
            image: &image,
            env,
            owns: &owns,
        }
        .build()
    })
}

/// Checks that the parts of an image refer to each other as they must.
fn check(image: &MountsEntry) -> Result<(), String> {
    for (i, m) in image.mounts.iter().enumerate() {
        let parent = m.parent.map(|p| p as usize);
        if (i == 0) != parent.is_none() || parent.is_some_and(|p| p >= i) {
            return Err(format!("mount {i} has no parent before it"));
        }
        let host = m.host.is_some_and(|h| (h as usize) < image.hosts.len());
        let own = m.own.is_some_and(|o| (o as usize) < image.owns.len());
        if m.external.is_none() && host == own {
            return Err(format!("mount {i} does not say what it shows"));
        }
    }
    if image.mounts.is_empty() {
        return Err("no mounts".into());
    }
    Ok(())
}

/// What a mount shows, below its origin's root, under this boot.
pub(super) fn root_of(m: &MountEntry, image: &MountsEntry, env: &HostEnv) -> PathBuf {
    nodes::under_boot(
        Path::new(OsStr::from_bytes(&m.root)),
        &image.boot_id,
        &env.boot_id,
    )
}

/// Where a mount is seen.
pub(super) fn place_of(m: &MountEntry) -> &Path {
    Path::new(OsStr::from_bytes(&m.mountpoint))
}

struct Builder<'a> {
    image: &'a MountsEntry,
    env: &'a HostEnv,
    /// None where a process has to be there first.
    owns: &'a [Option<OwnedFd>],
}

impl Builder<'_> {
    /// Runs on a thread that is thrown away.
    fn build(&self) -> Result<MountNamespace, NamespaceError> {
        let err = |call| NamespaceError::call(call, "/");
        let mut all = Assembly {
            image: self.image.clone(),
            pieces: Vec::new(),
            waiting: Vec::new(),
            host_places: self.peers()?,
        };
        // The namespace is named through the host's /proc: the service's own may hide it.
        let proc = open_path("/proc")?;
        unshare(UnshareFlags::NEWNS).map_err(err("unshare"))?;
        let stems = self.stems()?;
        let given = self.given()?;
        let old_root = open_path("/")?;
        mount_setattr(&old_root, true, None, Some(Propagation::Private))
            .map_err(err("mount_setattr"))?;
        self.stage(&stems)?;
        self.pieces(&stems, given, &mut all)?;
        let Some(root) = &all.pieces[0] else {
            return Err(self.absent(&self.image.mounts[0]));
        };
        move_mount(&root.mount, "", &old_root, "", NOWHERE).map_err(err("move_mount"))?;
        rustix::process::fchdir(&root.mount).map_err(err("fchdir"))?;
        rustix::process::pivot_root(".", ".").map_err(err("pivot_root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(err("umount"))?;
        rustix::process::chdir("/").map_err(err("chdir"))?;
        for (m, piece) in self.image.mounts.iter().zip(&all.pieces) {
            if let Some(Piece {
                mount,
                place: Some(place),
            }) = piece
            {
                move_mount(mount, "", place, "", NOWHERE)
                    .map_err(NamespaceError::call("move_mount", place_of(m)))?;
            }
        }
        let waits = all.waiting.contains(&true);
        if !waits {
            all.propagation()?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, "/", flags, Mode::empty()).map_err(err("open"))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let ns = openat(&proc, "thread-self/ns/mnt", flags, Mode::empty()).map_err(err("open"))?;
        let rest = waits.then(|| ns.try_clone().map(|ns| Unfinished { ns, all }));
        let rest = rest.transpose().map_err(NamespaceError::call("dup", "/"))?;
        Ok(MountNamespace {
            ns,
            root,
            rest: RefCell::new(rest),
        })
    }

    /// The host's own mounts that some of ours are peers of, by place in the list.
    fn peers(&self) -> Result<HashMap<u32, OwnedFd>, NamespaceError> {
        let mut places = HashMap::new();
        let wanted = self
            .image
            .mounts
            .iter()
            .filter(|m| m.host_peer)
            .filter_map(|m| m.host);
        let mounts = MountView::own()?.mounts;
        for h in wanted {
            if let Some((_, place)) = host::find(&mounts, &self.image.hosts[h as usize])? {
                places.insert(h, place);
            }
        }
        Ok(places)
    }

    /// A clone of each host mount that is there, still in the host's peer group.
    fn stems(&self) -> Result<Vec<Option<OwnedFd>>, NamespaceError> {
        let path = "/proc/thread-self/mountinfo";
        let text = std::fs::read(path).map_err(NamespaceError::call("read", path))?;
        let mounts = mountinfo::parse(&text).map_err(|line| NamespaceError::Format {
            path: path.into(),
            line,
        })?;
        let mut stems = Vec::new();
        for h in &self.image.hosts {
            let stem = host::find(&mounts, h)?.map(|(m, place)| {
                open_tree(&place, "", CLONE)
                    .map_err(NamespaceError::call("open_tree", &m.mountpoint))
            });
            stems.push(stem.transpose()?);
        }
        Ok(stems)
    }

    /// Attaches the stems and own file systems over the old tree's `/proc`,
    /// because only what is attached can be cloned. They go away with the old tree.
    fn stage(&self, stems: &[Option<OwnedFd>]) -> Result<(), NamespaceError> {
        let place = open_path("/proc")?;
        for mount in stems.iter().chain(self.owns).flatten() {
            move_mount(mount, "", &place, "", NOWHERE)
                .map_err(NamespaceError::call("move_mount", "staged mount"))?;
        }
        Ok(())
    }

    /// Clones the part that each mount shows and finds the place it goes to.
    fn pieces(
        &self,
        stems: &[Option<OwnedFd>],
        mut given: Vec<Option<OwnedFd>>,
        all: &mut Assembly,
    ) -> Result<(), NamespaceError> {
        for (m, given) in self.image.mounts.iter().zip(&mut given) {
            let late = self.is_late(m);
            let on_late = m.parent.is_some_and(|p| all.waiting[p as usize]);
            let piece = match late {
                true => None,
                false => self.piece(m, stems, given.take(), on_late, all)?,
            };
            if piece.is_none() && !late {
                tracing::info!(path = %place_of(m).display(), "mount left out, not on the host yet");
            }
            all.pieces.push(piece);
            all.waiting.push(late || on_late);
        }
        Ok(())
    }

    /// Whether a mount shows what a process has to be there for.
    fn is_late(&self, m: &MountEntry) -> bool {
        m.external.is_none() && m.own.is_some_and(|o| self.owns[o as usize].is_none())
    }

    fn piece(
        &self,
        m: &MountEntry,
        stems: &[Option<OwnedFd>],
        given: Option<OwnedFd>,
        waits: bool,
        all: &Assembly,
    ) -> Result<Option<Piece>, NamespaceError> {
        let err = |call| NamespaceError::call(call, place_of(m));
        if let Some(mount) = given {
            let place = match m.parent.filter(|_| !waits) {
                None => None,
                Some(p) => {
                    let place = all.place(m, p as usize)?;
                    Some(place.ok_or_else(|| self.absent(m))?)
                }
            };
            self.attributes(m, &mount, all)?;
            return Ok(Some(Piece { mount, place }));
        }
        let origin = match (m.host, m.own) {
            (Some(h), _) => stems[h as usize].as_ref(),
            (_, own) => own.and_then(|o| self.owns[o as usize].as_ref()),
        };
        let Some(origin) = origin else {
            return if m.optional {
                Ok(None)
            } else {
                Err(self.absent(m))
            };
        };
        let place = match m.parent.filter(|_| !waits) {
            None => None,
            Some(p) => {
                let Some(place) = all.place(m, p as usize)? else {
                    return Ok(None);
                };
                Some(place)
            }
        };
        let root = root_of(m, self.image, self.env);
        let shown = match open_below(origin, &root) {
            Err(Errno::NOENT) if self.may_lack(m, origin, &root, all) => return Ok(None),
            other => other.map_err(NamespaceError::call("open", &root))?,
        };
        let mount = open_tree(&shown, "", CLONE).map_err(err("open_tree"))?;
        self.attributes(m, &mount, all)?;
        Ok(Some(Piece { mount, place }))
    }

    fn attributes(
        &self,
        m: &MountEntry,
        mount: &OwnedFd,
        all: &Assembly,
    ) -> Result<(), NamespaceError> {
        let propagation = if m.host_slave && all.leads(m) {
            Propagation::Slave
        } else {
            Propagation::Private
        };
        mount_setattr(mount, false, Some(m.attrs), Some(propagation))
            .map_err(NamespaceError::call("mount_setattr", place_of(m)))
    }

    /// A clone of what is bound for each mount that was not saved.
    fn given(&self) -> Result<Vec<Option<OwnedFd>>, NamespaceError> {
        let first = self.image.mounts.first();
        let replaced = first.filter(|f| self.env.root_anyway && f.external.is_none());
        let mut given = Vec::new();
        for m in &self.image.mounts {
            let root = Path::new(OsStr::from_bytes(&m.root));
            let old = replaced.filter(|f| (f.host, f.own) == (m.host, m.own));
            let old = old.map(|f| Path::new(OsStr::from_bytes(&f.root)));
            let asked = match (&m.external, old.map(|old| root.strip_prefix(old))) {
                (Some(name), _) => Some((name.as_str(), root)),
                (None, Some(Ok(below))) => Some((ROOT, below)),
                _ => None,
            };
            let Some((name, below)) = asked else {
                given.push(None);
                continue;
            };
            let path = match name {
                ROOT => self.env.root.as_ref(),
                name => self.env.external.get(name),
            };
            let path = path.ok_or_else(|| NamespaceError::NotGiven {
                path: place_of(m).to_owned(),
                name: name.to_owned(),
            })?;
            let shown = open_below(&open_path(path)?, below);
            let shown = shown.map_err(NamespaceError::call("open", path.join(below)))?;
            let clone = open_tree(&shown, "", CLONE);
            given.push(Some(
                clone.map_err(NamespaceError::call("open_tree", path))?,
            ));
        }
        Ok(given)
    }

    /// Whether the absence of what a mount shows is the new kernel's own affair.
    fn may_lack(&self, m: &MountEntry, origin: &OwnedFd, root: &Path, all: &Assembly) -> bool {
        let cgroup = m
            .host
            .is_some_and(|h| self.image.hosts[h as usize].fstype == "cgroup2");
        // A cgroup has the files that the kernel gives it, but the cgroup must be there.
        let above = root.parent().unwrap_or(Path::new(""));
        all.made_by_kernel(m) || cgroup && open_below(origin, above).is_ok()
    }

    fn absent(&self, m: &MountEntry) -> NamespaceError {
        let h = m.host.map(|h| &self.image.hosts[h as usize]);
        NamespaceError::HostMount {
            fstype: h.map_or(String::new(), |h| h.fstype.clone()),
            path: h.map_or(place_of(m), host::mountpoint).to_owned(),
        }
    }
}
