//! Network namespaces: what `ip(8)` shows before and after.

mod devices;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::conformance::case::Unavailable;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "network/empty",
        "a network namespace with nothing in it",
        empty,
    ),
    Case::new(
        "network/loopback",
        "lo up, with further addresses",
        loopback,
    ),
    Case::new(
        "network/sockets",
        "sockets of a network namespace: TCP, UDP, abstract unix",
        sockets,
    ),
    Case::new("network/veth", "a pair within one namespace", devices::veth),
    Case::new(
        "network/veth-between",
        "a pair between two namespaces of the tree",
        devices::veth_between,
    ),
    Case::new(
        "network/veth-host",
        "a pair whose other end is the host's",
        devices::veth_host,
    )
    .alone(),
    Case::new(
        "network/bridge",
        "a bridge with ports and settings of both",
        devices::bridge,
    ),
    Case::new("network/macvlan", "a macvlan on a pair", devices::macvlan),
    Case::new(
        "network/vxlan",
        "a vxlan with a forwarding entry",
        devices::vxlan,
    ),
    Case::new(
        "network/ifb",
        "an ifb device with another name and alias",
        devices::ifb,
    ),
    Case::new(
        "network/addresses",
        "IPv4 and IPv6 addresses with scopes, labels, lifetimes",
        addresses,
    ),
    Case::new(
        "network/routes",
        "routes of several tables, kinds, metrics and gateways",
        routes,
    ),
    Case::new("network/rules", "routing rules of both families", rules),
    Case::new(
        "network/neighbours",
        "permanent neighbours and proxies",
        neighbours,
    ),
    Case::new(
        "network/settings",
        "settings of the namespace and of its devices",
        settings,
    ),
    Case::new(
        "network/queueing",
        "queueing disciplines and classes",
        queueing,
    ),
    Case::new(
        "network/shared",
        "one namespace of several processes",
        shared,
    ),
    Case::new("network/two", "two namespaces with the same addresses", two),
    Case::new(
        "network/socket-left-behind",
        "a socket in a namespace that no process is in",
        left_behind,
    ),
    Case::new("network/ipsec", "an IPsec policy", ipsec).refused(),
    Case::new(
        "network/hardened",
        "as PrivateNetwork= with other sandboxing",
        hardened,
    ),
];

/// Runs `ip` with these words.
pub fn ip(args: &str) -> Result<()> {
    let out = Command::new("ip").args(args.split_whitespace()).output();
    let out = out.map_err(|e| Unavailable::because(format!("ip(8): {e}")))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        if said.contains("Unknown device type") || said.contains("not supported") {
            return Err(Unavailable::because(format!("ip {args}: {said}")));
        }
        bail!("ip {args}: {said}");
    }
    Ok(())
}

/// What `ip` and `tc` show, without what is measured.
fn seen(commands: &[&str]) -> Result<String> {
    let mut text = String::new();
    for c in commands {
        let (program, args) = c.split_once(' ').context("command")?;
        let out = Command::new(program)
            .args(args.split_whitespace())
            .output()
            .context("ip")?;
        ensure!(
            out.status.success(),
            "{c}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        let shown = String::from_utf8_lossy(&out.stdout);
        // The order of IPv6 routes of equal weight is that of carriers coming up.
        let mut lines: Vec<&str> = shown.lines().collect();
        if c.starts_with("ip -6 route") {
            lines.sort_unstable();
        }
        for line in lines {
            text += line;
            text += "\n";
        }
    }
    let measured = [
        "valid_lft",
        "preferred_lft",
        "expires",
        "gc_timer",
        "hello_timer",
        "tcn_timer",
    ];
    let lines = text.lines().map(|l| {
        let words = l.split_whitespace();
        let mut kept = Vec::new();
        let mut skip = false;
        for w in words {
            if skip {
                skip = false;
            } else if measured.contains(&w) {
                skip = true;
            } else {
                kept.push(w);
            }
        }
        kept.join(" ")
    });
    Ok(lines.map(|l| l + "\n").collect())
}

const ALL: [&str; 7] = [
    "ip -d link show",
    "ip address show",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip rule show",
    "ip -6 rule show",
    "ip neighbour show nud permanent",
];

/// Waits until IPv6 has settled: addresses and routes come a moment after the device.
fn settled(commands: &[&str]) -> Result<String> {
    let mut last = String::new();
    for _ in 0..100 {
        let now = seen(commands)?;
        if now == last && !now.contains("tentative") && !now.contains("LOWERLAYERDOWN") {
            return Ok(now);
        }
        last = now;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(last)
}

/// A program in a namespace of its own, filled by `ip` commands, that must look
/// the same afterwards.
fn filled(commands: &[&str], looks: &'static [&'static str]) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
    for c in commands {
        ip(c)?;
    }
    same(looks)
}

fn same(looks: &'static [&'static str]) -> Result<Check> {
    let before = settled(looks)?;
    Ok(Box::new(move |f: &mut Findings| {
        let after = settled(looks)?;
        for (b, a) in before.lines().zip(after.lines()) {
            f.same("a line", b, a);
        }
        f.same(
            "how many lines",
            &before.lines().count(),
            &after.lines().count(),
        );
        Ok(())
    }))
}

fn empty(_: &Stage) -> Result<Check> {
    filled(&[], &ALL)
}

fn loopback(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "link set lo mtu 9000",
        "address add 127.0.1.1/8 dev lo",
        "address add 10.99.0.1/32 dev lo",
        "address add fd00:99::1/128 dev lo",
        "address del ::1/128 dev lo",
    ];
    filled(&commands, &ALL)
}

fn sockets(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link set lo up")?;
    ip("address add 10.77.0.1/32 dev lo")?;
    let listener = TcpListener::bind("10.77.0.1:7700")?;
    let v6 = TcpListener::bind("[::1]:7701")?;
    let udp = UdpSocket::bind("10.77.0.1:7702")?;
    let name = b"\0rcr-conformance-net";
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
            &name[1..],
        );
    let unix = UnixListener::bind_addr(&address?)?;
    Ok(Box::new(move |f: &mut Findings| {
        for (l, to) in [(&listener, "10.77.0.1:7700"), (&v6, "[::1]:7701")] {
            let mut out = TcpStream::connect(to)?;
            let (mut inn, _) = l.accept()?;
            out.write_all(b"hello")?;
            let mut five = [0; 5];
            inn.read_exact(&mut five)?;
            f.same("over TCP", b"hello", &five);
        }
        let me = UdpSocket::bind("127.0.0.1:0")?;
        me.send_to(b"datagram", "10.77.0.1:7702")?;
        let mut room = [0; 20];
        let (n, _) = udp.recv_from(&mut room)?;
        f.same("over UDP", &b"datagram"[..], &room[..n]);
        let _out = std::os::unix::net::UnixStream::connect_addr(&unix.local_addr()?)?;
        unix.accept()?;
        Ok(())
    }))
}

fn addresses(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "link add e0 type veth peer name e1",
        "link set e0 up",
        "link set e1 up",
        "address add 10.20.0.1/24 broadcast 10.20.0.255 label e0:first dev e0",
        "address add 10.20.0.2/24 dev e0",
        "address add 10.21.0.1/30 scope link dev e0",
        "address add 10.22.0.1 peer 10.22.0.2/32 dev e0",
        "address add 10.23.0.1/24 valid_lft 9000 preferred_lft 8000 dev e0",
        "address add fd00:20::1/64 dev e0",
        "address add fd00:20::2/64 dev e0 nodad home",
        "address add fd00:21::1/64 noprefixroute dev e0",
        "address add fd00:22::1/128 preferred_lft 0 dev e0",
    ];
    filled(&commands, &ALL)
}

fn routes(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "link add e0 type veth peer name e1",
        "link set e0 up",
        "link set e1 up",
        "address add 10.30.0.1/24 dev e0",
        "address add fd00:30::1/64 dev e0 nodad",
        "route add default via 10.30.0.254 metric 100",
        "route add 10.40.0.0/16 via 10.30.0.2 mtu 1200 proto static",
        "route add 10.41.0.0/16 via 10.40.0.1 onlink dev e0",
        "route add blackhole 10.42.0.0/16",
        "route add unreachable 10.43.0.0/16 metric 7",
        "route add 10.44.0.0/16 nexthop via 10.30.0.3 weight 2 nexthop via 10.30.0.4 weight 1",
        "route add 10.45.0.0/16 src 10.30.0.1 dev e0 table 200 scope link",
        "route del 10.30.0.0/24 dev e0 src 10.30.0.1",
        "route add 10.30.0.0/24 dev e0 metric 55",
        "-6 route add default via fd00:30::fe metric 300",
        "-6 route add fd00:40::/48 via fd00:30::2 table 300",
        "-6 route add prohibit fd00:41::/48",
        "nexthop add id 5 via 10.30.0.9 dev e0",
        "route add 10.46.0.0/16 nhid 5",
    ];
    let all: &[&str] = &[
        "ip address show",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip nexthop show",
    ];
    filled(&commands, all)
}

fn rules(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "rule add from 10.0.0.0/8 table 100 priority 500",
        "rule add fwmark 0x10/0xff table 101",
        "rule add to 192.0.2.0/24 iif lo table 102",
        "rule del priority 32767",
        "rule add uidrange 1000-1999 prohibit",
        "-6 rule add from fd00::/8 table 103 priority 600",
    ];
    filled(&commands, &ALL)
}

fn neighbours(_: &Stage) -> Result<Check> {
    let commands = [
        "link add e0 type veth peer name e1",
        "link set e0 up",
        "link set e1 up",
        "address add 10.50.0.1/24 dev e0",
        "address add fd00:50::1/64 dev e0 nodad",
        "neighbour add 10.50.0.9 lladdr 02:00:00:00:00:09 dev e0 nud permanent",
        "neighbour add fd00:50::9 lladdr 02:00:00:00:00:19 dev e0 nud permanent",
        "neighbour add proxy 10.50.0.77 dev e0",
    ];
    let all: &[&str] = &[
        "ip address show",
        "ip neighbour show nud permanent",
        "ip neighbour show proxy",
    ];
    filled(&commands, all)
}

const SETTINGS: [(&str, &str); 9] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/ip_local_port_range", "20000\t30000"),
    ("ipv4/tcp_syncookies", "0"),
    ("ipv4/conf/all/rp_filter", "2"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/e0/proxy_arp", "1"),
    ("ipv6/conf/e1/disable_ipv6", "1"),
    ("ipv6/conf/e0/accept_ra", "0"),
    ("unix/max_dgram_qlen", "77"),
];

fn settings(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link add e0 type veth peer name e1")?;
    for (name, value) in SETTINGS {
        let path = format!("/proc/sys/net/{name}");
        fs::write(&path, value).with_context(|| path)?;
    }
    ip("link set e0 up")?;
    ip("link set e1 up")?;
    let mut looks = same(&ALL)?;
    Ok(Box::new(move |f: &mut Findings| {
        for (name, value) in SETTINGS {
            let now = fs::read_to_string(format!("/proc/sys/net/{name}"))?;
            f.same(name, value, now.trim());
        }
        looks(f)
    }))
}

fn queueing(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link add e0 type veth peer name e1")?;
    ip("link set e0 up")?;
    let tc = |args: &str| -> Result<()> {
        let out = Command::new("tc").args(args.split_whitespace()).output();
        let out = out.map_err(|e| Unavailable::because(format!("tc(8): {e}")))?;
        ensure!(
            out.status.success(),
            "tc {args}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(())
    };
    tc("qdisc add dev e0 root handle 1: htb default 20")?;
    tc("class add dev e0 parent 1: classid 1:1 htb rate 10mbit")?;
    tc("class add dev e0 parent 1:1 classid 1:20 htb rate 1mbit ceil 5mbit")?;
    tc("qdisc add dev e0 parent 1:20 handle 20: pfifo limit 33")?;
    tc("qdisc add dev e1 root handle 5: tbf rate 1mbit burst 10kb limit 100kb")?;
    let all: &[&str] = &["tc qdisc show", "tc class show dev e0"];
    same(all)
}

fn shared(_: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link set lo up")?;
    let listener = TcpListener::bind("127.0.0.1:7711")?;
    let member = Member::start("a child in the same namespace", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let out = TcpStream::connect("127.0.0.1:7711")?;
            f.that("connected", out.peer_addr()?.port() == 7711);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f: &mut Findings| {
        let theirs = fs::read_link(format!("/proc/{}/ns/net", member.pid))?;
        f.same(
            "the namespace",
            &fs::read_link("/proc/self/ns/net")?,
            &theirs,
        );
        member.check(f)?;
        listener.accept()?;
        Ok(())
    }))
}

fn two(_: &Stage) -> Result<Check> {
    let mut members = Vec::new();
    for n in 0..2 {
        members.push(Member::start(&format!("process {n}"), move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            ip("link set lo up")?;
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 7712))?;
            Ok(Box::new(move |f: &mut Findings| {
                let mut out = TcpStream::connect("127.0.0.1:7712")?;
                out.write_all(&[n])?;
                let mut one = [9];
                listener.accept()?.0.read_exact(&mut one)?;
                f.same("who answers", &n, &one[0]);
                Ok(())
            }) as Check)
        })?);
    }
    Ok(Box::new(move |f: &mut Findings| {
        let ns = |m: &Member| fs::read_link(format!("/proc/{}/ns/net", m.pid));
        f.that("they differ", ns(&members[0])? != ns(&members[1])?);
        members.iter().try_for_each(|m| m.check(f))
    }))
}

fn left_behind(_: &Stage) -> Result<Check> {
    let home = File::open("/proc/self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link set lo up")?;
    ip("address add 10.88.0.1/32 dev lo")?;
    let listener = TcpListener::bind("10.88.0.1:7788")?;
    nix::sched::setns(&home, CloneFlags::CLONE_NEWNET)?;
    drop(home);
    Ok(Box::new(move |f: &mut Findings| {
        f.same(
            "its address",
            "10.88.0.1:7788",
            listener.local_addr()?.to_string().as_str(),
        );
        f.that(
            "not reached from here",
            TcpStream::connect("10.88.0.1:7788").is_err(),
        );
        Ok(())
    }))
}

fn ipsec(stage: &Stage) -> Result<Check> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("xfrm policy add src 10.0.0.1/32 dst 10.0.0.2/32 dir out tmpl proto esp mode transport")?;
    let pid = std::process::id();
    let words = ["network namespace: IPsec", "not carried"].map(str::to_owned);
    stage.expect_refusal(&[&words[..], &[format!("pid {pid}")]].concat())?;
    Ok(Box::new(|f: &mut Findings| {
        f.that(
            "the policy",
            seen(&["ip xfrm policy show"])?.contains("10.0.0.2"),
        );
        Ok(())
    }))
}

fn hardened(_: &Stage) -> Result<Check> {
    let member = Member::start("the process without a network", || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
        let none: Option<&str> = None;
        let slave = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SLAVE;
        nix::mount::mount(none, "/", none, slave, none)?;
        // As systemd does: a /sys that shows the devices of the namespace.
        nix::mount::mount(
            Some("sysfs"),
            "/sys",
            Some("sysfs"),
            nix::mount::MsFlags::MS_RDONLY,
            none,
        )?;
        ip("link set lo up")?;
        ip("link add inner0 type veth peer name inner1")?;
        super::namespaces::become_a_service()?;
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (answered, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let _ = answered.send(TcpListener::bind("127.0.0.1:0").is_ok());
            }
        });
        Ok(Box::new(move |f: &mut Findings| {
            ask.send(())?;
            f.that("lo is up for a thread", answer.recv()?);
            let mut names = Vec::new();
            for e in fs::read_dir("/sys/class/net")? {
                names.push(e?.file_name().to_string_lossy().into_owned());
            }
            names.retain(|n| ["lo", "inner0", "inner1"].contains(&n.as_str()));
            names.sort();
            f.same(
                "devices in /sys",
                &["inner0", "inner1", "lo"].map(str::to_owned)[..],
                &names[..],
            );
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f: &mut Findings| member.check(f)))
}
