//! Upgrades that work.

use anyhow::{Result, bail, ensure};

use super::{Bench, DATA, Scenario, no_differences};
use crate::facts::{Facts, REDIS_UNIT, Service};
use crate::guest;
use crate::upgrade::{UPGRADE_TIMEOUT, Upgrade, status};
use crate::vm::image::Kernel;
use crate::vm::{Crossing, Vm};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "up-and-again",
        shows: "old to new, new to new right after, then an ordinary restart",
        slow: false,
        run: up_and_again,
    },
    Scenario {
        name: "down",
        shows: "new to old",
        slow: false,
        run: down,
    },
    Scenario {
        name: "same",
        shows: "old to old",
        slow: false,
        run: same,
    },
    Scenario {
        name: "systemctl-kexec",
        shows: "a kernel that is merely loaded, then plain systemctl kexec",
        slow: false,
        run: systemctl_kexec,
    },
];

fn up_and_again(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    upgrade(&mut vm, bench.newer())?;
    upgrade(&mut vm, bench.newer())?;
    restart_is_ordinary(&mut vm)
}

fn down(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.newer())?;
    upgrade(&mut vm, bench.older())
}

fn same(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    upgrade(&mut vm, bench.older())
}

fn systemctl_kexec(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    let before = Facts::gather(&mut vm, DATA)?;
    let kernel = bench.newer();
    vm.exec(&[
        "rcr-upgrade",
        "--load",
        "--kernel",
        &format!("/boot/vmlinuz-{}", kernel.release),
        "-y",
    ])?;
    match vm.exec_across(&["systemctl", "kexec"], UPGRADE_TIMEOUT)? {
        Crossing::Jumped(_) => {}
        Crossing::Returned(exit) => bail!("systemctl kexec {}: {}", exit.how(), exit.err()),
    }
    let state = vm.wait_settled()?;
    let after = Facts::gather(&mut vm, DATA)?;
    let mut differences = after.differences(&before);
    differences.extend(after.memory_difference(&before));
    no_differences("after systemctl kexec", &differences)?;
    ensure!(
        after.kernel == kernel.release,
        "the kernel is {}",
        after.kernel
    );
    ensure!(state == "running", "the system is {state}");
    let status = status(&mut vm)?;
    ensure!(status["outcome"] == "carried", "rcr status says {status}");
    Ok(())
}

/// One upgrade after which everything is as before.
pub(super) fn upgrade(vm: &mut Vm, kernel: &Kernel) -> Result<()> {
    let upgrade = Upgrade::run(vm, kernel, DATA, &[])?;
    println!(
        "    {} -> {}: silent for {} ms (redis), {} ms (nginx); {:.1} s in all",
        upgrade.before.kernel,
        upgrade.after.kernel,
        upgrade.redis.longest_gap.as_millis(),
        upgrade.nginx.longest_gap.as_millis(),
        upgrade.elapsed.as_secs_f64()
    );
    for told in &upgrade.held {
        println!(
            "    a held connection: {} answers, the longest wait {} ms",
            told.answers,
            told.longest.as_millis()
        );
    }
    let differences = upgrade.differences(kernel);
    no_differences("after the upgrade", &differences).map_err(|error| guest::with_words(vm, error))
}

/// Restarting, stopping, starting and dying are systemd's business again.
fn restart_is_ordinary(vm: &mut Vm) -> Result<()> {
    let before = Facts::gather(vm, DATA)?;
    vm.exec(&["systemctl", "restart", REDIS_UNIT])?;
    let after = Facts::gather(vm, DATA)?;
    let (old, new) = (&before.services[0], &after.services[0]);
    ensure!(
        old.main_pid != new.main_pid,
        "a restart left MainPID {}",
        old.main_pid
    );
    ensure!(
        before.redis.run_id != after.redis.run_id,
        "a restart left redis' run_id"
    );
    ensure!(
        after.redis.checksum == before.redis.checksum,
        "redis lost data in an ordinary restart"
    );
    let program = vm.sh(&format!("readlink /proc/{}/exe", new.main_pid))?;
    ensure!(
        program.contains("redis"),
        "after a restart MainPID runs {program}"
    );
    let helper = vm.sh("systemctl show -p ExecStart -p DropInPaths redis-server")?;
    ensure!(
        !helper.contains("rcr-adopt"),
        "the adoption is still in force: {helper}"
    );
    vm.sh(&format!("kill -9 {}", new.main_pid))?;
    let died = vm.sh(&format!(
        "for i in $(seq 600); do p=$(systemctl show -P MainPID {REDIS_UNIT}); \
         [ $p != 0 ] && [ $p != {} ] && exit 0; sleep 0.1; done; exit 1",
        new.main_pid
    ));
    ensure!(died.is_ok(), "Restart= did not bring redis back");
    vm.exec(&["systemctl", "stop", REDIS_UNIT])?;
    let stopped = Service::gather(vm, REDIS_UNIT)?;
    ensure!(
        stopped.main_pid == 0 && stopped.active == "inactive",
        "after a stop: {stopped:?}"
    );
    vm.exec(&["systemctl", "start", REDIS_UNIT])?;
    Ok(())
}
