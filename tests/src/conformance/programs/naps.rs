//! Sleeps with a timeout: what is left of it is what is slept.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, fork};

use super::blocked::{await_that, in_call};
use super::timers::SECOND;
use crate::conformance::stage::POLL;
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "timers/rest-of-nanosleep",
        "nanosleep(2) goes on with what is left, told or not",
        rest_of_nanosleep,
    ),
    Case::new(
        "timers/rest-of-clock-nanosleep",
        "clock_nanosleep(2) goes on with what is left",
        rest_of_clock_nanosleep,
    ),
    Case::new(
        "timers/rest-of-poll",
        "poll(2) goes on with what is left of its timeout",
        rest_of_poll,
    ),
    Case::new(
        "timers/rest-of-futex",
        "a futex(2) wait goes on with what is left of its timeout",
        rest_of_futex,
    ),
    Case::new(
        "timers/rest-of-select",
        "pselect(2) and ppoll(2) go on with what is left",
        rest_of_select,
    ),
    Case::new(
        "timers/restarted-sleep",
        "a sleep that the kernel has restarted before",
        restarted_sleep,
    ),
];

/// How long they sleep, how much of it is over before the dump, and how long
/// something that starts after the restore may take at most.
const WHOLE: i64 = 2 * SECOND;
const OVER: i64 = WHOLE * 3 / 4;
const FRESH: u64 = 1700;

/// A call that sleeps [`WHOLE`]: its number and how it is made. It gives 0 if
/// it ended as it should.
type Sleep = (i64, fn() -> i64);

fn timespec(ns: i64) -> [i64; 2] {
    [ns / SECOND, ns % SECOND]
}

fn result(r: std::io::Result<i64>) -> i64 {
    r.unwrap_or_else(|e| -i64::from(e.raw_os_error().unwrap_or(1)))
}

/// Starts the sleeps, lets most of their time pass, and gives a check that
/// they end in time.
fn sleeps(all: &'static [Sleep]) -> Result<Check> {
    static ENDED: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    let start = move || -> Result<()> {
        let begun = sys::clock(libc::CLOCK_MONOTONIC);
        for (number, call) in all {
            let (said, tid) = std::sync::mpsc::channel();
            thread::spawn(move || {
                let _ = said.send(sys::gettid());
                let from = sys::clock(libc::CLOCK_MONOTONIC);
                let wrong = call() != 0;
                let early = sys::clock(libc::CLOCK_MONOTONIC) - from < WHOLE;
                WRONG.fetch_add(u64::from(wrong || early), Ordering::SeqCst);
                ENDED.fetch_add(1, Ordering::SeqCst);
                // Its end would be a change that nobody asked for.
                loop {
                    thread::park();
                }
            });
            let tid = tid.recv()?;
            await_that(&|| in_call(tid, *number));
        }
        while sys::clock(libc::CLOCK_MONOTONIC) - begun < OVER {
            thread::sleep(POLL);
        }
        Ok(())
    };
    start()?;
    let mut count = all.len() as u64;
    Ok(Box::new(move |f| {
        thread::sleep(std::time::Duration::from_millis(FRESH));
        // A sleep begun after the restore is over, so theirs are, too.
        f.same("ended", &count, &ENDED.load(Ordering::SeqCst));
        f.same("wrong or early", &0, &WRONG.load(Ordering::SeqCst));
        count += all.len() as u64;
        start()
    }))
}

fn nanosleep(told: bool) -> i64 {
    let (t, mut left) = (timespec(WHOLE), [0_i64; 2]);
    let left = if told { left.as_mut_ptr() as u64 } else { 0 };
    let args = [t.as_ptr() as u64, left, 0, 0, 0, 0];
    // SAFETY: both outlive the call.
    result(unsafe { sys::call(libc::SYS_nanosleep, args) })
}

fn rest_of_nanosleep(_: &Stage) -> Result<Check> {
    sleeps(&[
        (libc::SYS_nanosleep, || nanosleep(false)),
        (libc::SYS_nanosleep, || nanosleep(true)),
    ])
}

fn clock_nanosleep(clock: i32) -> i64 {
    let t = timespec(WHOLE);
    let args = [clock as u64, 0, t.as_ptr() as u64, 0, 0, 0];
    // SAFETY: it outlives the call.
    result(unsafe { sys::call(libc::SYS_clock_nanosleep, args) })
}

fn rest_of_clock_nanosleep(_: &Stage) -> Result<Check> {
    sleeps(&[
        (libc::SYS_clock_nanosleep, || {
            clock_nanosleep(libc::CLOCK_MONOTONIC)
        }),
        (libc::SYS_clock_nanosleep, || {
            clock_nanosleep(libc::CLOCK_BOOTTIME)
        }),
    ])
}

fn rest_of_poll(_: &Stage) -> Result<Check> {
    sleeps(&[(libc::SYS_poll, || {
        let ms = (WHOLE / 1_000_000) as u64;
        // SAFETY: no descriptors.
        result(unsafe { sys::call(libc::SYS_poll, [0, 0, ms, 0, 0, 0]) })
    })])
}

fn rest_of_futex(_: &Stage) -> Result<Check> {
    static WORD: AtomicU32 = AtomicU32::new(3);
    sleeps(&[(libc::SYS_futex, || {
        let t = timespec(WHOLE);
        let at = WORD.as_ptr() as u64;
        let args = [at, libc::FUTEX_WAIT as u64, 3, t.as_ptr() as u64, 0, 0];
        // SAFETY: word and timespec outlive the call.
        let r = result(unsafe { sys::call(libc::SYS_futex, args) });
        r + i64::from(libc::ETIMEDOUT)
    })])
}

fn rest_of_select(_: &Stage) -> Result<Check> {
    sleeps(&[
        (libc::SYS_pselect6, || {
            let mut t = timespec(WHOLE);
            let args = [0, 0, 0, 0, t.as_mut_ptr() as u64, 0];
            // SAFETY: no descriptors; the timespec outlives the call.
            result(unsafe { sys::call(libc::SYS_pselect6, args) })
        }),
        (libc::SYS_ppoll, || {
            let mut t = timespec(WHOLE);
            // SAFETY: as above.
            result(unsafe {
                let args = [0, 0, t.as_mut_ptr() as u64, 0, 8, 0];
                sys::call(libc::SYS_ppoll, args)
            })
        }),
    ])
}

fn restarted_sleep(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let mut children = Vec::new();
    for n in 0..3_usize {
        // SAFETY: one thread; the children only sleep.
        match unsafe { fork() }? {
            ForkResult::Child => loop {
                let r = match n {
                    0 => nanosleep(false),
                    1 => clock_nanosleep(libc::CLOCK_MONOTONIC),
                    // SAFETY: no descriptors.
                    _ => result(unsafe { sys::call(libc::SYS_poll, [0, 0, 2000, 0, 0, 0]) }),
                };
                if r != 0 {
                    words.word(8).fetch_add(1, Ordering::SeqCst);
                }
                words.word(n).fetch_add(1, Ordering::SeqCst);
            },
            ForkResult::Parent { child } => children.push(child),
        }
    }
    let is_restarted = |pid: nix::unistd::Pid| {
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        call.starts_with(&format!("{} ", libc::SYS_restart_syscall))
    };
    for &child in &children {
        let asleep = move || {
            let call = std::fs::read_to_string(format!("/proc/{child}/syscall"));
            call.unwrap_or_default().contains(' ')
        };
        await_that(&asleep);
        let mut tries = 0;
        while !is_restarted(child) {
            tries += 1;
            ensure!(tries < 1000, "the kernel does not restart a sleep");
            kill(child, Signal::SIGSTOP)?;
            await_that(&|| {
                let stat = std::fs::read_to_string(format!("/proc/{child}/stat"));
                stat.unwrap_or_default().contains(") T ")
            });
            kill(child, Signal::SIGCONT)?;
            thread::sleep(POLL);
        }
    }
    Ok(Box::new(move |f| {
        for n in 0..children.len() {
            let turns = words.word(n).load(Ordering::SeqCst);
            sys::await_word(words.word(n), turns + 1);
        }
        let failed = words.word(8).load(Ordering::SeqCst);
        f.same("sleeps that did not end by themselves", &0, &failed);
        Ok(())
    }))
}
