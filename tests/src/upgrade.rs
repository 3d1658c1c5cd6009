//! One upgrade of a machine with both services tagged, seen from all sides.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::dataset::Dataset;
use crate::facts::Facts;
use crate::guest;
use crate::held::{self, Held, Told};
use crate::probe::{NGINX, Probe, REDIS, Seen};
use crate::vm::image::Kernel;
use crate::vm::{Crossing, Vm};

/// How long an upgrade may take from the command to the new boot's agent.
pub const UPGRADE_TIMEOUT: Duration = Duration::from_secs(420);

/// Answers that a held connection must give after the upgrade.
const MORE_ANSWERS: u64 = 20;

/// An upgrade that ended in another boot.
pub struct Upgrade {
    /// The moment before.
    pub before: Facts,
    /// After the new boot had settled.
    pub after: Facts,
    /// What Redis' clients met.
    pub redis: Seen,
    /// What nginx' clients met.
    pub nginx: Seen,
    /// What clients met that held a connection all the time.
    pub held: Vec<Told>,
    /// `rcr status --json` after the boot.
    pub status: Value,
    /// `systemctl is-system-running` after the boot.
    pub system_state: String,
    /// From the command to the settled boot.
    pub elapsed: Duration,
}

/// What runs the upgrade in the guest: the program's words also go to the
/// console, where they can be followed while no agent answers.
pub fn command(kernel: &Kernel, more: &[&str]) -> Vec<String> {
    let script = "set -o pipefail; rcr-upgrade \"$@\" 2>&1 | tee /dev/ttyS0";
    let kernel = format!("/boot/vmlinuz-{}", kernel.release);
    let mut argv: Vec<String> = ["bash", "-c", script, "upgrade", "--kernel", &kernel, "-y"]
        .map(str::to_owned)
        .to_vec();
    argv.extend(more.iter().map(|argument| (*argument).to_owned()));
    argv
}

impl Upgrade {
    /// Goes to `kernel` and looks before and after.
    ///
    /// # Errors
    /// When no new boot comes of it, or the guest cannot be asked.
    pub fn run(vm: &mut Vm, kernel: &Kernel, dataset: Dataset, more: &[&str]) -> Result<Upgrade> {
        let before = Facts::gather(vm, dataset)?;
        let ports = vm.ports();
        let redis = Probe::start(REDIS, ports.redis);
        let nginx = Probe::start(NGINX, ports.nginx);
        let mut held = vec![
            Held::open("redis", ports.redis, held::redis)?,
            Held::open("nginx", ports.nginx, held::nginx)?,
        ];
        let start = Instant::now();
        let crossing = vm.exec_across(&command(kernel, more), UPGRADE_TIMEOUT);
        let (after, status, system_state, elapsed) = match crossing {
            Ok(Crossing::Jumped(_)) => {
                let system_state = vm.wait_settled()?;
                held.iter_mut().for_each(Held::look_from_here);
                let elapsed = start.elapsed();
                let after = Facts::gather(vm, dataset);
                let after = after.map_err(|error| guest::with_words(vm, error))?;
                (after, status(vm)?, system_state, elapsed)
            }
            Ok(Crossing::Returned(exit)) => {
                bail!(
                    "rcr-upgrade came back ({}):\n{}\n{}",
                    exit.how(),
                    exit.out(),
                    exit.err()
                )
            }
            Err(error) => return Err(error),
        };
        let (redis, nginx) = (redis.finish()?, nginx.finish()?);
        let held: Result<Vec<Told>> = held.into_iter().map(|h| h.finish(MORE_ANSWERS)).collect();
        let held = held.map_err(|error| guest::with_words(vm, error))?;
        Ok(Upgrade {
            before,
            after,
            redis,
            nginx,
            held,
            status,
            system_state,
            elapsed,
        })
    }

    /// Everything that is not as an upgrade promises; empty if all is well.
    pub fn differences(&self, kernel: &Kernel) -> Vec<String> {
        let mut found = self.after.differences(&self.before);
        found.extend(self.after.memory_difference(&self.before));
        if self.after.kernel != kernel.release {
            found.push(format!(
                "the kernel is {}, not {}",
                self.after.kernel, kernel.release
            ));
        }
        if self.status["outcome"] != "carried" {
            found.push(format!(
                "rcr status says {}: {}",
                self.status["outcome"], self.status["reason"]
            ));
        }
        if self.system_state != "running" {
            found.push(format!("the system is {}", self.system_state));
        }
        found
    }

    /// The probes' longest silence.
    pub fn blackout(&self) -> Duration {
        self.redis.longest_gap.max(self.nginx.longest_gap)
    }
}

/// `rcr status --json`.
///
/// # Errors
/// When it fails or prints something else.
pub fn status(vm: &mut Vm) -> Result<Value> {
    let exit = vm.run(&["rcr", "status", "--json"])?;
    serde_json::from_slice(&exit.stdout.0).with_context(|| {
        format!(
            "`rcr status --json` printed {:?} {:?}",
            exit.out(),
            exit.err()
        )
    })
}
