//! What connections need to be made again where no network is up yet.
//!
//! connect(2) wants a route to the peer and bind(2)'s address to be the
//! machine's own. In early boot there is neither. For the time of the restore
//! every address counts as ours, by a `local` route for all of them through the
//! loopback device, as `ip route add local default dev lo` makes it
//! (ip-route(8)). Sockets look their route up anew when routes change, so none
//! of them remembers. Meanwhile the lock must keep packets away: whoever is
//! spoken to would be the machine itself.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::wire::{self, Messages, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use crate::file::sys;
use crate::sys::SysResult;

// linux/rtnetlink.h, linux/if_link.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const TABLE_LOCAL: u8 = 255;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_HOST: u8 = 254;
const TYPE_LOCAL: u8 = 2;
/// Who made the route: a number that no routing daemon uses.
const PROTOCOL: u8 = 0x72;
/// The loopback device has this number in every network namespace.
const LOOPBACK: u32 = 1;
/// Behind whatever else there is.
const METRIC: u32 = 0xffff_0000;

/// Every address, or the one that is meant, is ours as long as this value lives.
#[derive(Debug)]
pub(crate) struct Footing {
    route: OwnedFd,
    families: Vec<i32>,
    only: Option<IpAddr>,
}

impl Footing {
    /// Brings the loopback device up and adds the routes. Where the kernel has
    /// no IPv6 that family does without.
    pub(crate) fn raise() -> SysResult<Self> {
        let route = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        let mut footing = Self {
            route,
            families: Vec::new(),
            only: None,
        };
        footing.loopback_up()?;
        for family in [libc::AF_INET, libc::AF_INET6] {
            match footing.add(family) {
                Err(e) if family == libc::AF_INET6 && no_family(e.errno) => {}
                other => other?,
            }
        }
        Ok(footing)
    }

    /// Makes one address ours.
    pub(crate) fn under(address: IpAddr) -> SysResult<Self> {
        let route = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        let mut footing = Self {
            route,
            families: Vec::new(),
            only: Some(address),
        };
        footing.loopback_up()?;
        footing.add(match address {
            IpAddr::V4(_) => libc::AF_INET,
            IpAddr::V6(_) => libc::AF_INET6,
        })?;
        Ok(footing)
    }

    fn loopback_up(&self) -> SysResult<()> {
        let mut m = Messages::default();
        let up = (libc::IFF_UP as u32).to_ne_bytes();
        let link = [[0; 4], LOOPBACK.to_ne_bytes(), up, up].concat();
        m.message(RTM_NEWLINK, NLM_F_ACK, 1, &link);
        self.ask("bring the loopback device up", m)
    }

    fn add(&mut self, family: i32) -> SysResult<()> {
        let m = self.local(family, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
        match self.ask("a route for addresses", m) {
            // Somebody's who died with it.
            Err(e) if e.errno != Errno::EEXIST => return Err(e),
            _ => self.families.push(family),
        }
        Ok(())
    }

    fn ask(&self, what: &str, m: Messages) -> SysResult<()> {
        wire::converse(self.route.as_fd(), what, &m.finish(), |_| Some(()))
    }

    /// Takes the routes away; the loopback device stays up, as every boot
    /// leaves it.
    pub(crate) fn lower(mut self) -> SysResult<()> {
        self.remove()
    }

    fn remove(&mut self) -> SysResult<()> {
        while let Some(family) = self.families.pop() {
            let m = self.local(family, RTM_DELROUTE, 0);
            self.ask("take the route for addresses away", m)?;
        }
        Ok(())
    }
}

impl Footing {
    /// A route by which addresses are local ones.
    fn local(&self, family: i32, message: u16, flags: u16) -> Messages {
        let scope = match family {
            libc::AF_INET => SCOPE_HOST,
            _ => SCOPE_UNIVERSE,
        };
        let only = match self.only {
            None => Vec::new(),
            Some(IpAddr::V4(ip)) => ip.octets().to_vec(),
            Some(IpAddr::V6(ip)) => ip.octets().to_vec(),
        };
        // struct rtmsg
        let mut route = vec![
            family as u8,
            8 * only.len() as u8,
            0,
            0,
            TABLE_LOCAL,
            PROTOCOL,
            scope,
            TYPE_LOCAL,
        ];
        route.extend([0; 4]);
        let mut m = Messages::default();
        m.message(message, flags | NLM_F_ACK, 1, &route)
            .attribute(RTA_OIF, &LOOPBACK.to_ne_bytes())
            .attribute(RTA_PRIORITY, &METRIC.to_ne_bytes());
        if !only.is_empty() {
            m.attribute(RTA_DST, &only);
        }
        m
    }
}

impl Drop for Footing {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            tracing::error!("every address still counts as this machine's: {e}");
        }
    }
}

fn no_family(e: Errno) -> bool {
    matches!(e, Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    use super::super::inet::{address, set_freebind};

    #[test]
    fn every_address_is_ours_for_a_while() {
        // A thread of its own, as the namespace is a thread's.
        let inside = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let v4 = |last| {
                address(
                    libc::AF_INET as u32,
                    &[u32::from_ne_bytes([192, 0, 2, last])],
                    9,
                )
            };
            let v6 = |last: u8| {
                let words = [u32::from_ne_bytes([0x20, 1, 0xd, 0xb8]), 0, 0];
                let last = u32::from_ne_bytes([0, 0, 0, last]);
                address(
                    libc::AF_INET6 as u32,
                    &[words[0], words[1], words[2], last],
                    9,
                )
            };
            let reach = |family, from: &[u8], to: &[u8]| -> SysResult<()> {
                let s = sys::socket(family, libc::SOCK_DGRAM, 0)?;
                set_freebind(s.as_fd(), family as u32, true).unwrap();
                sys::bind(s.as_fd(), from)?;
                sys::connect(s.as_fd(), to)
            };
            let both = || {
                [
                    reach(libc::AF_INET, &v4(1), &v4(2)).is_ok(),
                    reach(libc::AF_INET6, &v6(1), &v6(2)).is_ok(),
                ]
            };
            assert_eq!(both(), [false, false]);
            let footing = Footing::raise().unwrap();
            assert_eq!(both(), [true, true]);
            footing.lower().unwrap();
            assert_eq!(both(), [false, false]);
        };
        std::thread::spawn(inside).join().unwrap();
    }
}
