//! The tests on machines. Each scenario starts a machine of its own (resumed
//! from a snapshot, so this is cheap), and fails with the first thing that is
//! not as it should be.

mod bad_input;
mod failures;
mod harness;
mod journeys;
mod refusals;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::dataset::Dataset;
use crate::facts::{NGINX_UNIT, REDIS_UNIT};
use crate::guest;
use crate::vm::image::{Image, Kernel};
use crate::vm::qemu::Accel;
use crate::vm::{Options, Vm};

/// One test.
pub struct Scenario {
    /// Name on the command line and in the report.
    pub name: &'static str,
    /// What it shows, in one line.
    pub shows: &'static str,
    /// Left out unless asked for.
    pub slow: bool,
    run: fn(&Bench<'_>) -> Result<()>,
}

/// Every scenario, in the order they are run.
pub fn all() -> Vec<Scenario> {
    [
        harness::SCENARIOS,
        journeys::SCENARIOS,
        refusals::SCENARIOS,
        failures::SCENARIOS,
        bad_input::SCENARIOS,
    ]
    .into_iter()
    .flat_map(|list| list.iter().map(Scenario::copy))
    .collect()
}

impl Scenario {
    fn copy(&self) -> Scenario {
        Scenario {
            name: self.name,
            shows: self.shows,
            slow: self.slow,
            run: self.run,
        }
    }

    /// Runs it and says how long it took.
    pub fn run(&self, bench: &Bench<'_>) -> (Result<()>, Duration) {
        let start = Instant::now();
        let result = (self.run)(&Bench {
            scenario: self.name,
            ..*bench
        });
        (result, start.elapsed())
    }
}

/// What scenarios make their machines from.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    /// The cached image.
    pub image: &'a Image,
    /// KVM or emulation.
    pub accel: Accel,
    /// The product, packed.
    pub payload: &'a Path,
    /// Machines' directories are made in here.
    pub dir: &'a Path,
    /// The scenario that runs now.
    pub scenario: &'static str,
}

/// What both services are filled with in most scenarios.
const DATA: Dataset = Dataset::SMALL;

impl Bench<'_> {
    /// A machine with the product in it and nothing tagged.
    fn bare(&self, kernel: &Kernel) -> Result<Vm> {
        let dir: PathBuf = self.dir.join(self.scenario);
        let mut vm = Vm::start(&Options {
            image: self.image,
            kernel,
            accel: self.accel,
            dir: &dir,
            payload: Some(self.payload),
            detached: false,
            cmpxchg16b: false,
        })?;
        guest::install_product(&mut vm)?;
        Ok(vm)
    }

    /// A machine with both services tagged and data in Redis.
    fn tagged(&self, kernel: &Kernel) -> Result<Vm> {
        let mut vm = self.bare(kernel)?;
        DATA.fill(vm.ports().redis)?;
        vm.sh(PATIENT_NGINX)?;
        guest::tag(&mut vm, &[REDIS_UNIT, NGINX_UNIT])?;
        Ok(vm)
    }

    fn older(&self) -> &Kernel {
        self.image.oldest()
    }

    fn newer(&self) -> &Kernel {
        self.image.newest()
    }
}

/// An emulated machine may be silent for longer than nginx waits for the next
/// request on a connection, and a held connection asks more than it allows.
const PATIENT_NGINX: &str = "printf 'keepalive_timeout 600s;\\nkeepalive_requests 1000000;\\n' \
     > /etc/nginx/conf.d/patient.conf && nginx -t && systemctl restart nginx";

/// Fails with all differences at once, if there are any.
fn no_differences(what: &str, differences: &[String]) -> Result<()> {
    if differences.is_empty() {
        return Ok(());
    }
    bail!("{what}:\n  {}", differences.join("\n  "))
}
