//! Time namespaces, and timers on the clocks of threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, fork};

use super::timers::{SECOND, handle};
use crate::conformance::case::Unavailable;
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "timers/time-namespaces",
        "processes in time namespaces of their own",
        time_namespaces,
    ),
    Case::new(
        "timers/time-for-children",
        "a process whose children will live in another time",
        time_for_children,
    ),
    Case::new(
        "timers/thread-clock",
        "a POSIX timer on the clock of another thread",
        thread_clock,
    ),
    Case::new(
        "timers/posix-clocks",
        "POSIX timers on every clock, with gaps between their ids",
        posix_clocks,
    ),
];

/// Further from the host's clock than any test takes, seconds.
const FAR: i64 = 1_000_000;

fn unshare_time(seconds: i64) -> Result<()> {
    // CLONE_NEWTIME shares its bit with the exit signal of clone(2).
    if unshare(CloneFlags::from_bits_retain(0x80)).is_err() {
        return Err(Unavailable::because("this kernel has no time namespaces"));
    }
    let text = format!("monotonic {seconds} 0\nboottime {} 0\n", 2 * seconds);
    std::fs::write("/proc/self/timens_offsets", text)?;
    Ok(())
}

/// How far the clocks are from those of the process that shares `words`.
fn apart(words: &Map) -> [i64; 2] {
    [(libc::CLOCK_MONOTONIC, 0), (libc::CLOCK_BOOTTIME, 1)].map(|(clock, at)| {
        let there = words.word(at).load(Ordering::SeqCst) as i64;
        (sys::clock(clock) - there) / (FAR * SECOND / 10)
    })
}

fn note(words: &Map) {
    for (clock, at) in [(libc::CLOCK_MONOTONIC, 0), (libc::CLOCK_BOOTTIME, 1)] {
        let now = sys::clock(clock) as u64;
        words.word(at).store(now, Ordering::SeqCst);
    }
}

fn time_namespaces(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    note(words);
    let mut members = Vec::new();
    for n in [1, 3] {
        // The child's own child is the first to live in the namespace.
        members.push(Member::start("between", move || {
            unshare_time(n * FAR)?;
            let inner = Member::start("far away", move || {
                let want = [10 * n, 20 * n];
                ensure!(apart(words) == want, "{:?}", apart(words));
                Ok(Box::new(move |f: &mut Findings| {
                    f.same("tenths apart", &want, &apart(words));
                    Ok(())
                }) as Check)
            })?;
            Ok(Box::new(move |f: &mut Findings| {
                f.same("here", &[0, 0], &apart(words));
                inner.check(f)
            }) as Check)
        })?);
    }
    Ok(Box::new(move |f| {
        note(words);
        for m in &members {
            m.check(f)?;
        }
        Ok(())
    }))
}

fn time_for_children(_: &Stage) -> Result<Check> {
    unshare_time(FAR)?;
    let words = Map::forever(4096)?;
    Ok(Box::new(move |f| {
        note(words);
        f.same("here", &[0, 0], &apart(words));
        words.word(2).store(0, Ordering::SeqCst);
        // SAFETY: one thread; the child leaves at once.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let far = apart(words) == [10, 20];
                words.word(2).store(u64::from(far), Ordering::SeqCst);
                // SAFETY: as above.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => drop(nix::sys::wait::waitpid(child, None)?),
        }
        let far = words.word(2).load(Ordering::SeqCst);
        f.same("a child is far away", &1, &far);
        Ok(())
    }))
}

/// A timer of the calling thread; `tid` is whom it signals.
fn create(clock: i32, notify: i32, tid: i32) -> Result<i32> {
    let mut event = [0_u64; 8];
    event[1] = libc::SIGUSR1 as u64 | (notify as u64) << 32;
    event[2] = tid as u64;
    let mut id = -1_i32;
    let args = [
        clock as u64,
        event.as_ptr() as u64,
        &raw mut id as u64,
        0,
        0,
        0,
    ];
    // SAFETY: sigevent has 64 bytes; both outlive the call.
    unsafe { sys::call(libc::SYS_timer_create, args) }?;
    Ok(id)
}

fn settime(id: i32, ns: i64) -> Result<()> {
    let value = [0, 0, ns / SECOND, ns % SECOND];
    let args = [id as u64, 0, value.as_ptr() as u64, 0, 0, 0];
    // SAFETY: an itimerspec that outlives the call.
    unsafe { sys::call(libc::SYS_timer_settime, args) }?;
    Ok(())
}

fn left(id: i32) -> Result<i64> {
    let mut value = [0_i64; 4];
    let args = [id as u64, value.as_mut_ptr() as u64, 0, 0, 0, 0];
    // SAFETY: as above.
    unsafe { sys::call(libc::SYS_timer_gettime, args) }?;
    Ok(value[2] * SECOND + value[3])
}

fn thread_clock(_: &Stage) -> Result<Check> {
    handle(nix::sys::signal::Signal::SIGUSR1)?;
    static BURN: AtomicU64 = AtomicU64::new(0);
    let (said, id) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let clock = libc::CLOCK_THREAD_CPUTIME_ID;
        let made = create(clock, libc::SIGEV_THREAD_ID, sys::gettid());
        let armed = made.and_then(|id| settime(id, 1000 * SECOND).map(|()| id));
        let _ = said.send(armed);
        loop {
            match BURN.load(Ordering::SeqCst) % 2 {
                0 => thread::sleep(crate::conformance::stage::POLL),
                _ => std::hint::spin_loop(),
            }
        }
    });
    let id = id.recv()??;
    let spend = |ns: i64| {
        let from = sys::clock(libc::CLOCK_THREAD_CPUTIME_ID);
        while sys::clock(libc::CLOCK_THREAD_CPUTIME_ID) - from < ns {
            std::hint::spin_loop();
        }
    };
    Ok(Box::new(move |f| {
        let before = left(id)?;
        spend(SECOND / 4);
        let ours = before - left(id)?;
        f.that(
            format!("our time does not count: {ours}"),
            ours < SECOND / 8,
        );
        let before = left(id)?;
        BURN.fetch_add(1, Ordering::SeqCst);
        while before - left(id)? < SECOND / 10 {
            thread::sleep(crate::conformance::stage::POLL);
        }
        BURN.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }))
}

fn posix_clocks(_: &Stage) -> Result<Check> {
    let clocks = [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME,
        libc::CLOCK_TAI,
        libc::CLOCK_PROCESS_CPUTIME_ID,
        libc::CLOCK_THREAD_CPUTIME_ID,
    ];
    let mut timers = Vec::new();
    for (n, clock) in clocks.into_iter().enumerate() {
        // Ids in between are given back.
        let gaps: Vec<i32> = (0..n)
            .map(|_| create(clock, libc::SIGEV_NONE, 0))
            .collect::<Result<_>>()?;
        let id = create(clock, libc::SIGEV_NONE, 0)?;
        for gap in gaps {
            sys::numbers(libc::SYS_timer_delete, &[gap.into()])?;
        }
        settime(id, (n as i64 + 1) * 10_000 * SECOND)?;
        timers.push((id, left(id)?));
    }
    Ok(Box::new(move |f| {
        for (id, was) in &timers {
            let is = left(*id)?;
            let goes = is <= *was && is > *was - 5000 * SECOND;
            f.that(format!("timer {id}: {was} left, now {is}"), goes);
        }
        Ok(())
    }))
}
