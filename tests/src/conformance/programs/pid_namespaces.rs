//! PID namespaces: processes that have other ids for each other than for the host.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpgid, getppid, getsid, setpgid, setsid};

use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("pid-namespaces/init", "the first process of one", init).as_init(),
    Case::new(
        "pid-namespaces/tree",
        "children, sessions and groups in one",
        tree,
    )
    .as_init(),
    Case::new("pid-namespaces/threads", "threads in one", threads).as_init(),
    Case::new(
        "pid-namespaces/zombies",
        "ended children of the first process",
        zombies,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/orphans",
        "orphans of a dead session leader, which the first process reaps",
        orphans,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/unkillable",
        "the first process is not hurt by its children",
        unkillable,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/files",
        "record locks and SIGIO owners in one",
        files,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/signals",
        "pending signals know their senders in one",
        signals,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/timers",
        "a timer that signals a thread in one",
        timers,
    )
    .as_init(),
    Case::new(
        "pid-namespaces/terminal",
        "a session with a terminal and a foreground group in one",
        super::terminals::session,
    )
    .as_init()
    .alone(),
    Case::new("pid-namespaces/child", "one below the tree's", child),
    Case::new(
        "pid-namespaces/two",
        "two below the tree's, side by side",
        two,
    ),
    Case::new("pid-namespaces/nested", "one inside of another", nested).as_init(),
    Case::new(
        "pid-namespaces/empty",
        "one prepared for children to come",
        empty,
    ),
    Case::new(
        "pid-namespaces/member",
        "a tree in one whose first process is elsewhere",
        member,
    )
    .in_pid_ns(),
];

fn my_id() -> i32 {
    std::process::id() as i32
}

/// A process that knows its own id and its parent's.
fn knows(name: &str) -> Result<Member> {
    Member::start(name, || {
        let (me, parent) = (my_id(), getppid());
        Ok(Box::new(move |f: &mut Findings| {
            f.same("its id", &me, &my_id());
            f.same("its parent", &parent, &getppid());
            Ok(())
        }) as Check)
    })
}

fn init(_: &Stage) -> Result<Check> {
    ensure!(my_id() == 1, "not the first: {}", my_id());
    let member = knows("its child")?;
    ensure!(member.pid == 2, "child {}", member.pid);
    Ok(Box::new(move |f| {
        f.same("id", &1, &my_id());
        f.same("parent", &0, &getppid().as_raw());
        member.check(f)
    }))
}

fn tree(_: &Stage) -> Result<Check> {
    let mut members = Vec::new();
    for n in 0..3 {
        members.push(Member::start(&format!("child {n}"), move || {
            match n {
                0 => drop(setsid()?),
                1 => setpgid(Pid::from_raw(0), Pid::from_raw(0))?,
                _ => {}
            }
            let inner = knows("grandchild")?;
            let ids = || -> Result<_> { Ok((my_id(), getppid(), getsid(None)?, getpgid(None)?)) };
            let was = ids()?;
            Ok(Box::new(move |f: &mut Findings| {
                f.same("ids", &was, &ids()?);
                inner.check(f)
            }) as Check)
        })?);
    }
    Ok(Box::new(move |f| {
        for m in &members {
            f.same(
                "session seen from here",
                &true,
                &getsid(Some(Pid::from_raw(m.pid))).is_ok(),
            );
            m.check(f)?;
        }
        Ok(())
    }))
}

fn threads(_: &Stage) -> Result<Check> {
    let mut workers = Vec::new();
    for _ in 0..5 {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = answered.send(sys::gettid());
            while asked.recv().is_ok() && answered.send(sys::gettid()).is_ok() {}
        });
        let tid = answer.recv()?;
        workers.push((tid, ask, answer));
    }
    Ok(Box::new(move |f| {
        for (tid, ask, answer) in &workers {
            ask.send(())?;
            f.same("thread id", tid, &answer.recv()?);
        }
        f.same("own thread id", &1, &sys::gettid());
        Ok(())
    }))
}

fn zombies(_: &Stage) -> Result<Check> {
    let mut want = Vec::new();
    let mut make = move || -> Result<Vec<WaitStatus>> {
        want.clear();
        for how in 0..2 {
            // SAFETY: the children end at once or pause.
            match unsafe { fork() }? {
                // SAFETY: as above.
                ForkResult::Child if how == 0 => unsafe { libc::_exit(21) },
                ForkResult::Child => loop {
                    nix::unistd::pause();
                },
                ForkResult::Parent { child } if how == 0 => {
                    want.push(WaitStatus::Exited(child, 21));
                }
                ForkResult::Parent { child } => {
                    kill(child, Signal::SIGTERM)?;
                    want.push(WaitStatus::Signaled(child, Signal::SIGTERM, false));
                }
            }
        }
        Ok(want.clone())
    };
    let mut want = make()?;
    Ok(Box::new(move |f| {
        for status in &want {
            let pid = status.pid().context("pid")?;
            f.same("status", status, &waitpid(pid, None)?);
        }
        want = make()?;
        Ok(())
    }))
}

fn orphans(_: &Stage) -> Result<Check> {
    let board = Map::forever(4096)?;
    // SAFETY: one thread.
    let leader = match unsafe { fork() }? {
        ForkResult::Child => {
            setsid()?;
            // SAFETY: as above.
            if let ForkResult::Child = unsafe { fork() }? {
                board.word(0).store(my_id() as u64, Ordering::SeqCst);
                board
                    .word(1)
                    .store(getsid(None)?.as_raw() as u64, Ordering::SeqCst);
                sys::await_word(board.word(2), 1);
                let sid = getsid(None)?.as_raw() as u64;
                let same = sid == board.word(1).load(Ordering::SeqCst)
                    && my_id() as u64 == board.word(0).load(Ordering::SeqCst);
                // SAFETY: leaves at once.
                unsafe { libc::_exit(if same { 5 } else { 6 }) }
            }
            sys::await_word(board.word(0), 1);
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => child,
    };
    waitpid(leader, None)?;
    let orphan = Pid::from_raw(board.word(0).load(Ordering::SeqCst) as i32);
    let mut living = true;
    Ok(Box::new(move |f| {
        if std::mem::take(&mut living) {
            f.same("its session", &leader, &getsid(Some(orphan))?);
            board.word(2).store(1, Ordering::SeqCst);
            let status = waitpid(orphan, None)?;
            f.same("its end", &WaitStatus::Exited(orphan, 5), &status);
        }
        Ok(())
    }))
}

fn unkillable(_: &Stage) -> Result<Check> {
    let member = Member::start("the child", || {
        Ok(Box::new(|f: &mut Findings| {
            for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGSTOP] {
                f.that(
                    "it may be signalled",
                    kill(Pid::from_raw(1), signal).is_ok(),
                );
            }
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

/// Who is said to hold a lock on the first bytes of a file.
fn holder(file: &File) -> Result<i32> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 10,
        l_pid: 0,
    };
    let arg = nix::fcntl::FcntlArg::F_GETLK(&mut lock);
    nix::fcntl::fcntl(file, arg)?;
    Ok(lock.l_pid)
}

fn files(stage: &Stage) -> Result<Check> {
    let path = stage.path("locked");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    let me = i64::from(my_id());
    let fd = i64::from(file.as_raw_fd());
    let locker = Member::start("the locker", move || {
        let file = File::options().read(true).write(true).open(path)?;
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 10,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&lock))?;
        sys::numbers(
            libc::SYS_fcntl,
            &[file.as_raw_fd().into(), libc::F_SETOWN.into(), me],
        )?;
        Ok(Box::new(move |f: &mut Findings| {
            let args = [file.as_raw_fd().into(), libc::F_GETOWN.into(), 0];
            f.same("the owner", &me, &sys::numbers(libc::SYS_fcntl, &args)?);
            Ok(())
        }) as Check)
    })?;
    let child = i64::from(locker.pid);
    sys::numbers(libc::SYS_fcntl, &[fd, libc::F_SETOWN.into(), child])?;
    ensure!(holder(&file)? == locker.pid, "the lock is not there");
    Ok(Box::new(move |f| {
        f.same("the lock's holder", &locker.pid, &holder(&file)?);
        let owner = sys::numbers(libc::SYS_fcntl, &[fd, libc::F_GETOWN.into(), 0])?;
        f.same("the owner", &child, &owner);
        locker.check(f)
    }))
}

fn signals(_: &Stage) -> Result<Check> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    let send = || -> Result<i32> {
        // SAFETY: one thread; the child leaves at once.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let _ = kill(Pid::from_raw(1), Signal::SIGUSR1);
                // SAFETY: as above.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                waitpid(child, None)?;
                Ok(child.as_raw())
            }
        }
    };
    let mut sender = send()?;
    Ok(Box::new(move |f| {
        let fd = nix::sys::signalfd::SignalFd::with_flags(
            &set,
            nix::sys::signalfd::SfdFlags::SFD_NONBLOCK,
        )?;
        let found = fd.read_signal()?.map(|s| s.ssi_pid as i32);
        f.same("the sender", &Some(sender), &found);
        sender = send()?;
        Ok(())
    }))
}

fn timers(_: &Stage) -> Result<Check> {
    let (ask, asked) = mpsc::channel::<()>();
    let (answered, answer) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = answered.send(sys::gettid());
        while asked.recv().is_ok() {}
    });
    let tid = answer.recv()?;
    let mut event = [0_u32; 16];
    // struct sigevent: value, signal, how, thread.
    event[2] = libc::SIGURG as u32;
    event[3] = libc::SIGEV_THREAD_ID as u32;
    event[4] = tid as u32;
    let mut id = 0_i32;
    let args = [
        libc::CLOCK_MONOTONIC as u64,
        event.as_ptr() as u64,
        &raw mut id as u64,
        0,
        0,
        0,
    ];
    // SAFETY: both buffers outlive the call and have the sizes it takes.
    unsafe { sys::call(libc::SYS_timer_create, args) }?;
    Ok(Box::new(move |f| {
        ask.send(())?;
        let again = [id.into(), 0];
        f.that(
            "the timer is there",
            sys::numbers(libc::SYS_timer_getoverrun, &again).is_ok(),
        );
        Ok(())
    }))
}

/// A process whose child is the first of a new PID namespace.
fn below(name: &str) -> Result<Member> {
    let name = name.to_owned();
    Member::start(&name.clone(), move || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        let member = Member::start("the first", || {
            ensure!(my_id() == 1, "not the first: {}", my_id());
            let inner = knows("the second")?;
            ensure!(inner.pid == 2, "{}", inner.pid);
            Ok(Box::new(move |f: &mut Findings| {
                f.same("its id", &1, &my_id());
                f.same("its parent", &0, &getppid().as_raw());
                inner.check(f)
            }) as Check)
        })?;
        // Not of the first's making, but in its namespace.
        let other = knows("the third")?;
        Ok(Box::new(move |f: &mut Findings| {
            member.check(f)?;
            other.check(f)?;
            // SAFETY: the child leaves at once.
            match unsafe { fork() }? {
                // SAFETY: as above.
                ForkResult::Child => unsafe { libc::_exit((my_id() <= 3).into()) },
                ForkResult::Parent { child } => {
                    let status = waitpid(child, None)?;
                    f.same("a new child's end", &WaitStatus::Exited(child, 0), &status);
                }
            }
            Ok(())
        }) as Check)
    })
}

fn child(_: &Stage) -> Result<Check> {
    let member = below("the parent")?;
    Ok(Box::new(move |f| member.check(f)))
}

fn two(_: &Stage) -> Result<Check> {
    let members = [below("one")?, below("another")?];
    Ok(Box::new(move |f| {
        members.iter().try_for_each(|m| m.check(f))
    }))
}

fn nested(_: &Stage) -> Result<Check> {
    ensure!(my_id() == 1, "not the first: {}", my_id());
    let member = below("the parent")?;
    Ok(Box::new(move |f| {
        f.same("id", &1, &my_id());
        member.check(f)
    }))
}

fn empty(_: &Stage) -> Result<Check> {
    let member = Member::start("the process", || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        Ok(Box::new(|f: &mut Findings| {
            // SAFETY: the child leaves at once.
            match unsafe { fork() }? {
                // SAFETY: as above.
                ForkResult::Child => unsafe { libc::_exit(my_id()) },
                ForkResult::Parent { child } => {
                    let status = waitpid(child, None)?;
                    f.same("the first child", &WaitStatus::Exited(child, 1), &status);
                }
            }
            Ok(())
        }) as Check)
    })?;
    let mut fresh = true;
    Ok(Box::new(move |f| {
        // The namespace dies with its first process, so it can be tried once.
        if std::mem::take(&mut fresh) {
            member.check(f)?;
        }
        Ok(())
    }))
}

fn member(_: &Stage) -> Result<Check> {
    let me = my_id();
    ensure!(me == 2, "not in a namespace of its own: {me}");
    let member = knows("its child")?;
    ensure!(member.pid == 3, "child {}", member.pid);
    Ok(Box::new(move |f| {
        f.same("id", &me, &my_id());
        member.check(f)
    }))
}
