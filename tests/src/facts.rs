//! What can be said about the guest and its services at one moment, and what
//! must not change when the kernel does.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::dataset::Dataset;
use crate::probe::{self, NGINX, REDIS};
use crate::resp::{Client, Value};
use crate::vm::Vm;

/// Debian's Redis.
pub const REDIS_UNIT: &str = "redis-server.service";

/// Debian's nginx.
pub const NGINX_UNIT: &str = "nginx.service";

/// How long a service may take to answer once the guest has settled.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A service as systemd and the kernel see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Unit name.
    pub unit: String,
    /// `ActiveState=`.
    pub active: String,
    /// `MainPID=`, 0 if there is none.
    pub main_pid: u32,
    /// Every process of its cgroup, in order.
    pub pids: Vec<u32>,
}

/// Redis as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Redis {
    /// Random for each start of the server.
    pub run_id: String,
    /// Seconds since that start.
    pub uptime_s: u64,
    /// Keys in the database.
    pub keys: i64,
    /// Over their values.
    pub checksum: String,
}

/// Everything at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// `uname -r`.
    pub kernel: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// MemTotal of /proc/meminfo, in KiB.
    pub mem_total_kib: u64,
    /// The services, Redis first.
    pub services: Vec<Service>,
    /// Redis.
    pub redis: Redis,
}

impl Facts {
    /// Looks, once both services answer.
    ///
    /// # Errors
    /// When they do not, or the guest does not.
    pub fn gather(vm: &mut Vm, dataset: Dataset) -> Result<Facts> {
        let ports = vm.ports();
        probe::wait_for(REDIS, ports.redis, ANSWER_TIMEOUT)?;
        probe::wait_for(NGINX, ports.nginx, ANSWER_TIMEOUT)?;
        let boot = vm.boot()?;
        let meminfo = vm.sh("grep MemTotal /proc/meminfo")?;
        let mem_total_kib = meminfo
            .split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("MemTotal in {meminfo:?}"))?;
        let services = vec![
            Service::gather(vm, REDIS_UNIT)?,
            Service::gather(vm, NGINX_UNIT)?,
        ];
        let redis = Redis::gather(ports.redis, dataset)?;
        Ok(Facts {
            kernel: boot.kernel,
            boot_id: boot.id,
            mem_total_kib,
            services,
            redis,
        })
    }

    /// What is not as it was in `before` although it should be; empty if the
    /// services did not notice.
    pub fn differences(&self, before: &Facts) -> Vec<String> {
        let mut found = Vec::new();
        let mut same = |what: String, before: &dyn std::fmt::Debug, after: &dyn std::fmt::Debug| {
            let (before, after) = (format!("{before:?}"), format!("{after:?}"));
            if before != after {
                found.push(format!("{what} was {before}, is {after}"));
            }
        };
        for (old, new) in before.services.iter().zip(&self.services) {
            same(format!("{}: state", old.unit), &old.active, &new.active);
            same(
                format!("{}: MainPID", old.unit),
                &old.main_pid,
                &new.main_pid,
            );
            same(format!("{}: processes", old.unit), &old.pids, &new.pids);
        }
        same(
            "redis: run_id".into(),
            &before.redis.run_id,
            &self.redis.run_id,
        );
        same("redis: keys".into(), &before.redis.keys, &self.redis.keys);
        same(
            "redis: checksum".into(),
            &before.redis.checksum,
            &self.redis.checksum,
        );
        if self.redis.uptime_s < before.redis.uptime_s {
            found.push(format!(
                "redis: uptime_in_seconds was {}, is {}",
                before.redis.uptime_s, self.redis.uptime_s
            ));
        }
        found
    }

    /// MemTotal as a part of what it was, where it is more than 1% off.
    pub fn memory_difference(&self, before: &Facts) -> Option<String> {
        let (old, new) = (before.mem_total_kib, self.mem_total_kib);
        (old.abs_diff(new) > old / 100).then(|| format!("MemTotal was {old} KiB, is {new} KiB"))
    }
}

impl Service {
    /// Asks systemd.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn gather(vm: &mut Vm, unit: &str) -> Result<Service> {
        let shown = vm.exec(&[
            "systemctl",
            "show",
            "-p",
            "ActiveState",
            "-p",
            "MainPID",
            "-p",
            "ControlGroup",
            unit,
        ])?;
        let field = |name: &str| {
            shown
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_default()
                .to_owned()
        };
        let cgroup = field("ControlGroup");
        let mut pids = Vec::new();
        if !cgroup.is_empty() {
            let list = vm.sh(&format!("cat /sys/fs/cgroup{cgroup}/cgroup.procs"))?;
            pids = list.lines().map(str::parse).collect::<Result<_, _>>()?;
            pids.sort_unstable();
        }
        Ok(Service {
            unit: unit.to_owned(),
            active: field("ActiveState"),
            main_pid: field("MainPID").parse().context("MainPID")?,
            pids,
        })
    }
}

impl Redis {
    fn gather(port: u16, dataset: Dataset) -> Result<Redis> {
        let mut client = Client::connect(port, ANSWER_TIMEOUT)?;
        let Value::Bulk(info) = client.call(&[b"INFO", b"server"])? else {
            anyhow::bail!("INFO is no text");
        };
        let info = String::from_utf8(info)?;
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|value| value.trim().to_owned())
                .with_context(|| format!("INFO has no {name}"))
        };
        let (run_id, uptime_s) = (field("run_id")?, field("uptime_in_seconds")?.parse()?);
        let (keys, checksum) = dataset.checksum(port)?;
        Ok(Redis {
            run_id,
            uptime_s,
            keys,
            checksum,
        })
    }
}
