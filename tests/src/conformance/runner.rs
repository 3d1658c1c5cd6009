//! Runs the programs and tells what differs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rcr_engine::Tree;
use rcr_engine::file::TcpPolicy;

use super::forge::Forge;
use super::observe::{Leave, Picture};
use super::programs::ALL;
use super::stage::POLL;
use super::{Case, Findings, Stage};

/// A program that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a tree is looked at until two looks agree.
const SETTLE_TRIES: usize = 50;

/// What a program goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Dumped, killed, restored.
    Restore,
    /// Dumped and left running.
    LeaveRunning,
    /// Dumped, killed and restored several times.
    Again(u32),
    /// A dump is refused and the tree runs on.
    Refused,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Restore => "restore",
            Mode::LeaveRunning => "leave-running",
            Mode::Again(_) => "again",
            Mode::Refused => "refused",
        }
    }

    fn cycles(self) -> u32 {
        match self {
            Mode::Again(n) => n,
            _ => 1,
        }
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Only programs whose name contains this.
    pub only: Option<String>,
    /// Cycles of [`Mode::Again`].
    pub cycles: u32,
    /// Leave directories of failed programs.
    pub keep: bool,
}

/// Runs all programs of the plan; how many failed.
pub fn run(plan: &Plan) -> Result<usize> {
    // What loses its parent becomes ours, restored trees among them.
    nix::sys::prctl::set_child_subreaper(true)?;
    own_mounts().context("mount namespace")?;
    let home = std::env::temp_dir().join(format!("rcr-conformance.{}", std::process::id()));
    fs::create_dir(&home).with_context(|| home.display().to_string())?;
    // A build meanwhile would turn our executable into a deleted file; and the
    // kernel lets no process take the executable it already has.
    let (program, tool) = (home.join("program"), home.join("tool"));
    fs::copy("/proc/self/exe", &program)?;
    fs::copy("/proc/self/exe", &tool)?;
    let lab = Lab {
        home,
        program,
        tool,
    };
    let (mut passed, mut failed) = (0, 0);
    for case in ALL.iter().flat_map(|area| area.iter()) {
        let wanted = plan.only.as_deref().is_none_or(|o| case.name.contains(o));
        if !wanted {
            continue;
        }
        match lab.case(case, plan) {
            true => passed += 1,
            false => failed += 1,
        }
    }
    if failed == 0 || !plan.keep {
        fs::remove_dir_all(&lab.home)?;
    }
    if passed + failed == 0 {
        bail!("no such program: {:?}", plan.only);
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed)
}

/// A mount namespace of our own that is as on a host with systemd: shared,
/// without hierarchies of cgroup version 1, without mounts under mounts, and
/// without what other programs mount for a while where temporary files are.
fn own_mounts() -> Result<()> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    for kind in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, "/", none, MsFlags::MS_REC | kind, none)?;
    }
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mut seen = std::collections::BTreeSet::new();
    let temporary = std::env::temp_dir();
    // The last ones first: they may lie in earlier ones.
    for line in text.lines().rev() {
        let place = line.split(' ').nth(4).context("mountinfo")?;
        let below = Path::new(place).starts_with(&temporary) && Path::new(place) != temporary;
        if !seen.insert(place) || below || line.contains(" - cgroup ") {
            umount2(place, MntFlags::MNT_DETACH).with_context(|| place.to_owned())?;
        }
    }
    Ok(())
}

/// Where programs are run.
struct Lab {
    home: PathBuf,
    /// What is dumped and restored.
    program: PathBuf,
    /// What dumps and restores.
    tool: PathBuf,
}

impl Lab {
    fn case(&self, case: &Case, plan: &Plan) -> bool {
        let modes: &[Mode] = match case.refused {
            true => &[Mode::Refused],
            false => &[Mode::Restore, Mode::LeaveRunning, Mode::Again(plan.cycles)],
        };
        let mut times = String::new();
        let mut bad = Vec::new();
        for &mode in modes {
            let start = Instant::now();
            let mut findings = Findings::default();
            findings.run(|f| self.mode(case, mode, f));
            times += &format!("  {} {:.2} s", mode.name(), start.elapsed().as_secs_f32());
            let lines = findings.lines().iter();
            bad.extend(lines.map(|l| format!("    {}: {l}", mode.name())));
        }
        let verdict = if bad.is_empty() { "ok" } else { "FAILED" };
        println!("{:<32} {verdict:<7}{times}", case.name);
        for line in &bad {
            println!("{line}");
        }
        bad.is_empty()
    }

    fn mode(&self, case: &Case, mode: Mode, f: &mut Findings) -> Result<()> {
        let dir = self
            .home
            .join(format!("{}.{}", case.name.replace('/', "."), mode.name()));
        let cgroup = case.in_cgroup.then(Cgroup::create).transpose()?;
        let mut run = Run {
            lab: self,
            case,
            stage: Stage::new(&dir),
            tree: Tree::Root(0),
            root: 0,
            cgroup,
        };
        fs::create_dir(&dir)?;
        let ended = run.life(mode, f);
        kill_descendants()?;
        if ended.is_err() {
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
    cgroup: Option<Cgroup>,
}

impl Run<'_> {
    fn life(&mut self, mode: Mode, f: &mut Findings) -> Result<()> {
        let child = self.start()?;
        self.root = child.id() as i32;
        self.tree = match &self.cgroup {
            Some(c) => Tree::Cgroup(c.dir.clone()),
            None => Tree::Root(self.root),
        };
        self.wait_for(&self.stage.ready_file())?;
        for cycle in 1..=mode.cycles() {
            let forged = self.case.forge.filter(|_| mode != Mode::LeaveRunning);
            let leave = Leave {
                kernel_mappings: forged == Some(Forge::Vdso),
            };
            let before = self.settled(leave)?;
            match mode {
                Mode::Refused => self.refused(f)?,
                Mode::LeaveRunning => self.dump(cycle, true)?,
                Mode::Restore | Mode::Again(_) => {
                    self.dump(cycle, false)?;
                    reap_all()?;
                    if let Some(forge) = forged {
                        forge.apply(&self.stage.images(cycle), self.root)?;
                    }
                    self.stage.publish(&self.stage.restored_file(), "")?;
                    self.restore(cycle)?;
                }
            }
            self.compare(&before, leave, f)?;
            self.stage.publish(&self.stage.go_file(cycle), "")?;
            let result = self.stage.result_file(cycle);
            self.wait_for(&result)?;
            let lines = fs::read_to_string(&result)?;
            let prefix = if cycle > 1 { "second time: " } else { "" };
            f.extend(prefix, lines.lines().map(str::to_owned));
        }
        Ok(())
    }

    /// A picture of the tree when nothing in it is on the move any more. Some
    /// programs are never at rest; they keep still in what is looked at.
    fn settled(&self, leave: Leave) -> Result<Picture> {
        let mut last = Picture::take(&self.tree, leave)?;
        for _ in 0..SETTLE_TRIES {
            std::thread::sleep(POLL);
            let now = Picture::take(&self.tree, leave)?;
            if now == last && !now.awake {
                break;
            }
            last = now;
        }
        Ok(last)
    }

    /// Compares with the tree as it is now; what differs has to do so for a while.
    fn compare(&self, before: &Picture, leave: Leave, f: &mut Findings) -> Result<()> {
        let mut differences = Findings::default();
        for _ in 0..SETTLE_TRIES {
            differences = Findings::default();
            before.compare(&Picture::take(&self.tree, leave)?, &mut differences);
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

    fn start(&self) -> Result<Child> {
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
            .env("RCR_CONFORMANCE", self.case.name);
        if let Some(c) = &self.cgroup {
            command.env("RCR_CGROUP", &c.dir);
        }
        let child = command.stdout(output.try_clone()?).stderr(output).spawn()?;
        Ok(child)
    }

    fn wait_for(&self, file: &Path) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !file.exists() {
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

    fn dump_command(&self, cycle: u32, leave_running: bool) -> Result<Command> {
        let images = path(&self.stage.images(cycle))?;
        let mut command = self.tool(&["dump", &self.root.to_string(), &images]);
        if leave_running {
            command.arg("--leave-running");
        }
        if self.case.tcp == TcpPolicy::Close {
            command.arg("--close-tcp");
        }
        if let Some(c) = &self.cgroup {
            command.arg("--cgroup").arg(&c.dir);
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

    fn refused(&self, f: &mut Findings) -> Result<()> {
        let out = self.dump_command(1, false)?.output()?;
        said("dump", &out, super::steps::REFUSED)?;
        let words = String::from_utf8_lossy(&out.stdout);
        for who in ["preflight", "dump"] {
            let lines: Vec<&str> = words.lines().filter(|l| l.starts_with(who)).collect();
            for wanted in self.stage.refusal()? {
                let found = lines.iter().any(|l| l.contains(&wanted));
                f.that(format!("{who} does not say {wanted:?}: {lines:?}"), found);
            }
        }
        Ok(())
    }

    fn restore(&self, cycle: u32) -> Result<()> {
        let images = path(&self.stage.images(cycle))?;
        let mut command = self.tool(&["restore", &images]);
        if let Some(c) = &self.cgroup {
            command.arg("--cgroup-mount").arg(&c.mount);
        }
        let out = command.output()?;
        said("restore", &out, 0)
    }
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
    fn create() -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let line = text.lines().find(|l| l.contains(" - cgroup2 "));
        let place = line.and_then(|l| l.split(' ').nth(4));
        let mount = PathBuf::from(place.context("cgroup2 is not mounted")?);
        let dir = mount.join(format!("rcr-conformance.{}", std::process::id()));
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

fn states(tree: &Tree) -> String {
    let processes = tree.scan().unwrap_or_default();
    let one = |p: &rcr_engine::Process| {
        let wchan = fs::read_to_string(format!("/proc/{}/syscall", p.pid)).unwrap_or_default();
        format!("{} {} ({})", p.pid, p.state, wchan.trim())
    };
    processes.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn reap_if_ended(pid: i32) -> Result<Option<WaitStatus>> {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => Ok(None),
        Ok(status) => Ok(Some(status)),
        Err(e) => Err(e).context("the program is not our child"),
    }
}

/// Takes the exit status of every child that has ended or is about to: the
/// whole tree was killed.
fn reap_all() -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() > end => {
                bail!("a killed process does not end");
            }
            Ok(WaitStatus::StillAlive) => std::thread::sleep(POLL),
            Ok(_) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Ends every process below this one. Only our own descendants are touched.
fn kill_descendants() -> Result<()> {
    let me = std::process::id() as i32;
    let end = Instant::now() + PATIENCE;
    loop {
        let all = Tree::Root(me).scan()?;
        for p in all.iter().filter(|p| p.pid != me && !p.is_zombie()) {
            let _ = kill(Pid::from_raw(p.pid), Signal::SIGKILL);
        }
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return Ok(()),
            _ if Instant::now() > end => bail!("a killed process does not end"),
            Ok(WaitStatus::StillAlive) => std::thread::sleep(POLL),
            _ => {}
        }
    }
}
