//! A program on its way through one mode.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::CloneFlags;
use rcr_engine::Process;
use rcr_engine::Tree;
use rcr_engine::file::TcpPolicy;

use super::Lab;
use super::processes::{kill_descendants, reap_all, reap_if_ended, states};
use crate::conformance::case::PidNs;
use crate::conformance::forge::Forge;
use crate::conformance::host::{HugePages, Swap};
use crate::conformance::observe::{Leave, Picture};
use crate::conformance::programs::random::SEED;
use crate::conformance::report::{CaseResult, Mode, ModeResult, Verdict};
use crate::conformance::stage::POLL;
use crate::conformance::{Case, Findings, Stage, Unavailable, steps};

/// A program that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Damaged images that are read after a dump.
const MUTATIONS: &str = "16";

/// Generations of images before the dump in the mode that has some.
const PRE_DUMPS: u32 = 2;

/// How often a tree is looked at until two looks agree.
const SETTLE_TRIES: usize = 50;

impl Lab {
    /// Takes a program through its modes.
    pub(super) fn case(&self, case: &Case, cycles: u32) -> CaseResult {
        let mut modes = Vec::new();
        for &mode in Mode::of(case) {
            let start = Instant::now();
            let mut findings = Findings::default();
            let ended = self.mode(case, mode, cycles, &mut findings);
            let skipped = match &ended {
                Err(e) => Unavailable::of(e).map(str::to_owned),
                Ok(()) => None,
            };
            let verdict = match skipped {
                Some(why) => Verdict::Skipped { why },
                None => {
                    findings.run(|_| ended);
                    match findings.lines() {
                        [] => Verdict::Passed,
                        lines => Verdict::Failed {
                            findings: lines.to_vec(),
                        },
                    }
                }
            };
            modes.push(ModeResult {
                mode,
                verdict,
                millis: start.elapsed().as_millis() as u64,
            });
        }
        CaseResult::new(case, modes)
    }

    fn mode(&self, case: &Case, mode: Mode, cycles: u32, f: &mut Findings) -> Result<()> {
        let dir = self
            .home
            .join(format!("{}.{}", case.name.replace('/', "."), mode.name()));
        let cgroup = case
            .in_cgroup
            .then(|| Cgroup::create(&self.unique))
            .transpose()?;
        let mut run = Run {
            lab: self,
            case,
            stage: Stage::new(&dir),
            tree: Tree::Root(0),
            root: 0,
            keeper: None,
            cgroup,
        };
        fs::create_dir(&dir)?;
        let ended = run.on_host(mode, cycles, f);
        unmount_below(&dir)?;
        if ended.as_ref().is_err_and(|e| Unavailable::of(e).is_none()) {
            let output = fs::read_to_string(run.stage.output()).unwrap_or_default();
            f.extend("output: ", output.lines().map(str::to_owned));
        } else if f.is_empty() {
            fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        ended
    }
}

/// A program on its way through one mode.
struct Run<'a> {
    lab: &'a Lab,
    case: &'a Case,
    stage: Stage,
    tree: Tree,
    root: i32,
    /// First process of the namespace the program is in, if not in the tree.
    keeper: Option<i32>,
    cgroup: Option<Cgroup>,
}

impl Run<'_> {
    /// The life of the program, with what it needs of the host meanwhile.
    fn on_host(&mut self, mode: Mode, cycles: u32, f: &mut Findings) -> Result<()> {
        let (pages, mib) = (self.case.huge_pages, self.case.swap_mib);
        let _pages = (pages > 0).then(|| HugePages::reserve(pages)).transpose()?;
        let file = self.lab.home.join("swap");
        let _swap = (mib > 0).then(|| Swap::on(&file, mib)).transpose()?;
        let ended = self.life(mode, cycles, f);
        kill_descendants()?;
        ended
    }

    fn life(&mut self, mode: Mode, cycles: u32, f: &mut Findings) -> Result<()> {
        let child = self.start()?;
        self.root = child.id() as i32;
        self.tree = match &self.cgroup {
            Some(c) => Tree::Cgroup(c.dir.clone()),
            None => Tree::Root(self.root),
        };
        self.wait_for(&self.stage.ready_file())?;
        let cycles = if mode == Mode::Again { cycles } else { 1 };
        for cycle in 1..=cycles {
            let forged = self.case.forge.filter(|_| mode != Mode::LeaveRunning);
            let leave = Leave {
                kernel_mappings: forged == Some(Forge::Vdso),
            };
            let before = self.settled(leave)?;
            let mut pager = None;
            match mode {
                Mode::Refused => self.refused(&before, f)?,
                Mode::LeaveRunning => self.dump(cycle, true)?,
                Mode::Restore | Mode::Again | Mode::PreDump | Mode::Lazy => {
                    if mode == Mode::PreDump {
                        self.pre_dump()?;
                    }
                    self.dump(cycle, false)?;
                    if mode == Mode::Restore {
                        self.read_damaged()?;
                    }
                    let mut others = self.stage.outsiders();
                    others.extend(self.keeper);
                    reap_all(&others)?;
                    if let Some(forge) = forged {
                        forge.apply(&self.stage.images(cycle), self.root)?;
                    }
                    self.stage.publish(&self.stage.restored_file(), "")?;
                    if mode == Mode::Lazy {
                        self.stage.publish(&self.stage.go_file(cycle), "")?;
                    }
                    pager = self.restore(cycle, mode == Mode::Lazy)?;
                }
            }
            if mode != Mode::Lazy {
                self.compare(&before, leave, f)?;
                self.stage.publish(&self.stage.go_file(cycle), "")?;
            }
            let result = self.stage.result_file(cycle);
            self.wait_for(&result)?;
            let lines = fs::read_to_string(&result)?;
            let prefix = if cycle > 1 { "second time: " } else { "" };
            f.extend(prefix, lines.lines().map(str::to_owned));
            if let Some(pager) = pager {
                self.filled(pager)?;
            }
        }
        Ok(())
    }

    /// A picture of the tree when nothing in it is on the move any more. Some
    /// programs are never at rest; they keep still in what is looked at.
    fn settled(&self, leave: Leave) -> Result<Picture> {
        if self.case.restless {
            return Ok(Picture::default());
        }
        let mut last = Picture::take(&self.tree, leave);
        for _ in 0..SETTLE_TRIES {
            std::thread::sleep(POLL);
            let now = Picture::take(&self.tree, leave);
            if let (Ok(last), Ok(now)) = (&last, &now)
                && last == now
                && !now.awake
            {
                break;
            }
            last = now;
        }
        last
    }

    /// Waits until the process that fills the tree's memory has ended.
    fn filled(&self, pager: i32) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while Process::read(pager)?.is_some_and(|p| !p.is_zombie()) {
            if Instant::now() > end {
                bail!("the memory is never filled");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Compares with the tree as it is now; what differs has to do so for a while.
    fn compare(&self, before: &Picture, leave: Leave, f: &mut Findings) -> Result<()> {
        if self.case.restless {
            return Ok(());
        }
        let mut differences = Findings::default();
        for _ in 0..SETTLE_TRIES {
            differences = Findings::default();
            // A process may end while it is looked at.
            differences.run(|d| {
                before.compare(&Picture::take(&self.tree, leave)?, d);
                Ok(())
            });
            if differences.is_empty() {
                break;
            }
            std::thread::sleep(POLL);
        }
        f.extend("", differences.lines().to_vec());
        Ok(())
    }

    fn tool(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.lab.tool);
        command.args(args).stdin(Stdio::null());
        command
    }

    fn start(&mut self) -> Result<Child> {
        let output = fs::File::options()
            .append(true)
            .create(true)
            .open(self.stage.output())?;
        let dir = path(self.stage.output().parent().context("directory")?)?;
        let mut command = Command::new(&self.lab.program);
        command.args(["program", self.case.name, &dir]);
        command
            .stdin(Stdio::null())
            .env_clear()
            .env("RCR_CONFORMANCE", self.case.name)
            .env(SEED, self.lab.seed.to_string());
        if let Some(c) = &self.cgroup {
            command.env("RCR_CGROUP", &c.dir);
        }
        command.stdout(output.try_clone()?).stderr(output);
        if self.case.pid_ns == PidNs::Ours {
            return Ok(command.spawn()?);
        }
        let own = fs::File::open("/proc/self/ns/pid")?;
        nix::sched::unshare(CloneFlags::CLONE_NEWPID).context("unshare")?;
        let child = (|| {
            if self.case.pid_ns == PidNs::Member {
                // Killed with all other descendants in the end.
                self.keeper = Some(keeper()?.id() as i32);
            }
            command.spawn()
        })();
        nix::sched::setns(&own, CloneFlags::CLONE_NEWPID).context("setns")?;
        Ok(child?)
    }

    fn wait_for(&self, file: &Path) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !file.exists() {
            if let Ok(why) = fs::read_to_string(self.stage.skip_file()) {
                return Err(Unavailable::because(why));
            }
            if let Some(status) = reap_if_ended(self.root)? {
                bail!("the program ended: {status:?}");
            }
            if Instant::now() > end {
                bail!("the program hangs: {}", states(&self.tree));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Reads the images with a few bytes changed, again and again.
    fn read_damaged(&self) -> Result<()> {
        let images = path(&self.stage.images(1))?;
        let seed = self.lab.seed + u64::from(self.root.unsigned_abs()) + 1;
        let args = ["mutate", &images, &seed.to_string(), MUTATIONS];
        said("reading damaged images", &self.tool(&args).output()?, 0)
    }

    /// Two generations before the dump, written while the program runs.
    fn pre_dump(&self) -> Result<()> {
        let mut parent = None;
        for n in 1..=PRE_DUMPS {
            let images = self.stage.pre_images(n);
            let mut command = self.tool(&["pre-dump", &self.root.to_string(), &path(&images)?]);
            if let Some(parent) = &parent {
                command.arg("--parent").arg(parent);
            }
            if self.case.pages_once {
                command.arg("--pages-once");
            }
            if let Some(c) = &self.cgroup {
                command.arg("--cgroup").arg(&c.dir);
            }
            said("pre-dump", &command.output()?, 0)?;
            parent = Some(images);
        }
        Ok(())
    }

    fn dump_command(&self, cycle: u32, leave_running: bool) -> Result<Command> {
        let images = path(&self.stage.images(cycle))?;
        let mut command = self.tool(&["dump", &self.root.to_string(), &images]);
        if self.case.pages_once {
            command.arg("--pages-once");
        }
        if leave_running {
            command.arg("--leave-running");
        }
        match self.case.tcp {
            TcpPolicy::Refuse => {}
            TcpPolicy::Close => drop(command.arg("--close-tcp")),
            TcpPolicy::Carry => drop(command.arg("--tcp-established")),
        }
        if let Some(c) = &self.cgroup {
            command.arg("--cgroup").arg(&c.dir);
        }
        let parent = self.stage.pre_images(PRE_DUMPS);
        if parent.exists() {
            command.arg("--parent").arg(parent);
        }
        Ok(command)
    }

    fn dump(&self, cycle: u32, leave_running: bool) -> Result<()> {
        let out = self.dump_command(cycle, leave_running)?.output()?;
        said("dump", &out, 0)?;
        // Refusals of the preflight, where the dump itself had none.
        let words = String::from_utf8_lossy(&out.stdout);
        if !words.is_empty() {
            bail!("{words}");
        }
        Ok(())
    }

    fn refused(&self, before: &Picture, f: &mut Findings) -> Result<()> {
        let out = self.dump_command(1, false)?.output()?;
        said("dump", &out, steps::REFUSED)?;
        let words = String::from_utf8_lossy(&out.stdout);
        let early = self.stage.refused_early();
        for who in ["preflight", "dump"]
            .into_iter()
            .filter(|w| early || *w == "dump")
        {
            let lines: Vec<&str> = words.lines().filter(|l| l.starts_with(who)).collect();
            f.that(format!("{who} names nothing"), !lines.is_empty());
            for line in &lines {
                let complete = names_all(line, &before.pids);
                f.that(format!("{line:?} does not name all"), complete);
            }
            for wanted in self.stage.refusal()? {
                let found = lines.iter().any(|l| l.contains(&wanted));
                f.that(format!("{who} does not say {wanted:?}: {lines:?}"), found);
            }
        }
        Ok(())
    }

    /// Gives the process that goes on filling the memory, if it is to be lazy.
    fn restore(&self, cycle: u32, lazy: bool) -> Result<Option<i32>> {
        let images = path(&self.stage.images(cycle))?;
        let mut command = self.tool(&["restore", &images]);
        if let Some(c) = &self.cgroup {
            command.arg("--cgroup-mount").arg(&c.mount);
        }
        if lazy {
            command.arg("--lazy");
        }
        let out = command.output()?;
        said("restore", &out, 0)?;
        let words = String::from_utf8_lossy(&out.stdout);
        let pager = lazy.then(|| words.trim().parse().context("no pager"));
        pager.transpose()
    }
}

/// A first process that does nothing but let its children go.
fn keeper() -> std::io::Result<Child> {
    // What is ignored stays so in the program that is executed.
    // SAFETY: no handler is installed; the runner waits for nobody meanwhile.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let child = Command::new("sleep").arg("infinity").spawn();
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    child
}

/// Whether a line says which process of the tree, what, why, and what to do.
fn names_all(line: &str, pids: &[i32]) -> bool {
    let named = || {
        let (_, rest) = line.split_once(": ")?;
        let (comm, rest) = rest.split_once(" (pid ")?;
        let (pid, rest) = rest.split_once("): ")?;
        let (object, rest) = rest.split_once(": ")?;
        let (reason, advice) = rest.split_once("; ")?;
        let pid: i32 = pid.parse().ok()?;
        let now = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let said = [object, reason, advice]
            .iter()
            .all(|w| !w.trim().is_empty());
        Some(said && pids.contains(&pid) && now.trim_end() == comm)
    };
    named().unwrap_or(false)
}

/// Fails with what a step printed unless it ended as it should.
fn said(step: &str, out: &std::process::Output, code: i32) -> Result<()> {
    if out.status.code() == Some(code) {
        return Ok(());
    }
    let text = [&out.stderr[..], &out.stdout[..]].concat();
    let text = String::from_utf8_lossy(&text);
    bail!(
        "{step}: {}: {}",
        out.status,
        text.trim().replace('\n', " | ")
    );
}

fn path(p: &Path) -> Result<String> {
    Ok(p.to_str().context("path")?.to_owned())
}

/// A cgroup of version 2 for one run, removed on drop.
struct Cgroup {
    mount: PathBuf,
    dir: PathBuf,
}

impl Cgroup {
    fn create(unique: &str) -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let line = text.lines().find(|l| l.contains(" - cgroup2 "));
        let place = line.and_then(|l| l.split(' ').nth(4));
        let mount = PathBuf::from(place.context("cgroup2 is not mounted")?);
        let dir = mount.join(unique);
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self { mount, dir })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let inner = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for entry in inner.filter(|e| e.path().is_dir()) {
            let _ = fs::remove_dir(entry.path());
        }
        if let Err(e) = fs::remove_dir(&self.dir) {
            eprintln!("{}: {e}", self.dir.display());
        }
    }
}

/// Ends mounts that a program has made in its directory.
fn unmount_below(dir: &Path) -> Result<()> {
    use nix::mount::{MntFlags, umount2};
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let places = text.lines().rev().filter_map(|l| l.split(' ').nth(4));
    for place in places.filter(|p| Path::new(p).starts_with(dir)) {
        umount2(place, MntFlags::MNT_DETACH).with_context(|| place.to_owned())?;
    }
    Ok(())
}
