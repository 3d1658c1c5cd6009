//! Which units must stay until the services are frozen.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::systemctl::{self, Shown, SystemctlError};

/// Slices that nothing stops.
const LASTING_SLICES: [&str; 2] = ["-.slice", "system.slice"];

/// What Type=dbus makes a service require.
const BUS_SOCKET: &str = "dbus.socket";

/// File systems that go when the network or their server's process goes.
const SERVED: [&str; 10] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "9p",
    "afs",
    "glusterfs",
    "autofs",
    "virtiofs",
];

/// A unit that must stay.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Full name.
    pub id: String,
    /// Whether it is one of the services, not what one stands on.
    pub is_tagged: bool,
    /// Its unit file.
    pub fragment: Option<PathBuf>,
    /// Drop-ins in force.
    pub dropins: Vec<PathBuf>,
}

/// The services, their slices, the local mounts, and what mounts on demand.
pub(super) fn find(tagged: &[&str]) -> Result<Vec<Kept>, SystemctlError> {
    let services = show(tagged)?;
    let mut others = BTreeSet::new();
    for service in &services {
        others.extend(slices(&service.value("Slice")));
        if service.words("Requires").iter().any(|u| u == BUS_SOCKET) {
            others.insert(BUS_SOCKET.to_owned());
        }
    }
    let listed = systemctl::run(&[
        "list-units",
        "--type=mount,automount",
        "--state=active",
        "--plain",
        "--no-legend",
        "--full",
    ])?;
    let mounts = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    others.extend(mounts.map(str::to_owned));
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    let own = services.iter().map(|shown| kept(shown, true));
    let others = show(&others)?;
    let others = others.iter().filter(|shown| !is_left_to_systemd(shown));
    Ok(own.chain(others.map(|shown| kept(shown, false))).collect())
}

fn show(units: &[&str]) -> Result<Vec<Shown>, SystemctlError> {
    systemctl::show(
        units,
        &[
            "Id",
            "Slice",
            "Requires",
            "Conflicts",
            "FragmentPath",
            "DropInPaths",
            "Where",
            "Type",
        ],
    )
}

fn kept(shown: &Shown, is_tagged: bool) -> Kept {
    Kept {
        id: shown.value("Id"),
        is_tagged,
        fragment: Some(shown.value("FragmentPath"))
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        dropins: shown
            .words("DropInPaths")
            .iter()
            .map(PathBuf::from)
            .collect(),
    }
}

/// Mounts that nothing unmounts before the end, and those that should go.
fn is_left_to_systemd(shown: &Shown) -> bool {
    let id = shown.value("Id");
    // A namespace that has a copy would hold one that nobody else has.
    if id.ends_with(".automount") || !id.ends_with(".mount") {
        return false;
    }
    let (place, fstype) = (shown.value("Where"), shown.value("Type"));
    let stops = shown
        .words("Conflicts")
        .iter()
        .any(|u| u == "umount.target");
    let is_served = SERVED.contains(&fstype.as_str()) || fstype.starts_with("fuse");
    let is_session = ["/run/user/", "/run/credentials/"]
        .iter()
        .any(|dir| place.starts_with(dir));
    !stops || is_served || is_session
}

/// `a-b.slice` lies in `a.slice`.
fn slices(innermost: &str) -> Vec<String> {
    let stem = innermost.strip_suffix(".slice").unwrap_or_default();
    let ends = stem
        .match_indices('-')
        .map(|(at, _)| at)
        .filter(|at| *at > 0);
    let outer = ends.map(|at| format!("{}.slice", &stem[..at]));
    outer
        .chain([innermost.to_owned()])
        .filter(|slice| !slice.is_empty() && !LASTING_SLICES.contains(&slice.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outer_slices_are_named() {
        assert_eq!(slices("system.slice"), Vec::<String>::new());
        assert_eq!(slices("-.slice"), Vec::<String>::new());
        assert_eq!(
            slices("system-postgresql.slice"),
            ["system-postgresql.slice"]
        );
        assert_eq!(
            slices("a-b-c.slice"),
            ["a.slice", "a-b.slice", "a-b-c.slice"]
        );
    }

    #[test]
    fn local_mounts_are_kept() {
        let left = |place: &str, fstype: &str, conflicts: &str| {
            let text = format!("Id=x.mount\nWhere={place}\nType={fstype}\nConflicts={conflicts}\n");
            is_left_to_systemd(&Shown::parse_all(&text)[0])
        };
        assert!(!left("/var", "ext4", "umount.target"));
        assert!(!left("/tmp", "tmpfs", "umount.target"));
        assert!(left("/", "ext4", ""));
        assert!(left("/srv", "nfs4", "umount.target"));
        assert!(left("/srv", "fuse.sshfs", "umount.target"));
        assert!(left("/run/user/0", "tmpfs", "umount.target"));
    }
}
