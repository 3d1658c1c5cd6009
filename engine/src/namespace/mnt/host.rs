//! The host's own mounts: those that early boot has not made yet and a
//! restored service needs are mounted first, as they were. Whoever mounts them
//! later finds them in place.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, move_mount};

use super::MountPolicy;
use super::create::Recipe;
use super::mountinfo::MountInfo;
use super::plan::{can_mount_again, host_entry, is_block};
use super::schema::{HostMountEntry, HostMountsEntry};
use crate::image::{ImageSink, ImageSource, Kind, get_records, put_records};
use crate::namespace::NamespaceError;
use crate::namespace::sys::{Propagation, mount_setattr};
use crate::namespace::view::{MountView, open_path};

const IMAGE: &str = "rcr-host-mounts.img";

/// Saves which mounts of the host any service needs: file systems on block
/// devices, and tmpfs ones, where files may be open.
pub fn save_host(policy: &MountPolicy, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
    let host = MountView::own()?;
    let mut hosts = Vec::new();
    for h in &host.mounts {
        let wanted = is_block(h) || h.fstype == "tmpfs";
        let place = h.mountpoint.as_os_str();
        if wanted && place != "/" && can_mount_again(h, &host.mounts, policy) {
            let links = device_links(h)?;
            hosts.push(HostMountEntry {
                create: true,
                links,
                ..host_entry(h)
            });
        }
    }
    let entry = HostMountsEntry { hosts };
    Ok(put_records(sink, Kind::RcrNamespaces, IMAGE, &[entry])?)
}

/// Mounts what [`save_host`] recorded and this host lacks.
///
/// The places that could not be mounted are returned with the reason: only
/// who has files there knows how bad that is.
pub fn prepare_host(
    source: &dyn ImageSource,
) -> Result<Vec<(PathBuf, NamespaceError)>, NamespaceError> {
    let entries: Vec<HostMountsEntry> = get_records(source, Kind::RcrNamespaces, IMAGE)?;
    let mut failed = Vec::new();
    for h in entries.iter().flat_map(|e| &e.hosts) {
        if let Err(e) = ensure(h) {
            failed.push((mountpoint(h).to_owned(), e));
        }
    }
    Ok(failed)
}

pub(super) fn mountpoint(h: &HostMountEntry) -> &Path {
    Path::new(OsStr::from_bytes(&h.mountpoint))
}

/// Mounts `h` on the host unless something of its type is mounted there.
pub(super) fn ensure(h: &HostMountEntry) -> Result<(), NamespaceError> {
    let host = MountView::own()?;
    if let Some((present, place)) = find(&host.mounts, h)? {
        if h.shared && present.shared.is_none() {
            mount_setattr(&place, false, None, Some(Propagation::Shared))
                .map_err(NamespaceError::call("mount_setattr", &present.mountpoint))?;
        }
        return Ok(());
    }
    if !h.create {
        return Ok(());
    }
    let at = mountpoint(h);
    let device = device(h);
    let recipe = Recipe {
        fstype: &h.fstype,
        source: device.as_os_str(),
        options: &h.options,
        seen: at,
    };
    let mount = recipe.mount()?;
    recipe.seal(&mount)?;
    mount_setattr(&mount, false, Some(h.attrs), None)
        .map_err(NamespaceError::call("mount_setattr", at))?;
    if let Err(e) = std::fs::create_dir(at)
        && e.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(NamespaceError::call("mkdir", at)(e));
    }
    let place = open_path(at)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&mount, "", &place, "", flags).map_err(NamespaceError::call("move_mount", at))?;
    if h.shared {
        mount_setattr(&mount, false, None, Some(Propagation::Shared))
            .map_err(NamespaceError::call("mount_setattr", at))?;
    }
    tracing::info!(path = %at.display(), fstype = h.fstype, "mounted early");
    Ok(())
}

/// The mount that the path of `h` leads to, if it is of the same type.
pub(super) fn find<'a>(
    mounts: &'a [MountInfo],
    h: &HostMountEntry,
) -> Result<Option<(&'a MountInfo, OwnedFd)>, NamespaceError> {
    let at = mountpoint(h);
    if !mounts.iter().any(|m| m.mountpoint == at) {
        return Ok(None);
    }
    let place = open_path(at)?;
    let stat = statx(&place, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(NamespaceError::call("statx", at))?;
    let top = mounts.iter().find(|m| u64::from(m.id) == stat.stx_mnt_id);
    let same = top.filter(|m| m.mountpoint == at && m.fstype == h.fstype);
    Ok(same.map(|m| (m, place)))
}

/// The device to mount: by a name that does not depend on the order of
/// discovery if there is one, else as it was.
fn device(h: &HostMountEntry) -> PathBuf {
    let paths = h
        .links
        .iter()
        .chain([&h.source])
        .map(|p| PathBuf::from(OsStr::from_bytes(p)));
    let was = PathBuf::from(OsStr::from_bytes(&h.source));
    paths
        .into_iter()
        .find(|p| p.starts_with("/dev") && p.exists())
        .unwrap_or(was)
}

/// Lasting names of the block device a file system is on.
pub(super) fn device_links(m: &MountInfo) -> Result<Vec<Vec<u8>>, NamespaceError> {
    let dir = "/dev/disk/by-uuid";
    if !is_block(m) {
        return Ok(Vec::new());
    }
    let Ok(device) = std::fs::canonicalize(&m.source) else {
        return Ok(Vec::new());
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(NamespaceError::call("readdir", dir)(e)),
    };
    let paths = entries.flatten().map(|e| e.path());
    let same = paths.filter(|p| std::fs::canonicalize(p).is_ok_and(|t| t == device));
    Ok(same.map(|p| p.as_os_str().as_bytes().to_vec()).collect())
}
