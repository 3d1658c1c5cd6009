//! Building a mount namespace.
//!
//! Everything is made private first and attached by descriptor, never by
//! path, so nothing leaks into the host and hidden mounts come out right.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::thread::UnshareFlags;

use super::mountinfo;
use super::schema::{MountEntry, MountsEntry};
use super::sources::{make_dirs, make_own, make_sources};
use super::{Beside, HostEnv, MountNamespace, host, image_name, nodes};
use crate::image::{ImageError, ImageSource, Kind, get_record};
use crate::namespace::NamespaceError;
use crate::namespace::sys::{Propagation, mount_setattr, unshare};
use crate::namespace::view::{MountView, on_own_thread, open_path};

const NOWHERE: MoveMountFlags =
    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH.union(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH);
const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE
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
    for h in &image.hosts {
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
        if host == own {
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
    owns: &'a [OwnedFd],
}

/// A mount that is made but not attached, and where it goes.
struct Piece {
    mount: OwnedFd,
    /// The place in its parent; none for the root.
    place: Option<OwnedFd>,
}

impl Builder<'_> {
    /// Runs on a thread that is thrown away.
    fn build(&self) -> Result<MountNamespace, NamespaceError> {
        let err = |call| NamespaceError::call(call, "/");
        let host_places = self.peers()?;
        // The namespace is named through the host's /proc: the service's own may hide it.
        let proc = open_path("/proc")?;
        unshare(UnshareFlags::NEWNS).map_err(err("unshare"))?;
        let stems = self.stems()?;
        let old_root = open_path("/")?;
        mount_setattr(&old_root, true, None, Some(Propagation::Private))
            .map_err(err("mount_setattr"))?;
        self.stage(&stems)?;
        let pieces = self.pieces(&stems)?;
        let Some(root) = &pieces[0] else {
            return Err(self.absent(&self.image.mounts[0]));
        };
        move_mount(&root.mount, "", &old_root, "", NOWHERE).map_err(err("move_mount"))?;
        rustix::process::fchdir(&root.mount).map_err(err("fchdir"))?;
        rustix::process::pivot_root(".", ".").map_err(err("pivot_root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(err("umount"))?;
        rustix::process::chdir("/").map_err(err("chdir"))?;
        for (m, piece) in self.image.mounts.iter().zip(&pieces) {
            if let Some(Piece {
                mount,
                place: Some(place),
            }) = piece
            {
                move_mount(mount, "", place, "", NOWHERE)
                    .map_err(NamespaceError::call("move_mount", place_of(m)))?;
            }
        }
        self.propagation(&pieces, &host_places)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, "/", flags, Mode::empty()).map_err(err("open"))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let ns = openat(&proc, "thread-self/ns/mnt", flags, Mode::empty()).map_err(err("open"))?;
        Ok(MountNamespace { ns, root })
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
        for mount in stems.iter().flatten().chain(self.owns) {
            move_mount(mount, "", &place, "", NOWHERE)
                .map_err(NamespaceError::call("move_mount", "staged mount"))?;
        }
        Ok(())
    }

    /// Clones the part that each mount shows and finds the place it goes to.
    fn pieces(&self, stems: &[Option<OwnedFd>]) -> Result<Vec<Option<Piece>>, NamespaceError> {
        let mut pieces: Vec<Option<Piece>> = Vec::new();
        for m in &self.image.mounts {
            let piece = self.piece(m, stems, &pieces)?;
            if piece.is_none() {
                tracing::info!(path = %place_of(m).display(), "mount left out, not on the host yet");
            }
            pieces.push(piece);
        }
        Ok(pieces)
    }

    fn piece(
        &self,
        m: &MountEntry,
        stems: &[Option<OwnedFd>],
        pieces: &[Option<Piece>],
    ) -> Result<Option<Piece>, NamespaceError> {
        let err = |call| NamespaceError::call(call, place_of(m));
        let origin = match (m.host, m.own) {
            (Some(h), _) => stems[h as usize].as_ref(),
            (_, own) => own.map(|o| &self.owns[o as usize]),
        };
        let Some(origin) = origin else {
            return if m.optional {
                Ok(None)
            } else {
                Err(self.absent(m))
            };
        };
        let place = match m.parent {
            None => None,
            Some(p) => {
                let Some(place) = self.place(m, p as usize, pieces)? else {
                    return Ok(None);
                };
                Some(place)
            }
        };
        let root = root_of(m, self.image, self.env);
        let shown = match open_below(origin, &root) {
            Err(Errno::NOENT) if self.may_lack(m, origin, &root) => return Ok(None),
            other => other.map_err(NamespaceError::call("open", &root))?,
        };
        let mount = open_tree(&shown, "", CLONE).map_err(err("open_tree"))?;
        let propagation = if m.host_slave && self.leads(m) {
            Propagation::Slave
        } else {
            Propagation::Private
        };
        mount_setattr(&mount, false, Some(m.attrs), Some(propagation))
            .map_err(err("mount_setattr"))?;
        Ok(Some(Piece { mount, place }))
    }

    /// Where a mount goes: into its parent, or, while that is absent, into what
    /// that would be mounted on. None if there is no such place.
    fn place(
        &self,
        m: &MountEntry,
        parent_at: usize,
        pieces: &[Option<Piece>],
    ) -> Result<Option<OwnedFd>, NamespaceError> {
        let above = &self.image.mounts[parent_at];
        let below = place_of(m)
            .strip_prefix(place_of(above))
            .unwrap_or(place_of(m));
        let Some(parent) = &pieces[parent_at] else {
            let Some(next) = above.parent else {
                return Ok(None);
            };
            let place = self.place(above, next as usize, pieces)?;
            return Ok(place.filter(|_| below.as_os_str().is_empty()));
        };
        match open_below(&parent.mount, below) {
            Ok(place) => Ok(Some(place)),
            Err(Errno::NOENT) if self.made_by_kernel(above) => Ok(None),
            Err(Errno::NOENT) if above.own.is_some() => self.make_place(m, parent, below).map(Some),
            Err(e) => Err(NamespaceError::call("open", place_of(m))(e)),
        }
    }

    /// Makes a place to mount on in a file system whose content nobody could see.
    fn make_place(
        &self,
        m: &MountEntry,
        parent: &Piece,
        below: &Path,
    ) -> Result<OwnedFd, NamespaceError> {
        let err = |call| NamespaceError::call(call, place_of(m));
        let dir = make_dirs(&parent.mount, below.parent().unwrap_or(Path::new("")))?;
        let leaf = below.file_name().unwrap_or_default();
        let is_dir = m
            .way
            .last()
            .is_none_or(|w| w.mode & libc::S_IFMT == libc::S_IFDIR);
        if is_dir {
            mkdirat(&dir, leaf, Mode::from_raw_mode(0o755)).map_err(err("mkdir"))?;
        } else {
            let mode = Mode::empty();
            mknodat(&dir, leaf, FileType::RegularFile, mode, 0).map_err(err("mknod"))?;
        }
        open_below(&dir, Path::new(leaf)).map_err(err("open"))
    }

    /// Whether the absence of what a mount shows is the new kernel's own affair.
    fn may_lack(&self, m: &MountEntry, origin: &OwnedFd, root: &Path) -> bool {
        let cgroup = m
            .host
            .is_some_and(|h| self.image.hosts[h as usize].fstype == "cgroup2");
        // A cgroup has the files that the kernel gives it, but the cgroup must be there.
        let above = root.parent().unwrap_or(Path::new(""));
        self.made_by_kernel(m) || cgroup && open_below(origin, above).is_ok()
    }

    /// Whether the kernel decides which files its origin has, so that another may lack some.
    fn made_by_kernel(&self, m: &MountEntry) -> bool {
        let fstype = match (m.host, m.own) {
            (Some(h), _) => &self.image.hosts[h as usize].fstype,
            (_, Some(o)) => &self.image.owns[o as usize].fstype,
            _ => return false,
        };
        matches!(
            fstype.as_str(),
            "proc" | "sysfs" | "debugfs" | "tracefs" | "securityfs"
        )
    }

    /// The mount of a peer group that the others join: the one that shows the most.
    fn leader(&self, group: u32) -> Option<usize> {
        let mounts = self.image.mounts.iter().enumerate();
        let width = |m: &MountEntry| m.root.len();
        mounts
            .filter(|(_, m)| m.group == Some(group))
            .min_by_key(|(_, m)| width(m))
            .map(|(i, _)| i)
    }

    /// Whether a mount gets its propagation by itself, not by joining another.
    fn leads(&self, m: &MountEntry) -> bool {
        m.group.is_none_or(|g| {
            self.leader(g)
                .is_none_or(|l| std::ptr::eq(&self.image.mounts[l], m))
        })
    }

    /// Joins peer groups, leaders first.
    fn propagation(
        &self,
        pieces: &[Option<Piece>],
        host_places: &HashMap<u32, OwnedFd>,
    ) -> Result<(), NamespaceError> {
        let each = || {
            self.image
                .mounts
                .iter()
                .zip(pieces)
                .filter_map(|(m, p)| Some((m, p.as_ref()?)))
        };
        let set = |m: &MountEntry, p: &Piece, to| {
            mount_setattr(&p.mount, false, None, Some(to))
                .map_err(NamespaceError::call("mount_setattr", place_of(m)))
        };
        let join = |m: &MountEntry, from: &OwnedFd, to: &Piece| {
            let flags = NOWHERE | MoveMountFlags::MOVE_MOUNT_SET_GROUP;
            move_mount(from, "", &to.mount, "", flags)
                .map_err(NamespaceError::call("join the peer group of", place_of(m)))
        };
        let leader_of = |g: u32| self.leader(g).and_then(|l| pieces[l].as_ref());
        for (m, piece) in each() {
            if m.host_peer
                && let Some(from) = m.host.and_then(|h| host_places.get(&h))
            {
                join(m, from, piece)?;
            }
        }
        for (m, piece) in each().filter(|(m, _)| m.group.is_some() && self.leads(m)) {
            set(m, piece, Propagation::Shared)?;
        }
        for (m, piece) in each().filter(|(m, _)| m.group.is_some() && !self.leads(m)) {
            if let Some(leader) = m.group.and_then(leader_of) {
                join(m, &leader.mount, piece)?;
            }
        }
        for (m, piece) in each().filter(|(m, _)| m.master.is_some()) {
            if let Some(leader) = m.master.and_then(leader_of) {
                join(m, &leader.mount, piece)?;
                set(m, piece, Propagation::Slave)?;
            }
        }
        for (m, piece) in each().filter(|(m, _)| m.unbindable) {
            set(m, piece, Propagation::Unbindable)?;
        }
        Ok(())
    }

    fn absent(&self, m: &MountEntry) -> NamespaceError {
        let h = m.host.map(|h| &self.image.hosts[h as usize]);
        NamespaceError::HostMount {
            fstype: h.map_or(String::new(), |h| h.fstype.clone()),
            path: h.map_or(place_of(m), host::mountpoint).to_owned(),
        }
    }
}

/// Opens a place below a mount's root, on that mount and through no symbolic link.
fn open_below(top: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match openat2(top, path, flags, Mode::empty(), how) {
        // The root of a mount that shows a single file is no directory to start from.
        Err(Errno::NOTDIR) if path == Path::new(".") => rustix::io::dup(top),
        other => other,
    }
}
