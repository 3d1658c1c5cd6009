//! Namespaces filled, saved, built again and compared.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::netlink::Netlink;
use super::{
    NetSource, addresses, build_nets, inside_net, links, neighbours, routes, save_nets, sysctls,
};
use crate::namespace::NamespaceError;
use crate::namespace::ids::NsKind;
use crate::namespace::make::make;
use crate::namespace::mnt::testing::Memory;

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}");
}

fn source(id: u32) -> NetSource {
    NetSource {
        id,
        ns: make(NsKind::Net, None).unwrap(),
        owner: 0,
        empty: false,
        external: None,
        pid: 1,
        comm: "test".into(),
    }
}

/// IFF_RUNNING and IFF_LOWER_UP, which the kernel sets when it comes to it.
const CARRIER: u32 = 0x1_0040;

/// IFA_F_TENTATIVE, until the kernel is sure that nobody else has the address.
const TENTATIVE: u8 = 0x40;

/// What can be told apart by looking.
fn picture() -> Result<Vec<String>, NamespaceError> {
    let mut nl = Netlink::route()?;
    let mut lines = Vec::new();
    for m in links::list(&mut nl)? {
        let l = links::Link(&m.body);
        lines.push(format!(
            "{} {} {} {:x} {} {:?} {:?}",
            l.index(),
            l.name(),
            l.kind(),
            l.flags() & !CARRIER,
            l.mtu(),
            l.tied(),
            l.master()
        ));
    }
    lines.extend(addresses::list(&mut nl)?.iter().map(|m| {
        let mut head = m.body[..8].to_vec();
        head[2] &= !TENTATIVE;
        format!("{head:?}")
    }));
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut all: Vec<_> = routes::list(&mut nl, family)?;
        all.sort_by(|a, b| a.body.cmp(&b.body));
        lines.extend(all.iter().map(|m| format!("{:?}", m.body)));
    }
    lines.extend(
        routes::list_rules(&mut nl)?
            .iter()
            .map(|m| format!("{:?}", m.body)),
    );
    lines.extend(neighbours::list(&mut nl)?.iter().map(|m| format!("{m:?}")));
    lines.extend(
        sysctls::list()?
            .iter()
            .map(|s| format!("{} {:?}", s.path, s.value)),
    );
    Ok(lines)
}

/// Addresses that the kernel gives by itself, and their routes, come in time.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What is there when nothing has changed for a while.
fn settled(source: &NetSource) -> Vec<String> {
    let look = || inside_net(source.ns.as_fd(), picture).unwrap();
    let end = Instant::now() + PATIENCE;
    let (mut last, mut same) = (look(), 0);
    while same < 20 && Instant::now() < end {
        std::thread::sleep(LOOK_AGAIN);
        let now = look();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

#[test]
fn devices_addresses_and_routes_come_back() {
    let (a, b) = (source(12), source(13));
    inside_net(a.ns.as_fd(), || {
        ip("link set lo up");
        ip("link add br0 type bridge forward_delay 0");
        ip("link add v0 index 7 type veth peer name v1");
        ip("link set v0 master br0");
        ip("link set v0 up");
        ip("link set v1 up");
        ip("link set br0 up mtu 1400");
        ip("address add 10.1.2.3/24 dev v1");
        ip("address add fd00::5/64 dev v1 nodad");
        ip("route add 192.0.2.0/24 via 10.1.2.1");
        ip("route add 198.51.100.0/24 via 192.0.2.9 table 77 onlink dev v1");
        ip("rule add from 10.1.2.3 table 77");
        ip("neighbour add 10.1.2.9 lladdr 02:00:00:00:00:01 dev v1 nud permanent");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/v1/rp_filter", "2").unwrap();
        Ok(())
    })
    .unwrap();
    let before = settled(&a);
    let mut images = Memory::default();
    let sources = [a, b];
    assert_eq!(save_nets(&sources, &mut images).unwrap(), []);
    let none = BTreeMap::new();
    let made = build_nets(&images, &BTreeMap::new(), &none, &[]).unwrap();
    let mut after = inside_net(made[&12].ns(), picture).unwrap();
    let end = Instant::now() + PATIENCE;
    while after != before && Instant::now() < end {
        std::thread::sleep(LOOK_AGAIN);
        after = inside_net(made[&12].ns(), picture).unwrap();
    }
    for (b, a) in before.iter().zip(&after) {
        assert_eq!(b, a);
    }
    assert_eq!(before.len(), after.len());
}
