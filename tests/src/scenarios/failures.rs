//! Failures at each stage, on either side of the jump.

use anyhow::{Context, Result, bail, ensure};

use super::refusals::untouched;
use super::{Bench, DATA, Scenario, journeys};
use crate::facts::{Facts, NGINX_UNIT, REDIS_UNIT};
use crate::guest::{self, EXIT_ROLLED_BACK};
use crate::upgrade::{UPGRADE_TIMEOUT, command, status};
use crate::vm::{Crossing, Vm};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "failure-before-the-jump",
        shows: "a failure before the rest stops leaves everything running, and the next try works",
        slow: false,
        run: before_the_jump,
    },
    Scenario {
        name: "failure-at-the-gate",
        shows: "when everything else has stopped, a failure ends in a cold start and a report",
        slow: false,
        run: at_the_gate,
    },
    Scenario {
        name: "failure-behind-the-jump",
        shows: "a damaged store or a failing restore gives an ordinary start and a report",
        slow: false,
        run: behind_the_jump,
    },
    Scenario {
        name: "each-stage-behind-the-jump",
        shows: "the same for each stage of early boot",
        slow: true,
        run: each_stage_behind,
    },
];

/// The stages at which `rcr-upgrade --fail-at` can be made to fail before the
/// transition begins.
const STAGES: [&str; 3] = ["prepare", "load", "jump"];

/// Those behind it, with the services that start cold by a failure there.
const AT_THE_GATE: [(&str, &[&str]); 2] = [
    ("freeze", &[REDIS_UNIT, NGINX_UNIT]),
    ("seal", &[REDIS_UNIT, NGINX_UNIT]),
];

fn before_the_jump(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    let before = Facts::gather(&mut vm, DATA)?;
    for stage in STAGES {
        let argv = command(bench.newer(), &["--fail-at", stage]);
        let Crossing::Returned(exit) = vm.exec_across(&argv, UPGRADE_TIMEOUT)? else {
            bail!("a failure at {stage} did not stop the upgrade");
        };
        let said = format!("{}\n{}", exit.out(), exit.err());
        ensure!(
            !exit.success(),
            "a failure at {stage} ended with success:\n{said}"
        );
        let code = Some(EXIT_ROLLED_BACK);
        ensure!(
            exit.code == code,
            "a failure at {stage} {}, not {code:?}:
{said}",
            exit.how()
        );
        untouched(&mut vm, &before)
            .with_context(|| format!("after a failure at {stage}:\n{said}"))?;
        let status = status(&mut vm)?;
        ensure!(
            status["outcome"] == "failed",
            "after a failure at {stage}, rcr status says {status}"
        );
    }
    journeys::upgrade(&mut vm, bench.newer())
}

fn at_the_gate(bench: &Bench<'_>) -> Result<()> {
    behind(bench, &AT_THE_GATE)
}

/// What goes wrong behind the jump, and which services start cold by it.
const BEHIND: [(&str, &[&str]); 3] = [
    ("corrupt-store", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:crash", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:restore:nginx.service", &[NGINX_UNIT]),
];

/// The same for every stage of early boot; a hang takes as long as it may.
const BEHIND_SLOW: [(&str, &[&str]); 7] = [
    ("early:find", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:verify", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:prepare", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:restore", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:consume", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:resume", &[REDIS_UNIT, NGINX_UNIT]),
    ("early:hang", &[REDIS_UNIT, NGINX_UNIT]),
];

fn behind_the_jump(bench: &Bench<'_>) -> Result<()> {
    behind(bench, &BEHIND)
}

fn each_stage_behind(bench: &Bench<'_>) -> Result<()> {
    behind(bench, &BEHIND_SLOW)
}

fn behind(bench: &Bench<'_>, faults: &[(&str, &[&str])]) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    for (fault, cold) in faults {
        cold_start(bench, &mut vm, fault, cold)
            .map_err(|error| guest::with_words(&mut vm, error))
            .with_context(|| (*fault).to_owned())?;
    }
    Ok(())
}

/// The boot goes on, the services run, and the report says why they are new.
fn cold_start(bench: &Bench<'_>, vm: &mut Vm, fault: &str, cold: &[&str]) -> Result<()> {
    let before = Facts::gather(vm, DATA)?;
    let argv = command(bench.newer(), &["--fail-at", fault]);
    match vm.exec_across(&argv, UPGRADE_TIMEOUT)? {
        Crossing::Jumped(_) => {}
        Crossing::Returned(exit) => bail!("rcr-upgrade came back ({}): {}", exit.how(), exit.out()),
    }
    let state = vm.wait_settled()?;
    let after = Facts::gather(vm, DATA)?;
    ensure!(state == "running", "the system is {state}");
    ensure!(
        after.kernel == bench.newer().release,
        "the kernel is {}",
        after.kernel
    );
    for (old, new) in before.services.iter().zip(&after.services) {
        ensure!(new.active == "active", "{new:?}");
        if !cold.contains(&new.unit.as_str()) {
            ensure!(old == new, "it should have been kept: {old:?} {new:?}");
        }
    }
    let redis_is_new = before.redis.run_id != after.redis.run_id;
    ensure!(
        redis_is_new == cold.contains(&REDIS_UNIT),
        "redis: {:?}, {:?}",
        before.redis,
        after.redis
    );
    if let Some(difference) = after.memory_difference(&before) {
        bail!("{difference}");
    }
    let status = status(vm)?;
    ensure!(
        status["outcome"] == "cold-start",
        "rcr status says {status}"
    );
    ensure!(
        status["reason"] != "",
        "rcr status gives no reason: {status}"
    );
    let journal = vm.sh("journalctl -b --no-pager | grep -i rcr || true")?;
    ensure!(journal.contains("cold"), "the journal says: {journal}");
    println!("    {fault}: {}", status["reason"]);
    Ok(())
}
