//! Failures at each stage, on either side of the jump.

use anyhow::{Context, Result, bail, ensure};

use super::refusals::untouched;
use super::{Bench, DATA, Scenario, journeys};
use crate::facts::Facts;
use crate::guest::{self, EXIT_REFUSED};
use crate::upgrade::{UPGRADE_TIMEOUT, command, status};
use crate::vm::Crossing;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "failure-before-the-jump",
        shows: "a failure at any stage leaves everything running, and the next try works",
        slow: false,
        run: before_the_jump,
    },
    Scenario {
        name: "corrupt-store",
        shows: "a store that is damaged on the way gives an ordinary start and a report",
        slow: false,
        run: corrupt_store,
    },
];

/// The stages at which `rcr-upgrade --fail-at` can be made to fail.
const STAGES: [&str; 6] = ["prepare", "load", "freeze", "dump", "seal", "jump"];

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
        ensure!(
            exit.code != Some(EXIT_REFUSED),
            "a failure at {stage} looks like a refusal:\n{said}"
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

fn corrupt_store(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    let before = Facts::gather(&mut vm, DATA)?;
    let argv = command(bench.newer(), &["--fail-at", "corrupt-store"]);
    match vm.exec_across(&argv, UPGRADE_TIMEOUT)? {
        Crossing::Jumped(_) => {}
        Crossing::Returned(exit) => bail!("rcr-upgrade came back ({}): {}", exit.how(), exit.out()),
    }
    let state = vm.wait_settled()?;
    ensure!(state == "running", "the system is {state}");
    let after = Facts::gather(&mut vm, DATA).map_err(|error| guest::with_words(&mut vm, error))?;
    ensure!(
        after.kernel == bench.newer().release,
        "the kernel is {}",
        after.kernel
    );
    ensure!(
        after
            .services
            .iter()
            .all(|service| service.active == "active"),
        "{:?}",
        after.services
    );
    ensure!(
        after.redis.run_id != before.redis.run_id,
        "redis was restored from a damaged store"
    );
    if let Some(difference) = after.memory_difference(&before) {
        bail!("{difference}");
    }
    let status = status(&mut vm)?;
    ensure!(
        status["outcome"] == "cold-start",
        "rcr status says {status}"
    );
    ensure!(
        status["reason"] != "",
        "rcr status gives no reason: {status}"
    );
    let journal = vm.sh("journalctl -b --no-pager | grep -i rcr || true")?;
    ensure!(
        journal.contains("cold") || journal.contains("checksum"),
        "the journal says: {journal}"
    );
    Ok(())
}
