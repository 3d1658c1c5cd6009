//! The harness itself, without the product.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Bench, DATA, Scenario};
use crate::facts::{Facts, REDIS_UNIT};
use crate::probe::{NGINX, Probe, REDIS};
use crate::vm::{Options, Vm};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "harness",
    shows: "a machine obeys, and a restart of Redis is noticed from outside",
    slow: false,
    run: harness,
}];

fn harness(bench: &Bench<'_>) -> Result<()> {
    let dir = bench.dir.join(bench.scenario);
    let mut vm = Vm::start(&Options {
        image: bench.image,
        kernel: bench.older(),
        accel: bench.accel,
        dir: &dir,
        payload: None,
        detached: false,
        cmpxchg16b: false,
    })?;
    commands(&mut vm)?;
    DATA.fill(vm.ports().redis)?;
    let before = Facts::gather(&mut vm, DATA)?;
    ensure!(
        before.kernel == bench.older().release,
        "the kernel is {}",
        before.kernel
    );
    ensure!(
        before.redis.keys == i64::from(DATA.keys),
        "{} keys",
        before.redis.keys
    );
    let redis = Probe::start(REDIS, vm.ports().redis);
    let nginx = Probe::start(NGINX, vm.ports().nginx);
    vm.sh(&format!(
        "systemctl stop {REDIS_UNIT}; sleep 1; systemctl start {REDIS_UNIT}"
    ))?;
    let after = Facts::gather(&mut vm, DATA)?;
    let (redis, nginx) = (redis.finish()?, nginx.finish()?);
    ensure!(
        redis.failures > 0,
        "the probe did not notice that redis was down"
    );
    ensure!(
        redis.longest_gap > Duration::from_millis(900),
        "silent for {:?}",
        redis.longest_gap
    );
    ensure!(
        redis.answers > 0 && nginx.answers > 0,
        "no answers: {redis:?} {nginx:?}"
    );
    let found = after.differences(&before).join("\n");
    for word in ["MainPID", "run_id"] {
        ensure!(
            found.contains(word),
            "a restart was not seen in {word}: {found}"
        );
    }
    ensure!(!found.contains("checksum"), "the data differ: {found}");
    ensure!(
        after.memory_difference(&before).is_none(),
        "MemTotal differs"
    );
    Ok(())
}

fn commands(vm: &mut Vm) -> Result<()> {
    let exit = vm.run_with(
        &["sh", "-c", "cat; echo err >&2; exit 5"],
        b"in\0put",
        Duration::from_secs(20),
    )?;
    ensure!(
        exit.code == Some(5) && exit.stdout.0 == b"in\0put" && exit.err() == "err",
        "{exit:?}"
    );
    let exit = vm.run_with(&["sleep", "100"], &[], Duration::from_millis(200))?;
    ensure!(exit.timed_out, "{exit:?}");
    ensure!(
        vm.run(&["/no/such/program"]).is_err(),
        "a missing program ran"
    );
    let data: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    vm.write_file("/root/data", &data, 0o600)?;
    ensure!(
        vm.read_file("/root/data")? == data,
        "a file came back different"
    );
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_secs();
    let guest: u64 = vm.exec(&["date", "+%s"])?.parse()?;
    ensure!(
        guest.abs_diff(host) <= 5,
        "the guest's clock is {guest}, the host's {host}"
    );
    Ok(())
}
