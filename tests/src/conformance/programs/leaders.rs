//! First threads that have ended, crowds of threads, trees on the move.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "threads/dead-first",
        "the first thread has ended, others live on",
        dead_first,
    ),
    Case::new("threads/crowd", "two thousand threads", crowd),
    Case::new(
        "process/forking",
        "a tree that forks all the time while it is stopped",
        forking,
    )
    .restless(),
    Case::new(
        "threads/cloning",
        "a process that starts threads all the time while it is stopped",
        cloning,
    )
    .restless(),
    Case::new(
        "process/executing",
        "processes that vfork and execute all the time while they are stopped",
        executing,
    )
    .restless(),
];

fn dead_first(stage: &Stage) -> Result<Check> {
    let path = stage.path("held");
    let headless = Member::start_headless("without a first thread", move || {
        let file = std::fs::File::create(path)?;
        let data = Box::new(AtomicU64::new(41));
        let pid = std::process::id();
        let tid = sys::gettid();
        ensure!(pid as i32 != tid, "this is the first thread");
        let ignored = sys::prctl(libc::PR_SET_NAME, &[c"second".as_ptr() as i64]);
        ensure!(ignored.is_ok(), "name");
        Ok(Box::new(move |f: &mut Findings| {
            f.same("process", &pid, &std::process::id());
            f.same("thread", &tid, &sys::gettid());
            f.same("memory", &41, &data.load(Ordering::SeqCst));
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            f.that("the first thread is dead", state.contains(") Z "));
            f.same("its file", &0, &file.metadata()?.len());
            let children = thread::spawn(|| 5).join();
            f.same("a new thread", &Some(5), &children.ok());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| headless.check(f)))
}

fn crowd(_: &Stage) -> Result<Check> {
    const THREADS: usize = 2000;
    let answered = Arc::new(AtomicU64::new(0));
    let round = Arc::new(sys::Map::forever(4096)?);
    for _ in 0..THREADS {
        let (answered, round) = (answered.clone(), round.clone());
        let small = thread::Builder::new().stack_size(64 << 10);
        small.spawn(move || {
            let mut seen = 0;
            let tid = sys::gettid();
            loop {
                while round.futex(0).load(Ordering::SeqCst) == seen {
                    sys::futex_wait(round.futex(0), seen);
                }
                seen = round.futex(0).load(Ordering::SeqCst);
                if sys::gettid() == tid {
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            }
        })?;
    }
    let mut rounds = 0;
    Ok(Box::new(move |f| {
        rounds += 1;
        round.futex(0).fetch_add(1, Ordering::SeqCst);
        sys::futex_wake(round.futex(0));
        sys::await_word(&answered, rounds * THREADS as u64);
        let is = answered.load(Ordering::SeqCst);
        f.same("answers", &(rounds * THREADS as u64), &is);
        Ok(())
    }))
}

/// Counts in a shared word by which the work is seen to go on.
fn goes_on(words: &'static Map) -> Check {
    Box::new(move |f: &mut Findings| {
        let turns = words.word(0).load(Ordering::SeqCst);
        sys::await_word(words.word(0), turns + 3);
        f.same("failures", &0, &words.word(1).load(Ordering::SeqCst));
        Ok(())
    })
}

fn forking(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    for _ in 0..3 {
        // SAFETY: one thread; the processes fork, wait and exit.
        if let ForkResult::Child = unsafe { fork() }? {
            loop {
                // SAFETY: as above.
                match unsafe { fork() } {
                    Ok(ForkResult::Child) => {
                        // SAFETY: as above.
                        if let Ok(ForkResult::Parent { child }) = unsafe { fork() } {
                            let _ = waitpid(child, None);
                        }
                        // SAFETY: leaves at once.
                        unsafe { libc::_exit(9) }
                    }
                    Ok(ForkResult::Parent { child }) => {
                        let ended = waitpid(child, None);
                        let good = ended == Ok(WaitStatus::Exited(child, 9));
                        words.word(1).fetch_add(u64::from(!good), Ordering::SeqCst);
                    }
                    Err(_) => {
                        words.word(1).fetch_add(1, Ordering::SeqCst);
                    }
                }
                words.word(0).fetch_add(1, Ordering::SeqCst);
            }
        }
    }
    sys::await_word(words.word(0), 30);
    Ok(goes_on(words))
}

fn cloning(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let stop = Arc::new(AtomicBool::new(false));
    for _ in 0..2 {
        let stop = stop.clone();
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let four: Vec<_> = (0..4).map(|n| thread::spawn(move || n)).collect();
                for (n, t) in four.into_iter().enumerate() {
                    let good = t.join().is_ok_and(|v| v == n);
                    words.word(1).fetch_add(u64::from(!good), Ordering::SeqCst);
                }
                words.word(0).fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    sys::await_word(words.word(0), 30);
    Ok(goes_on(words))
}

fn executing(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    // SAFETY: one thread; the child starts programs.
    let child = match unsafe { fork() }? {
        ForkResult::Child => loop {
            let ended = std::process::Command::new("/bin/true").status();
            let good = ended.is_ok_and(|s| s.success());
            words.word(1).fetch_add(u64::from(!good), Ordering::SeqCst);
            words.word(0).fetch_add(1, Ordering::SeqCst);
        },
        ForkResult::Parent { child } => child,
    };
    sys::await_word(words.word(0), 10);
    let mut going = goes_on(words);
    Ok(Box::new(move |f| {
        going(f)?;
        f.that("it lives", kill(child, None::<Signal>).is_ok());
        Ok(())
    }))
}
