//! Settings below `/proc/sys`: all that can be read and written.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::schema::SettingEntry;
use crate::namespace::NamespaceError;

const NET: &str = "/proc/sys/net";

/// The settings of the network namespace the calling thread is in.
pub(super) fn list() -> Result<Vec<SettingEntry>, NamespaceError> {
    let mut found = Vec::new();
    walk(Path::new(NET), &mut found)?;
    found.sort_by(|a, b| order(a).cmp(&order(b)));
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<SettingEntry>) -> Result<(), NamespaceError> {
    let err = |e| NamespaceError::call("read", dir)(e);
    for entry in std::fs::read_dir(dir).map_err(err)? {
        let path = entry.map_err(err)?.path();
        // A device may go while we look; not in a frozen tree.
        let Ok(meta) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            walk(&path, found)?;
            continue;
        }
        if meta.mode() & 0o200 == 0 || meta.mode() & 0o400 == 0 {
            continue;
        }
        // Some cannot be read until they are set (stable_secret).
        let Ok(value) = std::fs::read(&path) else {
            continue;
        };
        let path = path
            .strip_prefix(NET)
            .unwrap_or(&path)
            .to_string_lossy()
            .into_owned();
        if !is_event(&path) {
            found.push(SettingEntry { path, value });
        }
    }
    Ok(())
}

/// Writing it does something at once, and the address generation of a device
/// is kept with the device.
fn is_event(path: &str) -> bool {
    let Some(rest) = path.strip_prefix("ipv6/conf/") else {
        return false;
    };
    rest.ends_with("/addr_gen_mode") && !rest.starts_with("all/") && !rest.starts_with("default/")
}

/// Those for all devices come before those for one, which they change.
fn order(s: &SettingEntry) -> (u8, &str) {
    let class = if s.path.contains("/all/") {
        1
    } else if s.path.contains("/default/") {
        2
    } else if s.path.contains("/conf/") || s.path.contains("/neigh/") {
        3
    } else {
        0
    };
    (class, &s.path)
}

/// Which settings to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// Before devices come up.
    Early,
    /// When all is there.
    All,
}

/// Gives the namespace the calling thread is in its settings.
pub(super) fn restore(wanted: &[SettingEntry], which: Which) -> Result<(), NamespaceError> {
    for s in wanted {
        // Connection tracking is set up by rules first.
        if which == Which::Early && s.path.starts_with("netfilter/") {
            continue;
        }
        let inside = |c: std::path::Component<'_>| matches!(c, std::path::Component::Normal(_));
        if !Path::new(&s.path).components().all(inside) {
            let what = format!("setting {:?} is none of {NET}", s.path);
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(NamespaceError::Netlink { what, source });
        }
        let path = Path::new(NET).join(&s.path);
        match std::fs::read(&path) {
            Ok(now) if now == s.value => continue,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if which == Which::All {
                    tracing::info!(path = s.path, "this kernel has no such setting");
                }
                continue;
            }
            _ => {}
        }
        std::fs::write(&path, &s.value).map_err(NamespaceError::call("write", &path))?;
    }
    Ok(())
}
