//! Network devices that sockets name by number: carried by name, since a device
//! may have another number when it comes back.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::home::at_home;
use crate::file::error::BuildError;
use crate::file::record::{RcrDevice, RcrSocket, RcrSocketOption};
use crate::image::schema::PacketSockEntry;
use crate::sys::{SysError, SysResult};

const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
/// `MCAST_JOIN_GROUP` and `MCAST_MSFILTER`, linux/in.h; the same at both levels.
const JOIN_GROUP: i32 = 42;
const SOURCE_FILTER: i32 = 48;
/// Where the scope stands in `struct sockaddr_in6`.
const SCOPE_AT: usize = 24;

/// How an option writes a number.
#[derive(Clone, Copy)]
enum Order {
    Native,
    Network,
}

/// Whether an option begins with a device's number.
fn order(o: &RcrSocketOption) -> Option<Order> {
    match (o.level, o.name) {
        (IP, libc::IP_UNICAST_IF) | (IP6, libc::IPV6_UNICAST_IF) => Some(Order::Network),
        (IP6, libc::IPV6_MULTICAST_IF) => Some(Order::Native),
        (IP | IP6, JOIN_GROUP | SOURCE_FILTER) => Some(Order::Native),
        _ => None,
    }
}

/// Replaces every number of a device.
fn each<E>(
    socket: &mut RcrSocket,
    packet: Option<&mut PacketSockEntry>,
    mut f: impl FnMut(u32) -> Result<u32, E>,
) -> Result<(), E> {
    let mut at = |bytes: &mut [u8], order: Order| -> Result<(), E> {
        let Ok(word) = <[u8; 4]>::try_from(&*bytes) else {
            return Ok(());
        };
        let was = match order {
            Order::Native => u32::from_ne_bytes(word),
            Order::Network => u32::from_be_bytes(word),
        };
        if was == 0 {
            return Ok(());
        }
        let is = f(was)?;
        bytes.copy_from_slice(&match order {
            Order::Native => is.to_ne_bytes(),
            Order::Network => is.to_be_bytes(),
        });
        Ok(())
    };
    for address in [&mut socket.local, &mut socket.peer].into_iter().flatten() {
        let v6 = address.starts_with(&(libc::AF_INET6 as u16).to_ne_bytes());
        if let Some(scope) = address.get_mut(SCOPE_AT..SCOPE_AT + 4).filter(|_| v6) {
            at(scope, Order::Native)?;
        }
    }
    for o in &mut socket.options {
        if let (Some(order), Some(number)) = (order(o), o.value.get_mut(..4)) {
            at(number, order)?;
        }
    }
    let Some(packet) = packet else {
        return Ok(());
    };
    let members = packet.mclist.iter_mut().map(|m| &mut m.index);
    for index in members.chain([&mut packet.ifindex]) {
        let mut bytes = index.to_ne_bytes();
        at(&mut bytes, Order::Native)?;
        *index = u32::from_ne_bytes(bytes);
    }
    Ok(())
}

/// Notes the names of all devices that a socket names by number.
pub(super) fn save(
    fd: BorrowedFd<'_>,
    socket: &mut RcrSocket,
    packet: Option<&mut PacketSockEntry>,
) -> SysResult<()> {
    let mut numbers = BTreeMap::new();
    let noted = each(socket, packet, |n| {
        numbers.insert(n, ());
        Ok::<_, SysError>(n)
    });
    noted?;
    if numbers.is_empty() {
        return Ok(());
    }
    let numbers: Vec<u32> = numbers.into_keys().collect();
    socket.devices = at_home(fd, || {
        let name = |&number: &u32| {
            // One that is gone can be named no more.
            let name = if_indextoname(number).ok()?.into_string().ok()?;
            Some(RcrDevice { number, name })
        };
        Ok(numbers.iter().filter_map(name).collect())
    })?;
    Ok(())
}

/// Puts the numbers in place that the devices have where the calling thread is.
pub(crate) fn renumber(
    socket: &mut RcrSocket,
    packet: Option<&mut PacketSockEntry>,
) -> Result<(), BuildError> {
    if socket.devices.is_empty() {
        return Ok(());
    }
    let mut now = BTreeMap::new();
    for d in std::mem::take(&mut socket.devices) {
        let number = if_nametoindex(d.name.as_str()).map_err(|e| match e {
            Errno::ENODEV | Errno::ENXIO => BuildError::Env {
                what: format!("network device {}", d.name),
                source: e.into(),
            },
            e => SysError::new("if_nametoindex", &d.name, e).into(),
        })?;
        now.insert(d.number, number);
    }
    each(socket, packet, |n| Ok(now.get(&n).copied().unwrap_or(n)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::sys;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_follow_the_name() {
        let mut local = vec![0; 28];
        local[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        local[SCOPE_AT..].copy_from_slice(&1u32.to_ne_bytes());
        let option = |level, name, value: u32| RcrSocketOption {
            level,
            name,
            value: value.to_ne_bytes().into(),
        };
        let unicast = option(IP, libc::IP_UNICAST_IF, 1u32.to_be());
        let member = option(IP6, JOIN_GROUP, 1);
        let ttl = option(IP, libc::IP_TTL, 1);
        let was = RcrSocket {
            local: Some(local),
            options: vec![unicast, member, ttl],
            ..RcrSocket::default()
        };
        let fd = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        let mut there = was.clone();
        save(fd.as_fd(), &mut there, None).unwrap();
        let loopback = RcrDevice {
            number: 1,
            name: "lo".into(),
        };
        assert_eq!(there.devices, [loopback]);
        // As if it had been the seventh.
        let devices = std::mem::take(&mut there.devices);
        each(&mut there, None, |_| Ok::<_, ()>(7)).unwrap();
        assert_ne!(there, was);
        there.devices = devices;
        there.devices[0].number = 7;
        let mut packet = PacketSockEntry {
            ifindex: 7,
            ..PacketSockEntry::default()
        };
        renumber(&mut there, Some(&mut packet)).unwrap();
        assert_eq!((there, packet.ifindex), (was, 1));
        let mut gone = RcrSocket {
            devices: vec![RcrDevice {
                number: 7,
                name: "no-such".into(),
            }],
            ..RcrSocket::default()
        };
        assert!(renumber(&mut gone, None).is_err());
    }
}
