//! Seccomp filters: several, spread over threads, different for each thread.

use std::sync::mpsc;
use std::thread;

use anyhow::{Result, ensure};

use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "seccomp/filters",
        "three filters one upon the other",
        filters,
    ),
    Case::new("seccomp/tsync", "a filter spread over all threads", tsync),
    Case::new("seccomp/threads", "other filters for each thread", threads),
    Case::new(
        "seccomp/user",
        "filters of a user without capabilities",
        user,
    ),
];

/// Calls that nothing here needs.
const SPARE: [i64; 4] = [
    libc::SYS_sync,
    libc::SYS_getpgrp,
    libc::SYS_mknod,
    libc::SYS_settimeofday,
];

/// A filter that answers one call with an error number.
fn forbid(number: i64, errno: i32, flags: u64) -> Result<()> {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        line(LOAD, 0, 0, 0),
        line(JUMP_IF_EQUAL, 0, 1, number as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let head = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let args = [1, flags, &raw const head as u64, 0, 0, 0];
    // SAFETY: the program outlives the call.
    let r = unsafe { sys::call(libc::SYS_seccomp, args) }?;
    ensure!(r == 0, "thread {r} could not take the filter");
    Ok(())
}

/// The error numbers that the spare calls end with, 0 for none.
fn answers() -> Vec<i32> {
    // mknod(0, 0, 0) and settimeofday(0, 0) do nothing where they are allowed.
    let answer = |&n: &i64| match sys::numbers(n, &[0, 0, 0]) {
        Ok(_) => 0,
        Err(e) => e.raw_os_error().unwrap_or(-1),
    };
    SPARE.iter().map(answer).collect()
}

fn filters(_: &Stage) -> Result<Check> {
    for (n, errno) in [(0, 91), (1, 92), (2, 93)] {
        forbid(SPARE[n], errno, 0)?;
    }
    let was = answers();
    ensure!(was[..3] == [91, 92, 93], "{was:?}");
    Ok(Box::new(move |f| {
        f.same("answers", &was, &answers());
        Ok(())
    }))
}

/// A thread that tells its answers when asked.
struct Worker {
    ask: mpsc::Sender<()>,
    answer: mpsc::Receiver<Result<Vec<i32>, String>>,
}

impl Worker {
    fn start(change: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Self> {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        thread::spawn(move || {
            let changed = change().map_err(|e| e.to_string());
            let _ = answered.send(changed.map(|()| vec![]));
            while asked.recv().is_ok() && answered.send(Ok(answers())).is_ok() {}
        });
        let up = answer.recv()?;
        ensure!(up.is_ok(), "{up:?}");
        Ok(Self { ask, answer })
    }

    fn answers(&self) -> Result<Vec<i32>> {
        self.ask.send(())?;
        self.answer.recv()?.map_err(anyhow::Error::msg)
    }
}

fn tsync(_: &Stage) -> Result<Check> {
    const TSYNC: u64 = 1;
    let workers = [Worker::start(|| Ok(()))?, Worker::start(|| Ok(()))?];
    forbid(SPARE[0], 95, TSYNC)?;
    forbid(SPARE[1], 96, TSYNC)?;
    let was = answers();
    ensure!(was[..2] == [95, 96], "{was:?}");
    Ok(Box::new(move |f| {
        f.same("the first thread", &was, &answers());
        for w in &workers {
            f.same("a thread", &was, &w.answers()?);
        }
        Ok(())
    }))
}

fn threads(_: &Stage) -> Result<Check> {
    forbid(SPARE[0], 95, 0)?;
    let mut workers = Vec::new();
    for n in 1..4 {
        let worker = Worker::start(move || forbid(SPARE[n], 100 + n as i32, 0))?;
        let was = worker.answers()?;
        ensure!(was[0] == 95 && was[n] == 100 + n as i32, "{was:?}");
        workers.push((worker, was));
    }
    let own = answers();
    Ok(Box::new(move |f| {
        f.same("the first thread", &own, &answers());
        for (w, was) in &workers {
            f.same("a thread", was, &w.answers()?);
        }
        Ok(())
    }))
}

fn user(_: &Stage) -> Result<Check> {
    let member = Member::start("the confined user", || {
        let (uid, gid) = (
            nix::unistd::Uid::from_raw(33),
            nix::unistd::Gid::from_raw(33),
        );
        nix::sys::prctl::set_no_new_privs()?;
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(uid, uid, uid)?;
        // Neither ids nor capabilities may be changed, nor filters added.
        for call in [libc::SYS_setresuid, libc::SYS_capset, libc::SYS_prctl] {
            forbid(call, 97, 0)?;
        }
        let worker = Worker::start(|| Ok(()))?;
        forbid(SPARE[0], 98, 1)?;
        let was = answers();
        ensure!(was[0] == 98, "{was:?}");
        Ok(Box::new(move |f: &mut Findings| {
            f.same("answers", &was, &answers());
            f.same("a thread's answers", &was, &worker.answers()?);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}
