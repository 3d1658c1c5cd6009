//! What a namespace is built from: the sources of binds on the host, and the
//! service's own file systems.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;
use rustix::thread::LinkNameSpaceType;

use super::build::{place_of, root_of};
use super::create::Recipe;
use super::mountinfo::MountInfo;
use super::schema::{MountEntry, MountsEntry};
use super::{Beside, HostEnv, host, nodes};
use crate::content::restore_tree;
use crate::image::ImageSource;
use crate::namespace::NamespaceError;
use crate::namespace::view::{MountView, within};

/// Makes what binds show on the host, and the places in it that are mounted
/// on, where they are not there after a boot.
pub(super) fn make_sources(
    image: &MountsEntry,
    env: &HostEnv,
    source: &dyn ImageSource,
) -> Result<(), NamespaceError> {
    let mounts = MountView::own()?.mounts;
    for m in &image.mounts {
        if !m.way.is_empty()
            && let Some(top) = host_root(image, m, &mounts)?
        {
            let content = m.tree.as_deref().map(|tree| (tree, source));
            nodes::make(&top, &root_of(m, image, env), &m.way, content)?;
        }
        let Some(above) = m.parent.map(|p| &image.mounts[p as usize]) else {
            continue;
        };
        if !m.place_way.is_empty()
            && let Some(top) = host_root(image, above, &mounts)?
        {
            let place = place_of(m)
                .strip_prefix(place_of(above))
                .unwrap_or(place_of(m));
            let path = root_of(above, image, env).join(place);
            nodes::make(&top, &path, &m.place_way, None)?;
        }
    }
    Ok(())
}

/// The root of the host mount that `m` shows a part of; none if that is not there and need not be.
fn host_root(
    image: &MountsEntry,
    m: &MountEntry,
    mounts: &[MountInfo],
) -> Result<Option<OwnedFd>, NamespaceError> {
    let Some(h) = m.host.map(|h| &image.hosts[h as usize]) else {
        return Ok(None);
    };
    match host::find(mounts, h)? {
        Some((_, top)) => Ok(Some(top)),
        None if m.optional => Ok(None),
        None => {
            let path = host::mountpoint(h).to_owned();
            Err(NamespaceError::HostMount {
                fstype: h.fstype.clone(),
                path,
            })
        }
    }
}

/// Makes the service's own file systems, with their content, attached nowhere;
/// none where a process has to be there first.
pub(super) fn make_own(
    image: &MountsEntry,
    source: &dyn ImageSource,
    beside: &Beside<'_>,
) -> Result<Vec<Option<OwnedFd>>, NamespaceError> {
    let mut made = Vec::new();
    for (at, own) in image.owns.iter().enumerate() {
        if own.pid_ns_of.is_some() {
            made.push(None);
            continue;
        }
        let shows = image.mounts.iter().find(|m| m.own == Some(at as u32));
        let seen = shows.map_or(Path::new(""), |m| {
            Path::new(OsStr::from_bytes(&m.mountpoint))
        });
        let device = OsStr::from_bytes(&own.source);
        let recipe = Recipe {
            fstype: &own.fstype,
            source: device,
            options: &own.options,
            seen,
        };
        let mount = match own.fstype.as_str() {
            "sysfs" => within(beside.net, LinkNameSpaceType::Network, || recipe.mount())?,
            "mqueue" => within(
                beside.ipc,
                LinkNameSpaceType::InterProcessCommunication,
                || recipe.mount(),
            )?,
            _ => recipe.mount()?,
        };
        for tree in &own.trees {
            let root = make_dirs(&mount, Path::new(OsStr::from_bytes(&tree.root)))?;
            restore_tree(source, &tree.tree, root.as_fd())
                .map_err(NamespaceError::content(seen))?;
        }
        recipe.seal(&mount)?;
        made.push(Some(mount));
    }
    Ok(made)
}

/// Makes a directory below a mount's root and opens it.
pub(super) fn make_dirs(top: &OwnedFd, path: &Path) -> Result<OwnedFd, NamespaceError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |dir: &OwnedFd, name: &OsStr| openat(dir, name, flags, Mode::empty());
    let mut dir = open(top, OsStr::new(".")).map_err(NamespaceError::call("open", path))?;
    for name in path {
        match mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(NamespaceError::call("mkdir", path)(e)),
        }
        dir = open(&dir, name).map_err(NamespaceError::call("open", path))?;
    }
    Ok(dir)
}
