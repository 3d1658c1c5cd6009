//! Runs the programs and tells what differs.
//!
//! ```text
//!  run ── a thread each ──> worker (own pids, mounts, IPC, network)
//!            names of cases ──>│ life: spawn, dump, restore, compare
//!            results (JSON) <──│
//! ```

mod life;
mod processes;
mod worker;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::Case;
use super::programs::ALL;
use super::report::{CaseResult, Report};

pub use worker::{WorkerPlan, work};

/// A worker that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Held while programs run that need something of the whole host.
const ALONE_LOCK: &str = "rcr-conformance.alone";

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Only programs whose name contains one of these; all where it is empty.
    pub only: Vec<String>,
    /// Cycles of the mode that dumps and restores several times.
    pub cycles: u32,
    /// Leave directories of failed programs.
    pub keep: bool,
    /// Programs at a time.
    pub jobs: usize,
    /// Added to the seeds of what is random.
    pub seed: u64,
}

impl Plan {
    fn wants(&self, case: &Case) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| case.name.contains(o))
    }
}

/// All programs, in the suite's order.
pub fn all() -> impl Iterator<Item = &'static Case> {
    ALL.iter().flat_map(|area| area.iter())
}

/// Runs all programs of the plan and prints how each ended.
pub fn run(plan: &Plan) -> Result<Report> {
    let wanted: Vec<&Case> = all().filter(|c| plan.wants(c)).collect();
    if wanted.is_empty() {
        bail!("no such program: {:?}", plan.only);
    }
    let home = std::env::temp_dir().join(format!("rcr-conformance.{}", std::process::id()));
    fs::create_dir(&home).with_context(|| home.display().to_string())?;
    // A build meanwhile would turn our executable into a deleted file; and the
    // kernel lets no process take the executable it already has.
    for name in ["program", "tool"] {
        fs::copy("/proc/self/exe", home.join(name))?;
    }
    let results = Mutex::new(BTreeMap::new());
    let (alone, together): (Vec<&Case>, Vec<&Case>) = wanted.iter().partition(|c| c.alone);
    let office = Office {
        plan,
        home: &home,
        results: &results,
    };
    office.run(&together, plan.jobs)?;
    if !alone.is_empty() {
        let lock = fs::File::create(std::env::temp_dir().join(ALONE_LOCK))?;
        let _held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        office.run(&alone, 1)?;
    }
    let mut results = results.into_inner().expect("no thread panicked");
    let take = |c: &&Case| results.remove(c.name);
    let cases: Vec<CaseResult> = wanted.iter().filter_map(take).collect();
    let report = Report { cases };
    if report.total().failed == 0 || !plan.keep {
        fs::remove_dir_all(&home)?;
    }
    Ok(report)
}

/// Hands out cases and collects results.
struct Office<'a> {
    plan: &'a Plan,
    home: &'a Path,
    results: &'a Mutex<BTreeMap<String, CaseResult>>,
}

impl Office<'_> {
    fn run(&self, cases: &[&'static Case], jobs: usize) -> Result<()> {
        let queue = Mutex::new(cases.iter());
        let next = || queue.lock().expect("no thread panicked").next().copied();
        std::thread::scope(|scope| {
            let jobs = jobs.clamp(1, cases.len().max(1));
            let desk = |index| move || self.desk(index, next);
            let threads: Vec<_> = (0..jobs).map(|i| scope.spawn(desk(i))).collect();
            let mut ended = threads.into_iter().map(|t| t.join().expect("no panic"));
            ended.try_for_each(|r| r)
        })
    }

    /// Serves one worker; another one where it is lost.
    fn desk(&self, index: usize, next: impl Fn() -> Option<&'static Case>) -> Result<()> {
        let mut worker = None;
        while let Some(case) = next() {
            let mut current = match worker.take() {
                Some(w) => w,
                None => Worker::start(self.plan, self.home, index)?,
            };
            let result = match current.ask(case) {
                Ok(result) => {
                    worker = Some(current);
                    result
                }
                Err(e) => CaseResult::lost(case, format!("{e:#}")),
            };
            println!("{result}");
            let mut results = self.results.lock().expect("no thread panicked");
            results.insert(result.name.clone(), result);
        }
        Ok(())
    }
}

/// A worker as this side sees it; it and all of its programs end with it.
struct Worker {
    child: Child,
    answers: Receiver<String>,
}

impl Worker {
    fn start(plan: &Plan, home: &Path, index: usize) -> Result<Self> {
        // Names of cgroups are seen by the whole host, process ids of a worker are not.
        let unique = format!("rcr-conformance.{}.{index}", std::process::id());
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("worker")
            .args([home, Path::new(&unique)])
            .args(["--cycles", &plan.cycles.to_string()])
            .args(["--seed", &plan.seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a worker")?;
        let lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
        let (to, answers) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if to.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, answers })
    }

    fn ask(&mut self, case: &Case) -> Result<CaseResult> {
        let stdin = self.child.stdin.as_mut().context("no pipe")?;
        writeln!(stdin, "{}", case.name).context("the worker ended")?;
        let line = self.answers.recv_timeout(PATIENCE);
        let line = line.context("the worker hangs or has ended")?;
        serde_json::from_str(&line).context("the worker's answer")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // At the end of its input it leaves by itself; one that hangs does not.
        drop(self.child.stdin.take());
        if self.answers.recv_timeout(Duration::from_secs(5)).is_ok()
            || !matches!(self.child.try_wait(), Ok(Some(_)))
        {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// Where programs are run.
#[derive(Debug)]
struct Lab {
    home: PathBuf,
    /// What is dumped and restored.
    program: PathBuf,
    /// What dumps and restores.
    tool: PathBuf,
    /// A name that nothing else on this host has.
    unique: String,
    /// Added to the seeds of what is random.
    seed: u64,
}
