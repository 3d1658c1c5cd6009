//! Peers outside of the tree: what becomes of connections to them.

use crate::file::record::Fate;

/// A connection that leads out of the tree, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct OutsidePeer {
    /// The process that holds it, as the host sees it.
    pub pid: i32,
    /// Its name (`comm`).
    pub comm: String,
    /// The descriptor, for people.
    pub object: String,
    /// The peer's address.
    pub peer: String,
    /// What the restored process finds.
    pub becomes: Becomes,
}

/// What becomes of a connection to a peer outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Becomes {
    /// Connected again under the same identity: the journal's streams.
    Reconnected,
    /// As if the peer had closed it or gone away.
    Closed,
}

impl Becomes {
    pub(crate) fn of(fate: Fate) -> Option<Self> {
        match fate {
            Fate::Journal => Some(Becomes::Reconnected),
            Fate::Closed => Some(Becomes::Closed),
            Fate::Kept => None,
        }
    }
}

/// Servers that answer one question a connection, or say by closing it that the
/// client shall connect again, and whose clients in libc do: the name service
/// cache (nscd), name resolution and user records of systemd
/// (nss-resolve(8), nss-systemd(8)).
const REOPENED: &[&str] = &[
    "/run/nscd/socket",
    "/var/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/userdb/",
];

/// Message buses: who is cut off from one loses its name there and the calls
/// under way, and mostly ends.
const BUSES: &[&str] = &["/run/dbus/", "/var/run/dbus/", "/run/user/"];

/// Whether clients of this server connect again when it closes.
pub(crate) fn is_reopened(address: &str) -> bool {
    begins_with(address, REOPENED)
}

/// What to do about a connection that stands in the way.
pub(crate) fn advice(address: &str) -> &'static str {
    if begins_with(address, BUSES) {
        "the bus starts anew with the machine and its clients do not connect again: untag the unit"
    } else {
        "stop the other side, allow such connections to be closed, or untag the unit"
    }
}

/// Names that end with a slash stand for everything below them.
fn begins_with(address: &str, names: &[&str]) -> bool {
    names.iter().any(|name| match name.ends_with('/') {
        true => address.starts_with(name),
        false => address == *name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_whose_clients_come_back_are_known() {
        assert!(is_reopened("/var/run/nscd/socket"));
        assert!(is_reopened("/run/systemd/userdb/io.systemd.DynamicUser"));
        assert!(!is_reopened("/run/nscd/socket2"));
        assert!(!is_reopened("/run/dbus/system_bus_socket"));
        assert!(advice("/run/dbus/system_bus_socket").contains("bus"));
    }
}
