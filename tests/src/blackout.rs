//! For how long clients outside a machine hear nothing, and what ten upgrades
//! leave of its memory.
//!
//! One machine goes from kernel to the same kernel again and again with Redis
//! tagged; another one enters it by plain kexec, and Redis starts the ordinary
//! way from its file. The probe is the same.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::dataset::Dataset;
use crate::facts::{Facts, NGINX_UNIT, REDIS_UNIT};
use crate::guest;
use crate::probe::{Probe, REDIS};
use crate::resp::Client;
use crate::row::Row;
use crate::upgrade::{UPGRADE_TIMEOUT, Upgrade};
use crate::vm::image::{Image, Kernel};
use crate::vm::qemu::Accel;
use crate::vm::{Crossing, Options, Vm};

/// What of the memory of a tagged service is what its data are checked by.
const DATA: Dataset = Dataset::SMALL;

/// Bytes of a value that only takes memory.
const BALLAST: usize = 64 << 10;

const FILL: &[u8] = b"for i = ARGV[1], ARGV[2] - 1 do \
      redis.call('SET', 'ballast:' .. i, string.rep(string.char(65 + i % 26), ARGV[3])) \
    end \
    return redis.status_reply('OK')";

const LOADER: &str = "/usr/local/lib/rcr-plain-kexec";

/// What machines are made from.
pub struct Machines<'a> {
    /// The cached image.
    pub image: &'a Image,
    /// KVM or emulation.
    pub accel: Accel,
    /// The product, packed.
    pub payload: &'a Path,
    /// Their directories are made in here.
    pub dir: &'a Path,
}

/// What a chain of upgrades showed.
struct Chain {
    silent_ms: Vec<f64>,
    mem_total_mib: (f64, f64),
}

impl Machines<'_> {
    /// Measures all of it, `samples` times each.
    ///
    /// # Errors
    /// When a machine does not start, or an upgrade is not what it promises.
    pub fn rows(&self, samples: usize, done: &mut dyn FnMut(Row)) -> Result<()> {
        let small = self.carried(64, samples)?;
        let cold = self.cold(64, samples)?;
        let row = Row::compare("blackout redis 64 MiB", "ms", &small.silent_ms, &cold, 2.0);
        done(row.noting("peer: plain kexec until it answers"));
        let large = self.carried(1024, samples)?;
        let (ours, peer) = (&large.silent_ms, &small.silent_ms);
        let row = Row::compare("blackout redis 1024 MiB", "ms", ours, peer, 1.0 / 1.2);
        done(row.noting("peer: ours with 64 MiB"));
        let (before, after) = small.mem_total_mib;
        let name = format!("MemTotal before, and after {samples} upgrades");
        done(Row::compare(name, "MiB", &[before], &[after], 0.99).noting("ours: before"));
        Ok(())
    }

    fn start(&self, name: &str) -> Result<Vm> {
        Vm::start(&Options {
            image: self.image,
            kernel: self.kernel(),
            accel: self.accel,
            dir: &self.dir.join(name),
            payload: Some(self.payload),
            detached: false,
            cmpxchg16b: false,
        })
    }

    fn kernel(&self) -> &Kernel {
        self.image.newest()
    }

    /// Upgrades in a row with Redis tagged.
    fn carried(&self, mib: usize, samples: usize) -> Result<Chain> {
        let mut vm = self.start("blackout")?;
        guest::install_product(&mut vm)?;
        fill(&vm, mib)?;
        guest::tag(&mut vm, &[REDIS_UNIT, NGINX_UNIT])?;
        let mut silent_ms = Vec::new();
        let mut mem_total = None;
        for _ in 0..samples {
            let upgrade = Upgrade::run(&mut vm, self.kernel(), DATA, &[])?;
            let differences = upgrade.differences(self.kernel());
            if !differences.is_empty() {
                let error = anyhow::anyhow!("{}", differences.join("\n"));
                return Err(guest::with_words(&mut vm, error));
            }
            silent_ms.push(millis(upgrade.redis.longest_gap));
            let before = mem_total.map_or(upgrade.before.mem_total_kib, |(first, _)| first);
            mem_total = Some((before, upgrade.after.mem_total_kib));
        }
        vm.stop()?;
        let (before, after) = mem_total.context("no samples")?;
        let mib = |kib: u64| kib as f64 / 1024.0;
        Ok(Chain {
            silent_ms,
            mem_total_mib: (mib(before), mib(after)),
        })
    }

    /// The same kernel entered by plain kexec, nothing of ours in force.
    fn cold(&self, mib: usize, samples: usize) -> Result<Vec<f64>> {
        let mut vm = self.start("blackout-cold")?;
        fill(&vm, mib)?;
        Client::connect(vm.ports().redis, guest::PATIENCE)?.call(&[b"SAVE"])?;
        let release = self.kernel().release.clone();
        let (kernel, initrd) = (
            format!("/boot/vmlinuz-{release}"),
            format!("/boot/initrd.img-{release}"),
        );
        let mut silent = Vec::new();
        for _ in 0..samples {
            let before = Facts::gather(&mut vm, DATA)?;
            vm.exec(&[LOADER, &kernel, &initrd])?;
            let probe = Probe::start(REDIS, vm.ports().redis);
            match vm.exec_across(&["systemctl", "kexec"], UPGRADE_TIMEOUT)? {
                Crossing::Jumped(_) => {}
                Crossing::Returned(exit) => bail!("systemctl kexec {}: {}", exit.how(), exit.err()),
            }
            vm.wait_settled()?;
            let after = Facts::gather(&mut vm, DATA)?;
            silent.push(millis(probe.finish()?.longest_gap));
            ensure!(
                after.redis.run_id != before.redis.run_id && after.boot_id != before.boot_id,
                "a plain kexec left redis' run_id or the boot as it was"
            );
        }
        vm.stop()?;
        Ok(silent)
    }
}

/// Fills Redis with the data that are checked and with others up to `mib`.
fn fill(vm: &Vm, mib: usize) -> Result<()> {
    let port = vm.ports().redis;
    DATA.fill(port)?;
    let mut client = Client::connect(port, guest::PATIENCE)?;
    // It would fork a child to save some time later.
    client.call(&[b"CONFIG", b"SET", b"save", b""])?;
    let per_call = (1 << 20) / BALLAST;
    for first in (0..mib * per_call).step_by(per_call) {
        let range = [first, first + per_call, BALLAST].map(|n| n.to_string());
        let [first, last, len] = range.each_ref().map(|n| n.as_bytes());
        client.call(&[b"EVAL", FILL, b"0", first, last, len])?;
    }
    Ok(())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
