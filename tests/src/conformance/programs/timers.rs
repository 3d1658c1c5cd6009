//! Timers and clocks.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::conformance::stage::POLL;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("timers/interval", "the three interval timers", interval),
    Case::new(
        "timers/posix",
        "POSIX timers: ids, clocks, settings, notification",
        posix,
    ),
    Case::new(
        "timers/posix-thread",
        "a POSIX timer that signals one thread",
        posix_thread,
    ),
    Case::new("timers/timerfd", "timer descriptors", timerfd),
    Case::new("timers/nanosleep", "sleeps in progress", nanosleep),
];

pub(super) const SECOND: i64 = 1_000_000_000;

static COUNTS: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];
static THREAD: AtomicU64 = AtomicU64::new(0);
static CODE: AtomicU64 = AtomicU64::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

extern "C" fn note(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo; for timers it holds a value.
    unsafe {
        CODE.store((*info).si_code as u64, Ordering::SeqCst);
        VALUE.store((*info).si_value().sival_ptr as u64, Ordering::SeqCst);
    }
    THREAD.store(sys::gettid() as u64, Ordering::SeqCst);
    COUNTS[signal as usize].fetch_add(1, Ordering::SeqCst);
}

pub(super) fn handle(signal: Signal) -> Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler stores to atomics.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

fn count(signal: Signal) -> u64 {
    COUNTS[signal as usize].load(Ordering::SeqCst)
}

/// Interval and time left of an interval timer, microseconds.
pub(super) fn itimer(which: i32) -> (i64, i64) {
    // SAFETY: all-zero is valid, the kernel fills it.
    let t = unsafe {
        let mut t: libc::itimerval = std::mem::zeroed();
        libc::getitimer(which as _, &mut t);
        t
    };
    let us = |t: libc::timeval| t.tv_sec * 1_000_000 + t.tv_usec;
    (us(t.it_interval), us(t.it_value))
}

pub(super) fn set_itimer(which: i32, interval: i64, value: i64) -> Result<()> {
    let time = |us: i64| libc::timeval {
        tv_sec: us / 1_000_000,
        tv_usec: us % 1_000_000,
    };
    let t = libc::itimerval {
        it_interval: time(interval),
        it_value: time(value),
    };
    // SAFETY: reads a structure of ours.
    let r = unsafe { libc::setitimer(which as _, &t, std::ptr::null_mut()) };
    ensure!(r == 0, "setitimer");
    Ok(())
}

const ITIMERS: [(i32, Signal); 3] = [
    (0, Signal::SIGALRM),
    (1, Signal::SIGVTALRM),
    (2, Signal::SIGPROF),
];

fn interval(_: &Stage) -> Result<Check> {
    const HOUR: i64 = 3_600_000_000;
    for (which, signal) in ITIMERS {
        handle(signal)?;
        set_itimer(which, 7_000_000, HOUR)?;
    }
    Ok(Box::new(move |f| {
        for (which, signal) in ITIMERS {
            let (interval, left) = itimer(which);
            f.same("interval", &7_000_000, &interval);
            // The kernel adds a tick to what is left of processor time.
            let fine = (HOUR - 600_000_000..=HOUR + 100_000).contains(&left);
            f.that(format!("timer {which}: {left} us left"), fine);
            let before = count(signal);
            set_itimer(which, 0, 1000)?;
            while count(signal) == before {
                std::hint::spin_loop();
            }
            set_itimer(which, 7_000_000, HOUR)?;
        }
        Ok(())
    }))
}

/// A POSIX timer by the system calls.
pub(super) fn timer_create(
    clock: i32,
    notify: i32,
    signal: i32,
    value: u64,
    tid: i32,
) -> Result<i32> {
    // SAFETY: all-zero is valid; libc's layout is the kernel's.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = value as *mut libc::c_void;
    event.sigev_notify_thread_id = tid;
    let mut id = -1_i32;
    let args = [
        clock as u64,
        &raw const event as u64,
        &raw mut id as u64,
        0,
        0,
        0,
    ];
    // SAFETY: both pointers lead to values that outlive the call.
    unsafe { sys::call(libc::SYS_timer_create, args) }?;
    Ok(id)
}

pub(super) fn timer_set(id: i32, flags: i32, interval: i64, value: i64) -> Result<()> {
    let t = [
        interval / SECOND,
        interval % SECOND,
        value / SECOND,
        value % SECOND,
    ];
    let args = [id as u64, flags as u64, t.as_ptr() as u64, 0, 0, 0];
    // SAFETY: four words are an itimerspec.
    unsafe { sys::call(libc::SYS_timer_settime, args) }?;
    Ok(())
}

/// Interval and time left, nanoseconds.
pub(super) fn timer_get(id: i32) -> Result<(i64, i64)> {
    let mut t = [0_i64; 4];
    let args = [id as u64, t.as_mut_ptr() as u64, 0, 0, 0, 0];
    // SAFETY: four words are an itimerspec.
    unsafe { sys::call(libc::SYS_timer_gettime, args) }?;
    Ok((t[0] * SECOND + t[1], t[2] * SECOND + t[3]))
}

pub(super) const HOUR_NS: i64 = 3600 * SECOND;

/// Within ten minutes below the hour.
pub(super) fn near_an_hour(left: i64) -> bool {
    (HOUR_NS - 600 * SECOND..=HOUR_NS).contains(&left)
}

fn posix(_: &Stage) -> Result<Check> {
    handle(Signal::SIGUSR1)?;
    // Ids with a hole.
    let spare = timer_create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    let clocks = [
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME,
    ];
    let mut timers = Vec::new();
    for clock in clocks {
        let value = 0xabcd_0000_0000 + clock as u64;
        let id = timer_create(clock, libc::SIGEV_SIGNAL, libc::SIGUSR1, value, 0)?;
        timer_set(id, 0, 5 * SECOND, HOUR_NS)?;
        timers.push((id, value));
    }
    let quiet = timer_create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    timer_set(quiet, 0, 0, HOUR_NS)?;
    let unarmed = timer_create(
        libc::CLOCK_REALTIME,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR1,
        1,
        0,
    )?;
    let args = [spare.into()];
    sys::numbers(libc::SYS_timer_delete, &args)?;
    Ok(Box::new(move |f| {
        for &(id, value) in &timers {
            let (interval, left) = timer_get(id).context("a timer's id")?;
            f.same("interval", &(5 * SECOND), &interval);
            f.that(format!("timer {id}: {left} ns left"), near_an_hour(left));
            let before = count(Signal::SIGUSR1);
            timer_set(id, 0, 5 * SECOND, 1_000_000)?;
            while count(Signal::SIGUSR1) == before {
                thread::sleep(POLL);
            }
            f.same(
                "value with the signal",
                &value,
                &VALUE.load(Ordering::SeqCst),
            );
            f.same(
                "code",
                &(libc::SI_TIMER as u64),
                &CODE.load(Ordering::SeqCst),
            );
            timer_set(id, 0, 5 * SECOND, HOUR_NS)?;
        }
        let (interval, left) = timer_get(quiet)?;
        f.that(
            format!("quiet timer: {left} ns left"),
            interval == 0 && near_an_hour(left),
        );
        f.same("unarmed timer", &(0, 0), &timer_get(unarmed)?);
        Ok(())
    }))
}

fn posix_thread(_: &Stage) -> Result<Check> {
    handle(Signal::SIGUSR2)?;
    let (said, tid) = mpsc::channel();
    thread::spawn(move || {
        let _ = said.send(sys::gettid());
        loop {
            thread::sleep(Duration::from_secs(1000));
        }
    });
    let tid = tid.recv()?;
    let notify = libc::SIGEV_SIGNAL | 4; // SIGEV_THREAD_ID
    let id = timer_create(libc::CLOCK_MONOTONIC, notify, libc::SIGUSR2, 99, tid)?;
    timer_set(id, 0, 0, HOUR_NS)?;
    Ok(Box::new(move |f| {
        f.that("time left", near_an_hour(timer_get(id)?.1));
        let before = count(Signal::SIGUSR2);
        timer_set(id, 0, 0, 1_000_000)?;
        while count(Signal::SIGUSR2) == before {
            thread::sleep(POLL);
        }
        f.same(
            "which thread got it",
            &(tid as u64),
            &THREAD.load(Ordering::SeqCst),
        );
        f.same("value", &99, &VALUE.load(Ordering::SeqCst));
        timer_set(id, 0, 0, HOUR_NS)
    }))
}

fn timerfd(_: &Stage) -> Result<Check> {
    let second = TimeSpec::from_duration(Duration::from_secs(1));
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    let none = TimerSetTimeFlags::empty();
    let periodic = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    periodic.set(Expiration::IntervalDelayed(hour, second), none)?;
    let absolute = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::empty())?;
    let then = TimeSpec::from_duration(Duration::from_nanos(
        (sys::clock(libc::CLOCK_REALTIME) + HOUR_NS) as u64,
    ));
    absolute.set(
        Expiration::OneShot(then),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME,
    )?;
    let expired = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK)?;
    let soon = TimeSpec::from_duration(Duration::from_millis(1));
    expired.set(Expiration::OneShot(soon), none)?;
    let unarmed = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    let read = |t: &TimerFd| -> std::result::Result<u64, nix::errno::Errno> {
        let mut b = [0; 8];
        // SAFETY: eight bytes of ours.
        let r = unsafe { libc::read(t.as_fd().as_raw_fd(), b.as_mut_ptr().cast(), 8) };
        nix::errno::Errno::result(r).map(|_| u64::from_ne_bytes(b))
    };
    thread::sleep(Duration::from_millis(20));
    Ok(Box::new(move |f| {
        let left = |t: &TimerFd| -> Result<Option<(i64, i64)>> {
            let ns = |t: TimeSpec| t.tv_sec() * SECOND + t.tv_nsec();
            Ok(t.get()?.map(|e| match e {
                Expiration::OneShot(v) => (0, ns(v)),
                Expiration::IntervalDelayed(v, i) => (ns(i), ns(v)),
                Expiration::Interval(i) => (ns(i), ns(i)),
            }))
        };
        let (interval, value) = left(&periodic)?.context("the periodic timer is off")?;
        f.same("interval", &SECOND, &interval);
        f.that(format!("{value} ns left"), near_an_hour(value));
        let (interval, value) = left(&absolute)?.context("the absolute timer is off")?;
        f.that(
            format!("absolute: {value} ns left"),
            interval == 0 && near_an_hour(value),
        );
        f.same("expirations to be read", &Ok(1), &read(&expired));
        f.same("then", &Err(nix::errno::Errno::EAGAIN), &read(&expired));
        f.same("unarmed", &None, &left(&unarmed)?);
        periodic.set(Expiration::OneShot(soon), none)?;
        while read(&periodic).is_err() {
            thread::sleep(POLL);
        }
        periodic.set(Expiration::IntervalDelayed(hour, second), none)?;
        expired.set(Expiration::OneShot(soon), none)?;
        thread::sleep(Duration::from_millis(20));
        Ok(())
    }))
}

/// clock_nanosleep(2) itself: its result, and when it ended by the clock.
pub(super) fn sleep_call(clock: i32, absolute: bool, ns: i64) -> (i32, i64) {
    let t = [ns / SECOND, ns % SECOND];
    let flags = i32::from(absolute) * libc::TIMER_ABSTIME;
    let args = [clock as u64, flags as u64, t.as_ptr() as u64, 0, 0, 0];
    // SAFETY: two words are a timespec.
    let r = unsafe { sys::call(libc::SYS_clock_nanosleep, args) };
    let errno = r.err().and_then(|e| e.raw_os_error()).unwrap_or(0);
    (errno, sys::clock(clock))
}

fn nanosleep(_: &Stage) -> Result<Check> {
    static DONE: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    let start = || {
        let clock = libc::CLOCK_MONOTONIC;
        let now = sys::clock(clock);
        let until = now + SECOND / 2;
        for absolute in [false, true] {
            thread::spawn(move || {
                let ns = if absolute { until } else { until - now };
                let (errno, ended) = sleep_call(clock, absolute, ns);
                let wrong = errno != 0 || ended < until;
                WRONG.fetch_add(u64::from(wrong), Ordering::SeqCst);
                DONE.fetch_add(1, Ordering::SeqCst);
                // Its end would be a change that nobody asked for.
                loop {
                    thread::sleep(Duration::from_secs(1000));
                }
            });
        }
    };
    start();
    let mut threads = 2;
    Ok(Box::new(move |f| {
        sys::await_word(&DONE, threads);
        f.same(
            "sleeps that failed or ended early",
            &0,
            &WRONG.load(Ordering::SeqCst),
        );
        threads += 2;
        start();
        Ok(())
    }))
}
