//! What goes wrong around a dump or a restore: whoever makes it is killed, there
//! is no room, a process of the tree dies. The tree is there as a whole or not at
//! all, and nothing else is left.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// In the environment: the process is a tree's root, with this many MiB.
const MIB: &str = "RCR_ROBUST_MIB";
/// In the environment: where it notes that its memory is as it should be.
const PROGRESS: &str = "RCR_ROBUST_PROGRESS";
/// In the environment: how often something goes wrong.
const TIMES: &str = "RCR_ROBUST_TIMES";
const TIMES_USUAL: u64 = 25;
/// Until this is over, what is to happen has happened.
const PATIENCE: Duration = Duration::from_secs(20);

fn times() -> u64 {
    std::env::var(TIMES).map_or(TIMES_USUAL, |t| t.parse().unwrap())
}

/// One test at a time: they look at all children of this process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    // Who is left without a parent comes to us.
    set_child_subreaper(true).unwrap();
    guard
}

fn content(n: usize) -> u64 {
    (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A process with memory, a thread and two children.
#[test]
#[ignore = "a part of the tests below"]
fn plays_a_tree() {
    let Ok(mib) = std::env::var(MIB) else { return };
    let progress = PathBuf::from(std::env::var_os(PROGRESS).unwrap());
    // Whoever runs the tests may leave descriptors open that lead elsewhere.
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let fds = fds.filter_map(|f| f.unwrap().file_name().to_str()?.parse::<i32>().ok());
    for fd in fds.filter(|fd| *fd > 2).collect::<Vec<_>>() {
        let _ = nix::unistd::close(fd);
    }
    for _ in 0..2 {
        let mut sleep = Command::new("sleep");
        for set in [Command::stdin, Command::stdout, Command::stderr] {
            set(&mut sleep, Stdio::null());
        }
        std::mem::forget(sleep.arg("10000").spawn().unwrap());
    }
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_millis(3));
        }
    });
    let words = mib.parse::<usize>().unwrap() << 17;
    let memory: Vec<u64> = (0..words).map(content).collect();
    print!("!");
    io::stdout().flush().unwrap();
    let null = fs::File::options().write(true).open("/dev/null").unwrap();
    nix::unistd::dup2_stdout(&null).unwrap();
    drop(null);
    loop {
        for (n, word) in memory.iter().enumerate() {
            if std::hint::black_box(*word) != content(n) {
                std::process::abort();
            }
        }
        let mut file = fs::File::options()
            .append(true)
            .create(true)
            .open(&progress);
        let _ = file.as_mut().map(|f| f.write_all(b"."));
        thread::sleep(Duration::from_millis(1));
    }
}

/// State and parent of a process (proc_pid_stat(5)).
fn stat(pid: i32) -> Option<(char, i32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = text.rsplit_once(')')?.1.split_whitespace();
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}

fn processes() -> Vec<(i32, char, i32)> {
    let names = fs::read_dir("/proc").unwrap();
    let pids = names.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| stat(pid).map(|(state, parent)| (pid, state, parent)))
        .collect()
}

fn descendants(of: i32) -> BTreeSet<i32> {
    let all = processes();
    let mut found = BTreeSet::from([of]);
    loop {
        let before = found.len();
        let more = all.iter().filter(|(_, _, p)| found.contains(p));
        let more: Vec<i32> = more.map(|(pid, _, _)| *pid).collect();
        found.extend(more);
        if found.len() == before {
            return found;
        }
    }
}

/// Reaps whoever has come to us and ended.
fn reap() {
    let me = std::process::id() as i32;
    for (pid, state, parent) in processes() {
        if state == 'Z' && parent == me {
            let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        }
    }
}

/// Whether something becomes true; meanwhile, orphans are reaped.
fn becomes(what: impl Fn() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        reap();
        if what() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// A tree, killed when dropped.
struct Tree {
    dir: tempfile::TempDir,
    pid: i32,
    pids: BTreeSet<i32>,
}

impl Tree {
    /// Starts it, by a command in front of it.
    fn start(mib: usize, front: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = std::env::current_exe().unwrap();
        let this = this.to_str().unwrap();
        let words = [front, &["setsid", this, "--exact", "plays_a_tree"]].concat();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(["--nocapture", "--include-ignored", "--test-threads=1"])
            .env(MIB, mib.to_string())
            .env(PROGRESS, dir.path().join("progress"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .unwrap();
        let mut byte = [0];
        let mut out = child.stdout.take().unwrap();
        while byte != [b'!'] {
            out.read_exact(&mut byte).unwrap();
        }
        // It has forgotten what it printed to.
        out.read_to_end(&mut Vec::new()).unwrap();
        let of_test = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(this.as_bytes())
        };
        let pid = descendants(child.id() as i32).into_iter().find(of_test);
        let pid = pid.unwrap();
        std::mem::forget(child);
        Self {
            dir,
            pid,
            pids: descendants(pid),
        }
    }

    fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    fn dump(&self) -> Command {
        let mut command = rcr();
        let tree = self.pid.to_string();
        command.args(["dump", "-t", &tree, "-D"]).arg(self.images());
        command
    }

    fn restore(&self) -> Command {
        let mut command = rcr();
        command
            .args(["restore", "--detach", "-D"])
            .arg(self.images());
        command
    }

    fn is_gone(&self) -> bool {
        self.pids.iter().all(|p| stat(*p).is_none())
    }

    /// All of it runs, and nobody traces it.
    fn runs(&self) -> bool {
        let free = |pid: &i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|s| s.contains("TracerPid:\t0") && !s.contains("State:\tZ"))
        };
        self.pids.iter().all(free)
    }

    /// How often it has found its memory as it was.
    fn progress(&self) -> u64 {
        fs::metadata(self.dir.path().join("progress")).map_or(0, |m| m.len())
    }

    /// It runs, and twice finds its memory as it was.
    fn goes_on(&self) -> bool {
        let before = self.progress();
        becomes(|| self.runs() && self.progress() > before + 2)
    }

    /// Ends it if it runs as a whole since a restore before which its progress
    /// was that; `None`: neither does it run, nor is it gone.
    fn is_whole(&self, before: u64) -> Option<bool> {
        let runs = || self.runs() && self.progress() > before + 2;
        if !becomes(|| self.is_gone() || runs()) {
            return None;
        }
        let gone = self.is_gone();
        self.kill();
        Some(!gone)
    }

    fn kill(&self) {
        for pid in &self.pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        assert!(becomes(|| self.is_gone()), "it does not end");
    }

    /// Processes of ours that belong to it: they have its images mapped.
    fn helpers(&self) -> Vec<(i32, String)> {
        let images = self.images();
        let images = images.to_str().unwrap();
        let ours = |pid: i32| {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            maps.contains(images).then(|| (pid, comm.trim().to_owned()))
        };
        processes().iter().filter_map(|p| ours(p.0)).collect()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for pid in &self.pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        reap();
    }
}

fn rcr() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rcr"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn succeed(mut command: Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", said(&out));
}

/// Numbers without a pattern.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % end.max(1)
    }

    fn wait(&mut self, longest: Duration) {
        thread::sleep(Duration::from_micros(
            self.below(longest.as_micros() as u64),
        ));
    }
}

/// Children of this process and what is mounted.
fn surroundings() -> (BTreeSet<i32>, String) {
    reap();
    let me = std::process::id() as i32;
    let children = processes().into_iter().filter(|p| p.2 == me).map(|p| p.0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    (children.collect(), mounts)
}

fn end(mut child: Child) {
    let _ = child.kill();
    child.wait().unwrap();
}

fn restores_are_killed(front: &[&str]) {
    let tree = Tree::start(8, front);
    succeed(tree.dump());
    assert!(becomes(|| tree.is_gone()));
    let before = surroundings();
    let start = Instant::now();
    succeed(tree.restore());
    let took = start.elapsed();
    assert!(tree.goes_on());
    tree.kill();
    let mut dice = Dice(u64::from(std::process::id()));
    let (mut none, mut whole) = (0, 0);
    for n in 0..times() {
        let progress = tree.progress();
        let restorer = tree.restore().spawn().unwrap();
        dice.wait(took + took / 4);
        end(restorer);
        // From the last moment on it lives without us.
        match tree.is_whole(progress) {
            Some(false) => none += 1,
            Some(true) => whole += 1,
            None => panic!("kill {n} left a part"),
        }
        let as_before = || surroundings() == before;
        let now = || (surroundings(), tree.helpers());
        assert!(becomes(as_before), "kill {n} left {:?}\n{before:?}", now());
    }
    println!("{none} killed restores left nothing, {whole} a whole tree");
    succeed(tree.restore());
    assert!(tree.goes_on());
    tree.kill();
}

#[test]
fn a_killed_restore_leaves_nothing() {
    let _alone = alone();
    restores_are_killed(&["env"]);
}

#[test]
fn a_killed_restore_with_namespaces_leaves_nothing() {
    let _alone = alone();
    restores_are_killed(&["unshare", "--ipc", "--uts", "--net"]);
}

#[test]
fn a_killed_pager_ends_the_tree_and_its_guard() {
    let _alone = alone();
    if !Path::new("/dev/userfaultfd").exists() {
        eprintln!("skipped: there is no /dev/userfaultfd");
        return;
    }
    let tree = Tree::start(192, &["env"]);
    succeed(tree.dump());
    assert!(becomes(|| tree.is_gone()));
    let before = surroundings();
    let mut dice = Dice(u64::from(std::process::id()));
    let mut ended = 0;
    for n in 0..40 {
        let progress = tree.progress();
        let mut restorer = tree.restore().arg("--lazy").spawn().unwrap();
        let end = Instant::now() + PATIENCE;
        // The guard is there from the moment on in which the tree may run.
        let pager = loop {
            let helpers = tree.helpers();
            let of = |name: &str| helpers.iter().find(|(_, c)| c == name).map(|h| h.0);
            match (of("rcr-guard"), of("rcr-pager")) {
                (Some(_), Some(pager)) => break pager,
                _ => assert!(Instant::now() < end, "no pager"),
            }
        };
        dice.wait(Duration::from_millis(5));
        let _ = kill(Pid::from_raw(pager), Signal::SIGKILL);
        let done = restorer.wait().unwrap();
        assert!(
            becomes(|| tree.helpers().is_empty()),
            "{n}: {:?}",
            tree.helpers()
        );
        match tree.is_whole(progress) {
            Some(false) => ended += 1,
            // All was there already.
            Some(true) => assert!(done.success(), "{n}"),
            None => panic!("{n}: a part of the tree is left"),
        }
        assert!(becomes(|| surroundings() == before), "{n}");
        if ended == 5 {
            return;
        }
    }
    panic!("of 40 drains {ended} could be caught");
}

/// Everything this thread starts has mounts of its own.
fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, flags, none).unwrap();
}

fn tmpfs(at: &Path, data: &str) {
    fs::create_dir_all(at).unwrap();
    let flags = MsFlags::empty();
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(data)).unwrap();
}

/// A failed dump: its message names the cause, the tree runs, no image is there.
fn assert_unharmed(tree: &Tree, out: &Output, cause: &[&str]) {
    let said = said(out);
    assert!(out.status.code().is_some_and(|c| c > 0), "{out:?}");
    assert!(cause.iter().any(|c| said.contains(c)), "{said}");
    assert!(tree.goes_on(), "{said}");
    assert!(!tree.images().exists(), "{:?}", fs::read_dir(tree.images()));
}

#[test]
fn a_dump_without_room_leaves_the_tree_running() {
    let _alone = alone();
    own_mounts();
    let mut tree = Tree::start(4, &["env"]);
    let room = tempfile::tempdir().unwrap();
    let mut failed = 0;
    for kib in [
        4_u32, 8, 16, 32, 64, 96, 128, 160, 200, 256, 400, 1024, 3000, 6000, 60_000,
    ] {
        tmpfs(room.path(), &format!("size={kib}k"));
        let own = std::mem::replace(&mut tree.dir, tempfile::tempdir_in(room.path()).unwrap());
        // It notes its progress elsewhere.
        let out = tree.dump().arg("--leave-running").output().unwrap();
        let images = tree.images();
        let in_tmpfs = std::mem::replace(&mut tree.dir, own);
        if out.status.success() {
            assert!(images.join("inventory.img").exists());
            assert!(kib > 4000, "{kib} KiB are enough for 4 MiB");
        } else {
            failed += 1;
            let cause = ["No space left", "os error 28", "ENOSPC"];
            assert_unharmed(&tree, &out, &cause);
            assert!(!images.exists(), "{kib} KiB");
        }
        drop(in_tmpfs);
        umount2(room.path(), MntFlags::MNT_DETACH).unwrap();
    }
    assert!((5..15).contains(&failed), "{failed}");
}

#[test]
fn a_dump_into_a_read_only_place_leaves_the_tree_running() {
    let _alone = alone();
    own_mounts();
    let tree = Tree::start(1, &["env"]);
    let room = tempfile::tempdir().unwrap();
    tmpfs(room.path(), "ro");
    let mut command = rcr();
    let pid = tree.pid.to_string();
    command
        .args(["dump", "-t", &pid, "-D"])
        .arg(room.path().join("images"));
    let out = command.output().unwrap();
    assert_unharmed(&tree, &out, &["Read-only file system"]);
    // An older dump is not touched.
    fs::create_dir(tree.images()).unwrap();
    let theirs = tree.images().join("pstree.img");
    fs::write(&theirs, "theirs").unwrap();
    let out = tree.dump().output().unwrap();
    assert!(out.status.code().is_some_and(|c| c > 0), "{out:?}");
    assert!(said(&out).contains("File exists"), "{}", said(&out));
    assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
    assert_eq!(fs::read_dir(tree.images()).unwrap().count(), 1);
    assert!(tree.goes_on());
}

#[test]
fn a_dump_without_descriptors_leaves_the_tree_running() {
    let _alone = alone();
    let tree = Tree::start(1, &["env"]);
    let mut failed = 0;
    for most in 4..64 {
        let mut command = tree.dump();
        command.arg("--leave-running");
        let limit = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?);
        // SAFETY: one system call, which may be made after a fork.
        unsafe { command.pre_exec(limit) };
        let out = command.output().unwrap();
        if out.status.success() {
            assert!(tree.goes_on());
            fs::remove_dir_all(tree.images()).unwrap();
            continue;
        }
        failed += 1;
        assert_unharmed(&tree, &out, &["Too many open files", "EMFILE"]);
    }
    assert!((3..60).contains(&failed), "{failed}");
}

#[test]
fn a_process_that_dies_meanwhile_does_no_harm_to_the_others() {
    let _alone = alone();
    let mut dice = Dice(u64::from(std::process::id()));
    let mut took = Duration::from_millis(100);
    let mut failed = 0;
    for n in 0..times() {
        let mut tree = Tree::start(2, &["env"]);
        let last = tree.pids.pop_last().unwrap();
        let start = Instant::now();
        let dumper = tree.dump().arg("--leave-running").spawn().unwrap();
        dice.wait(took);
        kill(Pid::from_raw(last), Signal::SIGKILL).unwrap();
        let out = dumper.wait_with_output().unwrap();
        took = start.elapsed();
        match out.status.code() {
            Some(0) => assert!(tree.goes_on(), "{n}"),
            _ => {
                failed += 1;
                assert_unharmed(&tree, &out, &[""]);
                assert!(!said(&out).is_empty());
            }
        }
        tree.kill();
    }
    println!("{failed} dumps failed");
}
