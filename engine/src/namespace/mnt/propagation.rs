//! Peer groups and slaves.

use std::os::fd::OwnedFd;

use rustix::mount::{MoveMountFlags, move_mount};

use super::assembly::{Assembly, Piece};
use super::build::{NOWHERE, place_of};
use super::schema::MountEntry;
use crate::namespace::NamespaceError;
use crate::namespace::sys::{Propagation, mount_setattr};

impl Assembly {
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
    pub fn leads(&self, m: &MountEntry) -> bool {
        m.group
            .is_none_or(|g| self.leader(g).is_none_or(|l| self.image.mounts[l] == *m))
    }

    /// Joins peer groups, leaders first.
    pub fn propagation(&self) -> Result<(), NamespaceError> {
        let each = || {
            self.image
                .mounts
                .iter()
                .zip(&self.pieces)
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
        let leader_of = |g: u32| self.leader(g).and_then(|l| self.pieces[l].as_ref());
        for (m, piece) in each() {
            if m.host_peer
                && let Some(from) = m.host.and_then(|h| self.host_places.get(&h))
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
}
