//! Wrong arguments and machines that are not ready: a clear error each, before
//! anything is touched.

use anyhow::{Context, Result, bail, ensure};

use super::refusals::untouched;
use super::{Bench, DATA, Scenario};
use crate::facts::{Facts, NGINX_UNIT, REDIS_UNIT};
use crate::guest;
use crate::vm::{Crossing, Vm};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "bad-input",
    shows: "each kind of bad input is told apart before anything is touched",
    slow: false,
    run: bad_input,
}];

/// Less than the workload `ballast` takes once it has filled its memory, more
/// than the machine then has left.
const BALLAST_BYTES: u64 = 2_300_000_000;

/// One wrong thing.
struct Case<'a> {
    what: &'a str,
    /// Makes it so.
    before: &'a str,
    /// The command.
    argv: Vec<&'a str>,
    /// Makes it right again.
    after: &'a str,
    /// What the message has to mention, whatever the case of letters.
    says: &'a [&'a str],
}

fn bad_input(bench: &Bench<'_>) -> Result<()> {
    let mut vm = bench.bare(bench.older())?;
    DATA.fill(vm.ports().redis)?;
    let good = format!("/boot/vmlinuz-{}", bench.newer().release);
    let initrd = format!("/boot/initrd.img-{}", bench.newer().release);
    let upgrade = |kernel| vec!["rcr-upgrade", "--kernel", kernel, "-y"];
    let list = "/etc/rcr/services.list";
    let both = format!("mkdir -p /etc/rcr && printf '{REDIS_UNIT}\\n{NGINX_UNIT}\\n' >{list}");

    let untagged = Case {
        what: "no tagged services",
        before: "rm -f /etc/rcr/services.list",
        argv: upgrade(&good),
        after: &both,
        says: &["tag"],
    };
    let unknown = Case {
        what: "a tagged unit that does not exist",
        before: &format!("{both}; echo nosuch.service >>{list}"),
        argv: upgrade(&good),
        after: &both,
        says: &["nosuch.service"],
    };
    let stopped = Case {
        what: "a tagged unit that is not running",
        before: &format!(
            "cp /usr/lib/systemd/system/{NGINX_UNIT} /run/systemd/system/idle.service; \
             systemctl daemon-reload; {both}; echo idle.service >>{list}"
        ),
        argv: upgrade(&good),
        after: &format!("rm /run/systemd/system/idle.service; systemctl daemon-reload; {both}"),
        says: &["idle.service", "not running"],
    };
    let cases = [
        untagged,
        unknown,
        stopped,
        Case {
            what: "tagging a unit that does not exist",
            before: "",
            argv: vec!["rcr", "tag", "nosuch.service"],
            after: "",
            says: &["nosuch.service"],
        },
        Case {
            what: "no such kernel",
            before: "",
            argv: upgrade("/boot/vmlinuz-none"),
            after: "",
            says: &["/boot/vmlinuz-none"],
        },
        Case {
            what: "a kernel that is none",
            before: "",
            argv: upgrade("/etc/passwd"),
            after: "",
            says: &["/etc/passwd", "bzimage"],
        },
        Case {
            what: "no initrd for that kernel",
            before: &format!("mv {initrd} /root/initrd"),
            argv: upgrade(&good),
            after: &format!("mv /root/initrd {initrd}"),
            says: &[&initrd, "update-initramfs"],
        },
        Case {
            what: "not root",
            before: "",
            argv: [
                vec![
                    "setpriv",
                    "--reuid=65534",
                    "--regid=65534",
                    "--clear-groups",
                ],
                upgrade(&good),
            ]
            .concat(),
            after: "",
            says: &["root"],
        },
        Case {
            what: "too little memory",
            before: &format!(
                "{both}; echo ballast.service >>{list}; \
                 until [ $(systemctl show -P MemoryCurrent ballast) -gt {BALLAST_BYTES} ]; \
                 do sleep 0.2; done"
            ),
            argv: upgrade(&good),
            after: &format!("systemctl stop ballast; {both}"),
            says: &["mib", "memory"],
        },
        // Cannot be undone, so it comes last.
        Case {
            what: "kexec is disabled",
            before: "echo 1 >/proc/sys/kernel/kexec_load_disabled",
            argv: upgrade(&good),
            after: "",
            says: &["kexec_load_disabled"],
        },
    ];
    let mut wrong = Vec::new();
    for case in cases {
        if case.what == "too little memory" {
            guest::add_workload(&mut vm, "ballast.service", "ballast")?;
        }
        let before = Facts::gather(&mut vm, DATA)?;
        if let Err(error) = try_case(&mut vm, &case) {
            wrong.push(format!("{}: {error:#}", case.what));
        }
        vm.sh(&format!("true; {}", case.after))?;
        untouched(&mut vm, &before).with_context(|| case.what.to_owned())?;
    }
    super::no_differences("bad input", &wrong)
}

fn try_case(vm: &mut Vm, case: &Case<'_>) -> Result<()> {
    vm.sh(&format!("true; {}", case.before))?;
    let exit = match vm.exec_across(&case.argv, guest::PATIENCE)? {
        Crossing::Returned(exit) => exit,
        Crossing::Jumped(_) => bail!("the upgrade went on"),
    };
    let said = format!("{}\n{}", exit.out(), exit.err());
    let code = Some(guest::EXIT_ENVIRONMENT);
    ensure!(
        exit.code == code,
        "it {}, not with {code:?}: {said}",
        exit.how()
    );
    ensure!(!said.contains("panicked"), "it panicked: {said}");
    for word in case.says {
        let found = said.to_lowercase().contains(&word.to_lowercase());
        ensure!(found, "the message does not mention {word:?}: {said}");
    }
    Ok(())
}
