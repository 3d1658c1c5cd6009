//! Services that cannot be carried are named before anything is touched.

use anyhow::{Context, Result, ensure};

use super::{Bench, DATA, Scenario, no_differences};
use crate::facts::Facts;
use crate::guest::{self, EXIT_REFUSED};
use crate::upgrade::command;
use crate::vm::{Crossing, Vm};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "refusal",
    shows: "what cannot be carried is refused by name, and everything runs on",
    slow: false,
    run: refusal,
}];

/// A descriptor each that no image can hold: the workload and a word that the
/// refusal has to use for it.
const HELD: [(&str, &str); 2] = [("polled-ring", "SQPOLL"), ("userfaultfd", "userfaultfd")];

fn refusal(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.tagged(bench.older())?;
    for (kind, word) in HELD {
        let unit = format!("holds-{kind}.service");
        guest::add_workload(&mut vm, &unit, kind)?;
        guest::tag(&mut vm, &[&unit])?;
        refused(bench, &mut vm, &unit, word)
            .with_context(|| format!("a unit that holds {kind}"))?;
        guest::untag(&mut vm, &[&unit])?;
        vm.exec(&["systemctl", "stop", &unit])?;
    }
    Ok(())
}

fn refused(bench: &Bench<'_>, vm: &mut Vm, unit: &str, word: &str) -> Result<()> {
    let before = Facts::gather(vm, DATA)?;
    let pid = vm.exec(&["systemctl", "show", "-P", "MainPID", unit])?;
    let Crossing::Returned(exit) = vm.exec_across(&command(bench.newer(), &[]), guest::PATIENCE)?
    else {
        anyhow::bail!("the upgrade went on");
    };
    ensure!(
        exit.code == Some(EXIT_REFUSED),
        "rcr-upgrade {}, not with {EXIT_REFUSED}",
        exit.how()
    );
    let said = exit.out() + &exit.err();
    for expected in [word, pid.as_str(), "fd "] {
        ensure!(
            said.contains(expected),
            "the refusal does not say {expected:?}: {said}"
        );
    }
    let check = vm.run(&["rcr", "check", unit])?;
    ensure!(!check.success(), "rcr check says nothing against {unit}");
    ensure!(
        (check.out() + &check.err()).contains(word),
        "rcr check: {} {}",
        check.out(),
        check.err()
    );
    untouched(vm, &before)
}

/// Nothing is frozen, loaded, reserved or restarted.
pub(super) fn untouched(vm: &mut Vm, before: &Facts) -> Result<()> {
    let after = Facts::gather(vm, DATA)?;
    no_differences(
        "after a run that changed nothing",
        &after.differences(before),
    )?;
    ensure!(after.boot_id == before.boot_id, "there was another boot");
    let loaded = vm.sh("cat /sys/kernel/kexec_loaded")?;
    ensure!(loaded == "0", "a kernel is still loaded");
    let frozen = vm.sh("cat /sys/fs/cgroup/system.slice/*/cgroup.freeze | sort -u")?;
    ensure!(frozen == "0", "something is still frozen: {frozen}");
    let pages = vm.sh("cat /proc/sys/vm/nr_hugepages")?;
    ensure!(pages == "0", "{pages} huge pages are still taken");
    let dropins = vm.sh(
        "find /run/systemd/system /run/systemd/system.control -name '*rcr*' 2>/dev/null || true",
    )?;
    ensure!(dropins.is_empty(), "left behind: {dropins}");
    Ok(())
}
