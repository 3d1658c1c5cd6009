//! A dump that is killed at any moment leaves the tree as it was, and the next
//! dump works.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, raise};
use rcr_engine::Tree;
use rcr_engine::dump::{DumpOptions, dump};
use rcr_engine::freeze::freeze;
use rcr_engine::image::ImageSink;

/// In the environment: which part a process plays, and of which pid it is.
const PART: &str = "RCR_KILLED_PART";
const TARGET: &str = "RCR_KILLED_TARGET";
/// In the environment: how many dumps are killed.
const KILLS: &str = "RCR_KILLS";
const KILLS_USUAL: u64 = 150;
/// A dump of the workload takes some milliseconds; the moments lie in all of it.
const MOMENT_MAX: u64 = 25_000;

fn part(name: &str, target: u32) -> Child {
    let test = match name {
        "workload" => "plays_the_workload",
        _ => "plays_the_dumper",
    };
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(PART, name)
        .env(TARGET, target.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits for a mark on what a part prints.
fn wait_for_mark(child: &mut Child) {
    let out = child.stdout.as_mut().unwrap();
    let mut byte = [0];
    while byte != [b'!'] {
        out.read_exact(&mut byte).unwrap();
    }
}

/// Threads in calls of all kinds, in the vDSO and in computations; any of them
/// that finds something wrong ends the process.
#[test]
#[ignore = "a part of the test below"]
fn plays_the_workload() {
    if std::env::var(PART).as_deref() != Ok("workload") {
        return;
    }
    thread::spawn(|| {
        let mut last = Instant::now();
        loop {
            let now = Instant::now();
            if now < last {
                std::process::abort();
            }
            last = now;
        }
    });
    thread::spawn(|| {
        let (mut n, mut x) = (0_u64, 0.0_f64);
        loop {
            // Both count, in registers of two kinds.
            for _ in 0..10_000 {
                n = std::hint::black_box(n + 1);
                x = std::hint::black_box(x + 1.0);
            }
            if x != n as f64 {
                std::process::abort();
            }
        }
    });
    thread::spawn(|| {
        loop {
            let start = Instant::now();
            thread::sleep(Duration::from_micros(300));
            if start.elapsed() < Duration::from_micros(300) {
                std::process::abort();
            }
        }
    });
    let (ask, asked) = mpsc::sync_channel::<u64>(0);
    thread::spawn(move || {
        for n in 0_u64.. {
            ask.send(n).unwrap();
        }
    });
    thread::spawn(move || {
        for n in 0_u64.. {
            if asked.recv() != Ok(n) {
                std::process::abort();
            }
        }
    });
    let (mut from, mut to) = io::pipe().unwrap();
    thread::spawn(move || to.write_all(&[0; 5000]));
    thread::spawn(move || {
        let blocked: SigSet = [Signal::SIGURG, Signal::SIGUSR1].into_iter().collect();
        blocked.thread_block().unwrap();
        raise(Signal::SIGURG).unwrap();
        let mut byte = [0; 5000];
        from.read_exact(&mut byte).unwrap();
        print!("!");
        io::stdout().flush().unwrap();
        // The standard output leads out of the tree, as whatever else was left
        // open for this test. It goes last: its end tells that all is ready.
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let fds = fds.filter_map(|f| f.unwrap().file_name().to_str()?.parse::<i32>().ok());
        for fd in fds.collect::<Vec<_>>() {
            let name = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            if fd > 2 && !name.to_string_lossy().starts_with("pipe:") {
                let _ = nix::unistd::close(fd);
            }
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        nix::unistd::dup2_stdout(&null).unwrap();
        drop(null);
        let _ = from.read(&mut byte);
    });
    loop {
        thread::park();
    }
}

/// Keeps nothing.
#[derive(Default)]
struct Nowhere(Vec<Vec<u8>>);

impl ImageSink for Nowhere {
    fn put(&mut self, _: &str, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&mut self, _: &str, len: usize) -> io::Result<&mut [u8]> {
        self.0.push(vec![0; len]);
        Ok(self.0.last_mut().unwrap())
    }
}

fn dump_once(pid: i32) {
    let frozen = freeze(&Tree::Root(pid)).unwrap();
    dump(&frozen, &mut Nowhere::default(), &DumpOptions::default()).unwrap();
}

#[test]
#[ignore = "a part of the test below"]
fn plays_the_dumper() {
    let Ok(part) = std::env::var(PART) else {
        return;
    };
    let pid = std::env::var(TARGET).unwrap().parse().unwrap();
    print!("!");
    io::stdout().flush().unwrap();
    loop {
        dump_once(pid);
        if part != "dump for ever" {
            break;
        }
    }
}

/// What must be as before: of each thread, what `status` says of tracing and
/// signals; the size of the memory, and whether code of ours is in it.
fn state(pid: u32) -> BTreeMap<String, Vec<String>> {
    let mut out = BTreeMap::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = task.unwrap().path().join("status");
        let text = std::fs::read_to_string(&path).unwrap();
        let keys = ["TracerPid:", "SigPnd:", "ShdPnd:", "SigBlk:", "VmSize:"];
        let lines = text
            .lines()
            .filter(|l| keys.iter().any(|k| l.starts_with(k)));
        let lines = lines.map(str::to_owned).collect();
        out.insert(path.display().to_string(), lines);
    }
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let code = maps
        .lines()
        .filter(|l| l.contains(" r-xp 00000000 00:00 0 "));
    let code = code.filter(|l| l.trim_end().ends_with(" 0"));
    out.insert("code".into(), code.map(str::to_owned).collect());
    out
}

/// Whether the state becomes that one.
fn settles(pid: u32, wanted: &BTreeMap<String, Vec<String>>) -> bool {
    let end = Instant::now() + Duration::from_secs(2);
    while &state(pid) != wanted {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Ends with the test, however that ends.
struct Workload(Child);

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_dump_leaves_the_tree_as_it_was() {
    let mut workload = Workload(part("workload", 0));
    let workload = &mut workload.0;
    let pid = workload.id();
    wait_for_mark(workload);
    // It has forgotten what it prints to.
    let mut rest = Vec::new();
    workload
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut rest)
        .unwrap();
    assert!(part("dump", pid).wait().unwrap().success());
    let before = state(pid);
    let kills = std::env::var(KILLS).map_or(KILLS_USUAL, |k| k.parse().unwrap());
    let mut random = u64::from(pid);
    let mut left_behind = 0;
    for n in 0..kills {
        let mut dumper = part("dump for ever", pid);
        wait_for_mark(&mut dumper);
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        thread::sleep(Duration::from_micros((random >> 33) % MOMENT_MAX));
        dumper.kill().unwrap();
        let ended = dumper.wait().unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGKILL), "kill {n}");
        let alive = workload.try_wait().unwrap();
        assert_eq!(alive, None, "kill {n} ended the workload");
        if !settles(pid, &before) {
            // Our mapping, if it was just passed from one thread to another.
            left_behind += 1;
            let now = state(pid);
            assert!(part("dump", pid).wait().unwrap().success());
            assert!(settles(pid, &before), "kill {n} left {now:#?}\n{before:#?}");
        }
    }
    println!("{left_behind} mappings were left behind by {kills} killed dumps");
    assert!(part("dump", pid).wait().unwrap().success());
    assert_eq!(workload.try_wait().unwrap(), None);
}
