//! Devices of a network namespace.

use super::{ALL, filled, ip, same, settled};
use crate::conformance::case::Unavailable;
use crate::conformance::{Check, Findings, Member, Stage};
use anyhow::{Result, ensure};
use nix::sched::{CloneFlags, unshare};
use std::process::Command;

pub(super) fn veth(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "link add left index 11 address 02:00:00:00:00:0a type veth peer name right",
        "link set left mtu 1400 txqueuelen 77",
        "link set right alias the-right-one",
        "link property add dev right altname another-name-of-right",
        "link set left up",
        "link set right up",
        "address add 10.1.0.1/24 dev left",
        "address add 10.1.0.2/24 dev right",
    ];
    filled(&commands, &ALL)
}

/// A process in a namespace of its own.
pub(super) fn separate(name: &str, commands: &'static [&'static str]) -> Result<Member> {
    Member::start(name, move || filled(commands, &ALL))
}

pub(super) fn veth_between(_: &Stage) -> Result<Check> {
    let a = separate("the first", &["link set lo up"])?;
    let b = separate("the second", &["link set lo up"])?;
    let inside = |pid: i32, args: &str| -> Result<()> {
        let out = Command::new("nsenter")
            .args(["-t", &pid.to_string(), "-n", "ip"])
            .args(args.split_whitespace())
            .output()
            .map_err(|e| Unavailable::because(format!("nsenter(1): {e}")))?;
        ensure!(
            out.status.success(),
            "{args}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(())
    };
    let make = format!("link add here type veth peer name there netns {}", b.pid);
    inside(a.pid, &make)?;
    for (pid, dev, address) in [
        (a.pid, "here", "10.5.0.1/24"),
        (b.pid, "there", "10.5.0.2/24"),
    ] {
        inside(pid, &format!("link set {dev} up"))?;
        inside(pid, &format!("address add {address} dev {dev}"))?;
    }
    let look = |pid: i32| -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for what in ["-d link show", "address show", "route show table all"] {
            let out = Command::new("nsenter")
                .args(["-t", &pid.to_string(), "-n", "ip"])
                .args(what.split_whitespace())
                .output()?;
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            lines.extend(
                text.lines()
                    .filter(|l| !l.contains("_lft"))
                    .map(str::to_owned),
            );
        }
        Ok(lines)
    };
    let look = move || -> Result<(Vec<String>, Vec<String>)> {
        let mut last = (Vec::new(), Vec::new());
        for _ in 0..100 {
            let now = (look(a.pid)?, look(b.pid)?);
            let moving = |l: &String| {
                l.contains("tentative")
                    || l.contains("qdisc noqueue state UNKNOWN mode") && !l.contains("lo:")
            };
            if now == last && !now.0.iter().chain(&now.1).any(moving) {
                return Ok(now);
            }
            last = now;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(last)
    };
    let before = look()?;
    Ok(Box::new(move |f: &mut Findings| {
        let after = look()?;
        for (b, a) in [(&before.0, &after.0), (&before.1, &after.1)] {
            for (b, a) in b.iter().zip(a) {
                f.same("a line", b, a);
            }
            f.same("how many lines", &b.len(), &a.len());
        }
        Ok(())
    }))
}

pub(super) fn veth_host(_: &Stage) -> Result<Check> {
    let member = Member::start("the process with a way out", || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        ip("link set lo up")?;
        ip("link add rcr-in type veth peer name rcr-out")?;
        ip("link set rcr-out up")?;
        ip("link set rcr-out netns 1")?;
        ip("address add 10.66.0.2/24 dev rcr-in")?;
        ip("link set rcr-in up")?;
        // Moving a device takes it down.
        let up = ["-t", "1", "-n", "ip", "link", "set", "rcr-out", "up"];
        ensure!(
            Command::new("nsenter").args(up).status()?.success(),
            "nsenter"
        );
        same(&ALL)
    });
    let member = member?;
    let outside = |args: &str| ip(args);
    // Of a run before this one.
    let _ = outside("link del rcr-bridge");
    outside("link add rcr-bridge type bridge")?;
    outside("link set rcr-bridge up")?;
    outside("link set rcr-out master rcr-bridge")?;
    outside("link set rcr-out up mtu 1450")?;
    outside("address add 10.66.0.1/24 dev rcr-out")?;
    let looks: &[&str] = &["ip address show dev rcr-out", "ip route show dev rcr-out"];
    let before = settled(looks)?;
    Ok(Box::new(move |f: &mut Findings| {
        member.check(f)?;
        let after = settled(looks)?;
        let number = |t: &str| t.split_once(": ").map(|(_, r)| r.to_owned());
        f.same("the host's end", &number(&before), &number(&after));
        Ok(())
    }))
}

pub(super) fn bridge(_: &Stage) -> Result<Check> {
    let commands = [
        "link set lo up",
        "link add br0 address 02:00:00:00:00:05 type bridge forward_delay 200 ageing_time 20000 priority 4096",
        "link add p1 type veth peer name q1",
        "link add p2 type veth peer name q2",
        "link set p1 master br0",
        "link set p2 master br0",
        "link set dev p1 type bridge_slave cost 50 hairpin on isolated on",
        "link set p1 up",
        "link set p2 up",
        "link set q1 up",
        "link set br0 up",
        "address add 10.8.0.1/24 dev br0",
    ];
    let all: &[&str] = &[
        "ip -d link show",
        "ip address show",
        "ip -4 route show table all",
    ];
    filled(&commands, all)
}

pub(super) fn macvlan(_: &Stage) -> Result<Check> {
    let commands = [
        "link add low type veth peer name other",
        "link set low up",
        "link set other up",
        "link add link low name mv0 type macvlan mode bridge",
        "link set mv0 up",
        "address add 10.9.0.1/24 dev mv0",
    ];
    filled(&commands, &ALL)
}

pub(super) fn vxlan(_: &Stage) -> Result<Check> {
    let commands = [
        "link add low type veth peer name other",
        "link set low up",
        "link set other up",
        "address add 10.10.0.1/24 dev low",
        "link add vx0 type vxlan id 42 local 10.10.0.1 remote 10.10.0.2 dstport 4789 dev low ttl 5",
        "link set vx0 up",
        "address add 10.11.0.1/24 dev vx0",
    ];
    filled(&commands, &ALL)
}

pub(super) fn ifb(_: &Stage) -> Result<Check> {
    let commands = [
        "link add redirect0 type ifb",
        "link set redirect0 alias shaped mtu 1300 up",
    ];
    filled(&commands, &ALL)
}
