//! Processes: trees, sessions, zombies, limits, names, scheduling, cgroups.

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpgid, getppid, getsid, setpgid, setsid};

use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("process/tree", "children and grandchildren", tree),
    Case::new(
        "process/zombies",
        "ended children keep their status",
        zombies,
    ),
    Case::new("process/sessions", "sessions and process groups", sessions),
    Case::new(
        "process/dead-leader",
        "a session whose leader has ended",
        dead_leader,
    ),
    Case::new(
        "process/subreaper",
        "orphans come to a subreaper",
        subreaper,
    ),
    Case::new("process/limits", "resource limits", limits),
    Case::new("process/names", "comm and command line", names),
    Case::new("process/oom", "oom_score_adj and coredump_filter", oom),
    Case::new(
        "process/scheduling",
        "policies, nice, affinity, I/O",
        scheduling,
    ),
    Case::new("process/mdwe", "memory-deny-write-execute", mdwe),
    Case::new(
        "process/no-huge-pages",
        "transparent huge pages off",
        no_huge_pages,
    ),
    Case::new("process/personality", "personality", personality),
    Case::new(
        "process/cgroup",
        "cgroup placement; frozen by cgroup",
        cgroup,
    )
    .in_cgroup(),
];

fn parent_is(pid: i32) -> Check {
    let me = std::process::id();
    Box::new(move |f: &mut Findings| {
        f.same("process id", &me, &std::process::id());
        f.same("parent", &pid, &getppid().as_raw());
        Ok(())
    })
}

fn tree(_: &Stage) -> Result<Check> {
    let me = std::process::id() as i32;
    let mut members = Vec::new();
    for n in 0..3 {
        let member = Member::start(&format!("child {n}"), move || {
            let here = std::process::id() as i32;
            let inner = Member::start("grandchild", move || Ok(parent_is(here)))?;
            let mut own = parent_is(me);
            Ok(Box::new(move |f: &mut Findings| {
                own(f)?;
                inner.check(f)
            }) as Check)
        })?;
        members.push(member);
    }
    Ok(Box::new(move |f| {
        for m in &members {
            m.check(f)?;
        }
        // A new child is noticed when it ends, so the parent is a parent still.
        // SAFETY: the child leaves at once.
        match unsafe { fork() }? {
            // SAFETY: as above.
            ForkResult::Child => unsafe { libc::_exit(7) },
            ForkResult::Parent { child } => {
                f.same(
                    "a new child",
                    &WaitStatus::Exited(child, 7),
                    &waitpid(child, None)?,
                );
            }
        }
        Ok(())
    }))
}

/// Children that have ended and were not waited for.
fn make_zombies() -> Result<Vec<WaitStatus>> {
    let mut want = Vec::new();
    for how in 0..3 {
        // SAFETY: the children end at once or pause.
        match unsafe { fork() }? {
            // SAFETY: as above.
            ForkResult::Child if how == 0 => unsafe { libc::_exit(42) },
            ForkResult::Child => loop {
                nix::unistd::pause();
            },
            ForkResult::Parent { child } => {
                let signal = [Signal::SIGCHLD, Signal::SIGKILL, Signal::SIGTERM][how];
                if how > 0 {
                    kill(child, signal)?;
                    want.push(WaitStatus::Signaled(child, signal, false));
                } else {
                    want.push(WaitStatus::Exited(child, 42));
                }
                let stat = format!("/proc/{child}/stat");
                while !fs::read_to_string(&stat)?.contains(") Z ") {
                    thread::yield_now();
                }
            }
        }
    }
    Ok(want)
}

fn zombies(_: &Stage) -> Result<Check> {
    let mut want = make_zombies()?;
    Ok(Box::new(move |f| {
        for status in &want {
            let pid = status.pid().context("a pid")?;
            f.same("status", &Ok(*status), &waitpid(pid, None));
        }
        want = make_zombies()?;
        Ok(())
    }))
}

/// Where a process belongs.
fn place() -> Result<(i32, i32, i32)> {
    let me = Pid::from_raw(0);
    Ok((
        std::process::id() as i32,
        getpgid(Some(me))?.as_raw(),
        getsid(Some(me))?.as_raw(),
    ))
}

fn same_place() -> Result<Check> {
    let was = place()?;
    Ok(Box::new(move |f: &mut Findings| {
        f.same("pid, group, session", &was, &place()?);
        Ok(())
    }))
}

fn sessions(_: &Stage) -> Result<Check> {
    let zero = Pid::from_raw(0);
    let plain = Member::start("same group", same_place)?;
    let leader = Member::start("group leader", move || {
        setpgid(zero, zero)?;
        same_place()
    })?;
    let joined = leader.pid;
    let follower = Member::start("group member", move || {
        setpgid(zero, Pid::from_raw(joined))?;
        same_place()
    })?;
    let session = Member::start("session leader", || {
        setsid()?;
        let inner = Member::start("in its session", same_place)?;
        let group = Member::start("group in its session", || {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            same_place()
        })?;
        let mut own = same_place()?;
        Ok(Box::new(move |f: &mut Findings| {
            own(f)?;
            inner.check(f)?;
            group.check(f)
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        for m in [&plain, &leader, &follower, &session] {
            m.check(f)?;
        }
        Ok(())
    }))
}

fn dead_leader(_: &Stage) -> Result<Check> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let words = Map::forever(4096)?;
    // The leader makes a child and ends; the child stays in its session.
    // SAFETY: one thread.
    let leader = match unsafe { fork() }? {
        ForkResult::Child => {
            let done = setsid()
                .map_err(anyhow::Error::from)
                .and_then(|_| orphan(words));
            // SAFETY: leaves at once.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        ForkResult::Parent { child } => child,
    };
    ensure!(
        waitpid(leader, None)? == WaitStatus::Exited(leader, 0),
        "the leader"
    );
    sys::await_word(words.word(0), 1);
    let child = Pid::from_raw(words.word(0).load(Ordering::SeqCst) as i32);
    Ok(Box::new(move |f| {
        f.same("session", &leader, &getsid(Some(child))?);
        f.same("group", &leader, &getpgid(Some(child))?);
        let turns = words.word(1).load(Ordering::SeqCst);
        sys::await_word(words.word(1), turns + 2);
        Ok(())
    }))
}

/// Forks a process that counts in the second word and outlives its parent.
fn orphan(words: &'static Map) -> Result<()> {
    // SAFETY: one thread.
    if let ForkResult::Child = unsafe { fork() }? {
        let me = u64::from(std::process::id());
        words.word(0).store(me, Ordering::SeqCst);
        loop {
            words.word(1).fetch_add(1, Ordering::SeqCst);
            thread::sleep(crate::conformance::stage::POLL);
        }
    }
    Ok(())
}

fn subreaper(_: &Stage) -> Result<Check> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let words = Map::forever(4096)?;
    Ok(Box::new(move |f| {
        f.same("subreaper", &true, &nix::sys::prctl::get_child_subreaper()?);
        words.word(0).store(0, Ordering::SeqCst);
        // SAFETY: one thread.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let done = orphan(words);
                // SAFETY: leaves at once.
                unsafe { libc::_exit(i32::from(done.is_err())) }
            }
            ForkResult::Parent { child } => {
                waitpid(child, None)?;
            }
        }
        sys::await_word(words.word(0), 1);
        let orphan = Pid::from_raw(words.word(0).load(Ordering::SeqCst) as i32);
        kill(orphan, Signal::SIGKILL)?;
        let want = WaitStatus::Signaled(orphan, Signal::SIGKILL, false);
        f.same("the orphan's status", &Ok(want), &waitpid(orphan, None));
        Ok(())
    }))
}

fn limits(_: &Stage) -> Result<Check> {
    let all = [
        (Resource::RLIMIT_NOFILE, 500, 900),
        (Resource::RLIMIT_CORE, 0, 4096),
        (Resource::RLIMIT_STACK, 4 << 20, 16 << 20),
        (Resource::RLIMIT_MEMLOCK, 1 << 16, 1 << 20),
        (Resource::RLIMIT_SIGPENDING, 100, 200),
        (Resource::RLIMIT_DATA, 1 << 34, 1 << 35),
        (Resource::RLIMIT_NPROC, 3000, 4000),
        (Resource::RLIMIT_RTTIME, 1_000_000, 2_000_000),
        (Resource::RLIMIT_FSIZE, 1 << 20, 1 << 40),
    ];
    for (r, soft, hard) in all {
        let (_, allowed) = getrlimit(r)?;
        setrlimit(r, soft.min(allowed), hard.min(allowed))?;
    }
    let was: Vec<_> = all.iter().map(|l| getrlimit(l.0)).collect();
    Ok(Box::new(move |f| {
        for (l, was) in all.iter().zip(&was) {
            f.same(&format!("{:?}", l.0), was, &getrlimit(l.0));
        }
        Ok(())
    }))
}

fn names(_: &Stage) -> Result<Check> {
    nix::sys::prctl::set_name(c"renamed: (x) y")?;
    // As setproctitle does: over the arguments themselves.
    let stat = fs::read_to_string("/proc/self/stat")?;
    let rest = stat.rsplit(") ").next().context("stat")?;
    let start: usize = rest.split(' ').nth(45).context("arg_start")?.parse()?;
    // SAFETY: the arguments are writable memory, longer than these bytes;
    // nobody reads them as arguments any more.
    unsafe { std::ptr::copy_nonoverlapping(c"worker".as_ptr(), start as *mut i8, 7) };
    let read = || -> Result<_> {
        Ok((
            fs::read_to_string("/proc/self/comm")?,
            fs::read("/proc/self/cmdline")?,
            fs::read("/proc/self/environ")?,
            fs::read("/proc/self/auxv")?,
            fs::read_link("/proc/self/exe")?,
        ))
    };
    let was = read()?;
    ensure!(was.1.starts_with(b"worker\0"), "{:?}", was.1);
    Ok(Box::new(move |f| {
        f.same("comm, cmdline, environ, auxv, exe", &was, &read()?);
        Ok(())
    }))
}

fn oom(_: &Stage) -> Result<Check> {
    let files = [
        ("oom_score_adj", "321\n"),
        ("coredump_filter", "00000021\n"),
    ];
    fs::write("/proc/self/oom_score_adj", "321")?;
    fs::write("/proc/self/coredump_filter", "0x21")?;
    Ok(Box::new(move |f| {
        for (file, was) in files {
            let is = fs::read_to_string(format!("/proc/self/{file}"))?;
            f.same(file, was, is.as_str());
        }
        Ok(())
    }))
}

/// What the scheduler knows of the calling thread.
fn scheduled() -> Result<Vec<i64>> {
    let call = sys::numbers;
    let set = nix::sched::sched_getaffinity(Pid::from_raw(0))?;
    let mut param = 0_i32;
    let args = [0, &raw mut param as u64, 0, 0, 0, 0];
    // SAFETY: sched_param is one int.
    unsafe { sys::call(libc::SYS_sched_getparam, args) }?;
    Ok(vec![
        call(libc::SYS_sched_getscheduler, &[0])?,
        param.into(),
        call(libc::SYS_getpriority, &[0, 0])?,
        call(libc::SYS_ioprio_get, &[1, 0])?,
        sys::prctl(30, &[0, 0, 0, 0])?,
        i64::from(set.is_set(0)?),
        i64::from(set.is_set(1)?),
    ])
}

fn set_scheduler(policy: i32, priority: i32) -> Result<()> {
    let args = [0, policy as u64, &raw const priority as u64, 0, 0, 0];
    // SAFETY: sched_param is one int.
    unsafe { sys::call(libc::SYS_sched_setscheduler, args) }?;
    Ok(())
}

fn scheduling(_: &Stage) -> Result<Check> {
    const PR_SET_TIMERSLACK: i32 = 29;
    const RESET_ON_FORK: i32 = 0x4000_0000;
    type Change = fn() -> Result<()>;
    let changes: [Change; 6] = [
        || Ok(()),
        || {
            sys::numbers(libc::SYS_setpriority, &[0, 0, -7])
                .map(drop)
                .map_err(Into::into)
        },
        || set_scheduler(libc::SCHED_BATCH, 0),
        || set_scheduler(libc::SCHED_FIFO | RESET_ON_FORK, 3),
        || {
            sys::prctl(PR_SET_TIMERSLACK, &[777_000, 0, 0, 0])?;
            // Best effort, level 6.
            sys::numbers(libc::SYS_ioprio_set, &[1, 0, 2 << 13 | 6])?;
            set_scheduler(libc::SCHED_IDLE, 0)
        },
        || {
            let mut one = nix::sched::CpuSet::new();
            one.set(1)?;
            nix::sched::sched_setaffinity(Pid::from_raw(0), &one)?;
            set_scheduler(libc::SCHED_RR, 1)
        },
    ];
    let mut workers = Vec::new();
    for change in changes {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        thread::spawn(move || {
            let changed = change().map_err(|e| e.to_string());
            loop {
                let now = scheduled().map_err(|e| e.to_string());
                if answered.send((changed.clone(), now)).is_err() || asked.recv().is_err() {
                    return;
                }
            }
        });
        let was = answer.recv()?;
        ensure!(was.0.is_ok() && was.1.is_ok(), "{was:?}");
        workers.push((ask, answer, was));
    }
    Ok(Box::new(move |f| {
        for (ask, answer, was) in &workers {
            ask.send(())?;
            f.same(
                "policy, priority, nice, ioprio, slack, cpus",
                was,
                &answer.recv()?,
            );
        }
        Ok(())
    }))
}

fn mdwe(_: &Stage) -> Result<Check> {
    const PR_SET_MDWE: i32 = 65;
    const PR_GET_MDWE: i32 = 66;
    sys::prctl(PR_SET_MDWE, &[1, 0, 0, 0])?;
    Ok(Box::new(move |f| {
        f.same("MDWE", &1, &sys::prctl(PR_GET_MDWE, &[0, 0, 0, 0])?);
        use nix::sys::mman::{MapFlags, ProtFlags};
        let gained = Map::anonymous(4096, ProtFlags::all(), MapFlags::MAP_PRIVATE);
        f.that("no executable memory", gained.is_err());
        let map = Map::private(4096)?;
        let gained = map.protect(ProtFlags::PROT_READ | ProtFlags::PROT_EXEC);
        f.that("none by mprotect", gained.is_err());
        Ok(())
    }))
}

fn no_huge_pages(_: &Stage) -> Result<Check> {
    sys::prctl(41, &[1, 0, 0, 0])?;
    Ok(Box::new(move |f| {
        f.same("THP disabled", &1, &sys::prctl(42, &[0, 0, 0, 0])?);
        Ok(())
    }))
}

fn personality(_: &Stage) -> Result<Check> {
    const ADDR_NO_RANDOMIZE: i64 = 0x004_0000;
    sys::numbers(libc::SYS_personality, &[ADDR_NO_RANDOMIZE])?;
    Ok(Box::new(move |f| {
        let is = sys::numbers(libc::SYS_personality, &[0xffff_ffff])?;
        f.same("personality", &ADDR_NO_RANDOMIZE, &is);
        Ok(())
    }))
}

fn cgroup(_: &Stage) -> Result<Check> {
    let dir = std::path::PathBuf::from(std::env::var_os("RCR_CGROUP").context("no cgroup")?);
    fs::write(dir.join("cgroup.procs"), "0")?;
    let inner = dir.join("inner");
    fs::create_dir(&inner)?;
    let here = || -> Result<String> {
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let line = text
            .lines()
            .find(|l| l.starts_with("0::"))
            .context("cgroup")?;
        Ok(line.to_owned())
    };
    let member = Member::start("the process below", move || {
        fs::write(inner.join("cgroup.procs"), "0")?;
        let (tell, told) = mpsc::channel::<()>();
        thread::spawn(move || while told.recv().is_ok() {});
        let was = here()?;
        ensure!(was.ends_with("/inner"), "{was}");
        Ok(Box::new(move |f: &mut Findings| {
            tell.send(())?;
            f.same("cgroup", &was, &here()?);
            Ok(())
        }) as Check)
    })?;
    let was = here()?;
    Ok(Box::new(move |f| {
        f.same("cgroup", &was, &here()?);
        let frozen = fs::read_to_string(dir.join("cgroup.events"))?;
        f.that("the cgroup is thawed", frozen.contains("frozen 0"));
        member.check(f)
    }))
}
