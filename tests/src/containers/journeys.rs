//! What is done with each container.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::bundle::{Bundle, Life};
use super::runc::Runc;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts in a file; ends with 7 when it is told to.
pub(super) const COUNTER: &str = "
i=0
while [ ! -e /data/end ]; do
    i=$((i+1))
    echo $i
    echo $i >> /data/count
    sleep 0.02
done
exit 7";

/// A container and the way it goes.
pub struct Journey {
    /// What is shown.
    pub name: &'static str,
    life: fn() -> Life,
    way: fn(&Bundle, &Runc) -> Result<()>,
}

/// All of them.
pub const ALL: &[Journey] = &[
    Journey {
        name: "a container on the host's network",
        life: || Life::new(COUNTER),
        way: twice,
    },
    Journey {
        name: "a container with a network of its own",
        life: || Life::new(COUNTER).with("network"),
        way: twice,
    },
    Journey {
        name: "a hardened container",
        life: || Life::new(COUNTER).with("network").with("cgroup").hardened(),
        way: twice,
    },
    Journey {
        name: "a container whose output goes through the engine's pipes",
        life: || Life::new(COUNTER),
        way: attached,
    },
];

impl Journey {
    /// Makes the container and goes its way.
    pub fn run(&self, rcr: &Path, place: &Path) -> Result<()> {
        let bundle = Bundle::make(place, &(self.life)())?;
        let runc = Runc::new(rcr, &bundle)?;
        (self.way)(&bundle, &runc)
    }
}

/// Checkpoint while it runs, checkpoint and restore twice, then its end.
fn twice(bundle: &Bundle, runc: &Runc) -> Result<()> {
    runc.run().context("starting")?;
    goes_on(bundle)?;
    let before = Seen::of(runc)?;
    runc.checkpoint(true).context("left running")?;
    goes_on(bundle)?;
    runc.checkpoint(false).context("checkpoint")?;
    let stood = count(bundle)?;
    ensure!(!alive(runc.pid()?), "it runs on after the checkpoint");
    ensure!(stood == count(bundle)?, "it counts on after the checkpoint");
    runc.restore().context("restore")?;
    goes_on(bundle)?;
    before.compare(&Seen::of(runc)?)?;
    runc.checkpoint(false).context("second checkpoint")?;
    let code = runc
        .restore_to_the_end(|| {
            goes_on(bundle)?;
            before.compare(&Seen::of(runc)?)?;
            Ok(fs::write(bundle.data.join("end"), "")?)
        })
        .context("second restore")?;
    ensure!(code == 7, "it ended with {code} instead of 7");
    Ok(())
}

/// All that it prints arrives: what was under way at the checkpoint, too.
fn attached(bundle: &Bundle, runc: &Runc) -> Result<()> {
    let outputs = ["first", "second"].map(|name| bundle.dir.join(name));
    let engine = runc.attached(false, &outputs[0])?;
    goes_on(bundle)?;
    runc.checkpoint(false).context("checkpoint")?;
    engine.end()?;
    let engine = runc.attached(true, &outputs[1])?;
    goes_on(bundle).context("after the restore")?;
    fs::write(bundle.data.join("end"), "")?;
    let code = engine.end()?;
    ensure!(code == Some(7), "it ended with {code:?} instead of 7");
    let printed = outputs.iter().map(fs::read_to_string);
    let printed: String = printed.collect::<std::io::Result<_>>()?;
    let wanted = fs::read_to_string(bundle.data.join("count"))?;
    ensure!(
        printed == wanted,
        "it printed\n{printed}instead of\n{wanted}"
    );
    Ok(())
}

pub(super) fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|s| !s.rsplit(')').next().is_some_and(|r| r.starts_with(" Z")))
}

/// How far it has counted; an error if it has left a number out.
pub(super) fn count(bundle: &Bundle) -> Result<u64> {
    let text = match fs::read_to_string(bundle.data.join("count")) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other?,
    };
    let mut last = 0;
    // The last line may be half written.
    for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        let n: u64 = line.trim_end().parse().context("count")?;
        ensure!(n == last + 1, "it counted {n} after {last}");
        last = n;
    }
    Ok(last)
}

/// Waits until it has counted on.
pub(super) fn goes_on(bundle: &Bundle) -> Result<()> {
    let was = count(bundle)?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if count(bundle)? > was + 2 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("it stopped counting at {was}");
}

/// How a container looks from inside.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mounts: Vec<String>,
    first: String,
    host: String,
    limits: Vec<String>,
}

impl Seen {
    fn of(runc: &Runc) -> Result<Self> {
        let mounts = runc.exec(&["cat", "/proc/1/mountinfo"])?;
        // Numbers of mounts and devices are new, and an engine may bind what it
        // covers with from elsewhere.
        let mounts = mounts.lines().map(|l| {
            let words: Vec<&str> = l.split(' ').collect();
            words[4..6].join(" ")
        });
        let mut mounts: Vec<String> = mounts.collect();
        mounts.sort();
        let status = runc.exec(&["cat", "/proc/1/status"])?;
        let kept = ["Cap", "NoNewPrivs", "Seccomp", "NSpid", "Uid", "SigIgn"];
        let limits = status
            .lines()
            .filter(|l| kept.iter().any(|k| l.starts_with(k)));
        let limits = limits.map(str::to_owned).collect();
        Ok(Self {
            mounts,
            first: runc.exec(&["cat", "/proc/1/cmdline"])?,
            host: runc.exec(&["cat", "/proc/sys/kernel/hostname"])?,
            limits,
        })
    }

    fn compare(&self, other: &Self) -> Result<()> {
        if self != other {
            bail!("it looks different:\n{self:#?}\n{other:#?}");
        }
        Ok(())
    }
}
