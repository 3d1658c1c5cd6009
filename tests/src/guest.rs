//! Steps in the guest that demonstration and tests share.

use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::facts::{NGINX_UNIT, REDIS_UNIT};
use crate::vm::Vm;

/// What `rcr-upgrade` exits with when a service cannot be carried.
pub const EXIT_REFUSED: i32 = 3;

/// What the programs exit with when the input or the machine will not do.
pub const EXIT_ENVIRONMENT: i32 = 4;

/// What `rcr-upgrade` exits with after a failure that it undid.
pub const EXIT_ROLLED_BACK: i32 = 5;

/// For commands that are expected to come back.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Enables the product's units, as its package would, once the payload is
/// unpacked. The services are started anew: their processes then have ids from
/// above the range that early boot uses, as after a boot with rcr installed.
///
/// # Errors
/// When the guest cannot.
pub fn install_product(vm: &mut Vm) -> Result<()> {
    enable_product(vm)?;
    vm.exec(&["systemctl", "restart", REDIS_UNIT, NGINX_UNIT])?;
    Ok(())
}

/// Enables the product's units, as its package would.
///
/// # Errors
/// When the guest cannot.
pub fn enable_product(vm: &mut Vm) -> Result<()> {
    vm.sh("cd /usr/lib/systemd/system && systemctl daemon-reload && \
         systemctl enable --now $(grep -l '^\\[Install\\]' rcr-*.service)")?;
    Ok(())
}

/// Tags services.
///
/// # Errors
/// When one cannot be tagged.
pub fn tag(vm: &mut Vm, units: &[&str]) -> Result<()> {
    for unit in units {
        vm.exec(&["rcr", "tag", unit])?;
    }
    Ok(())
}

/// Removes services' tags.
///
/// # Errors
/// When one cannot be removed.
pub fn untag(vm: &mut Vm, units: &[&str]) -> Result<()> {
    for unit in units {
        vm.exec(&["rcr", "untag", unit])?;
    }
    Ok(())
}

/// Starts a service that runs the test workload `kind`.
///
/// # Errors
/// When it does not start.
pub fn add_workload(vm: &mut Vm, unit: &str, kind: &str) -> Result<()> {
    let text = format!("[Service]\nType=exec\nExecStart=/usr/local/lib/rcr-workload {kind}\n");
    vm.write_file(
        &format!("/etc/systemd/system/{unit}"),
        text.as_bytes(),
        0o644,
    )?;
    vm.exec(&["systemctl", "daemon-reload"])?;
    vm.exec(&["systemctl", "start", unit])?;
    Ok(())
}

/// Adds what the guest's own logs say to an error.
pub fn with_words(vm: &mut Vm, error: anyhow::Error) -> anyhow::Error {
    let script = "systemctl --failed --no-legend --plain; \
                  systemctl status --no-pager -n 15 redis-server nginx 'rcr-*'; \
                  journalctl -b --no-pager -o short-monotonic | grep -i rcr | tail -30";
    match vm.run(&["sh", "-c", script]) {
        Ok(exit) => anyhow!("{error:#}\nThe guest says:\n{}\n{}", exit.out(), exit.err()),
        Err(_) => error,
    }
}
