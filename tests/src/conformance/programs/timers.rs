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

use crate::conformance::forge::{AGE_NS, Forge};
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
    Case::new("timers/clocks", "clocks never go back", clocks),
    Case::new(
        "timers/clocks-elsewhere",
        "clocks never go back on a kernel that is younger",
        clocks_elsewhere,
    )
    .forged(Forge::Boot),
    Case::new(
        "timers/timers-elsewhere",
        "timers of all kinds on a kernel that is younger",
        timers_elsewhere,
    )
    .forged(Forge::Boot),
    Case::new("timers/vdso", "the vDSO at its address", vdso),
    Case::new(
        "timers/vdso-elsewhere",
        "the old vDSO works at its address where the kernel has another",
        vdso_elsewhere,
    )
    .forged(Forge::Vdso),
];

const SECOND: i64 = 1_000_000_000;

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

fn handle(signal: Signal) -> Result<()> {
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
fn itimer(which: i32) -> (i64, i64) {
    // SAFETY: all-zero is valid, the kernel fills it.
    let t = unsafe {
        let mut t: libc::itimerval = std::mem::zeroed();
        libc::getitimer(which as _, &mut t);
        t
    };
    let us = |t: libc::timeval| t.tv_sec * 1_000_000 + t.tv_usec;
    (us(t.it_interval), us(t.it_value))
}

fn set_itimer(which: i32, interval: i64, value: i64) -> Result<()> {
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
fn timer_create(clock: i32, notify: i32, signal: i32, value: u64, tid: i32) -> Result<i32> {
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

fn timer_set(id: i32, flags: i32, interval: i64, value: i64) -> Result<()> {
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
fn timer_get(id: i32) -> Result<(i64, i64)> {
    let mut t = [0_i64; 4];
    let args = [id as u64, t.as_mut_ptr() as u64, 0, 0, 0, 0];
    // SAFETY: four words are an itimerspec.
    unsafe { sys::call(libc::SYS_timer_gettime, args) }?;
    Ok((t[0] * SECOND + t[1], t[2] * SECOND + t[3]))
}

const HOUR_NS: i64 = 3600 * SECOND;

/// Within ten minutes below the hour.
fn near_an_hour(left: i64) -> bool {
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
fn sleep_call(clock: i32, absolute: bool, ns: i64) -> (i32, i64) {
    let t = [ns / SECOND, ns % SECOND];
    let flags = i32::from(absolute) * libc::TIMER_ABSTIME;
    let args = [clock as u64, flags as u64, t.as_ptr() as u64, 0, 0, 0];
    // SAFETY: two words are a timespec.
    let r = unsafe { sys::call(libc::SYS_clock_nanosleep, args) };
    let errno = r.err().and_then(|e| e.raw_os_error()).unwrap_or(0);
    (errno, sys::clock(clock))
}

fn nanosleep(_: &Stage) -> Result<Check> {
    let start = || {
        let (sender, results) = mpsc::channel();
        let clock = libc::CLOCK_MONOTONIC;
        let now = sys::clock(clock);
        let wanted = [(false, now + SECOND / 5), (true, now + SECOND / 5)];
        for (absolute, until) in wanted {
            let sender = sender.clone();
            thread::spawn(move || {
                let ns = if absolute { until } else { until - now };
                let (errno, ended) = sleep_call(clock, absolute, ns);
                let _ = sender.send((errno, ended >= until));
            });
        }
        results
    };
    let mut results = start();
    Ok(Box::new(move |f| {
        for _ in 0..2 {
            f.same(
                "result, and that it did not end early",
                &(0, true),
                &results.recv()?,
            );
        }
        results = start();
        Ok(())
    }))
}

const STEADY: [(&str, i32); 2] = [
    ("CLOCK_MONOTONIC", libc::CLOCK_MONOTONIC),
    ("CLOCK_BOOTTIME", libc::CLOCK_BOOTTIME),
];

/// `gained` is how much further the clocks are to be, at least and within ten
/// minutes, after each restore.
fn watch_clocks(gained: i64, restored: impl Fn() -> bool + 'static) -> Result<Check> {
    let read = || STEADY.map(|(_, id)| sys::clock(id));
    let mut was = read();
    let deadline = std::time::Instant::now();
    Ok(Box::new(move |f| {
        let is = read();
        let gained = if restored() { gained } else { 0 };
        for ((name, id), (was, is)) in STEADY.iter().zip(was.iter().zip(is)) {
            let by = is - was;
            let fine = (gained..gained + 600 * SECOND).contains(&by);
            f.that(
                format!("{name} went from {was} by {by} ns instead of {gained}"),
                fine,
            );
            let call = sys::clock_by_call(*id);
            let close = (is..is + 60 * SECOND).contains(&call);
            f.that(
                format!("{name}: {is} by the vDSO, {call} by the call"),
                close,
            );
        }
        f.that("Instant goes on", deadline.elapsed().as_nanos() > 0);
        let wall = sys::clock(libc::CLOCK_REALTIME) - sys::clock_by_call(libc::CLOCK_REALTIME);
        f.that(
            format!("wall clocks differ by {wall}"),
            wall.abs() < 60 * SECOND,
        );
        was = read();
        Ok(())
    }))
}

fn clocks(_: &Stage) -> Result<Check> {
    watch_clocks(0, || false)
}

fn clocks_elsewhere(stage: &Stage) -> Result<Check> {
    let stage = stage.clone();
    watch_clocks(AGE_NS, move || stage.restored())
}

/// 1: woken wrongly, 2: rightly.
static WOKEN: AtomicU64 = AtomicU64::new(0);

/// Every kind of timer an hour ahead: the hour is still ahead though the
/// clocks stand elsewhere.
fn timers_elsewhere(stage: &Stage) -> Result<Check> {
    let stage = stage.clone();
    handle(Signal::SIGALRM)?;
    set_itimer(0, 0, HOUR_NS / 1000)?;
    let value = libc::SIGEV_NONE;
    let posix = timer_create(libc::CLOCK_MONOTONIC, value, 0, 0, 0)?;
    timer_set(posix, 0, 0, HOUR_NS)?;
    let fd = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::empty())?;
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    fd.set(Expiration::OneShot(hour), TimerSetTimeFlags::empty())?;
    let read = || sys::clock(libc::CLOCK_MONOTONIC);
    // A sleep to a moment of the old clock that lies beyond the gap.
    let until = read() + AGE_NS / 2;
    thread::spawn(move || {
        let (errno, ended) = sleep_call(libc::CLOCK_MONOTONIC, true, until);
        let fine = errno == 0 && ended >= until;
        WOKEN.store(1 + u64::from(fine), Ordering::SeqCst);
        loop {
            thread::sleep(Duration::from_secs(1000));
        }
    });
    Ok(Box::new(move |f| {
        let left = itimer(0).1 * 1000;
        f.that(
            format!("interval timer: {left} ns left"),
            near_an_hour(left),
        );
        let left = timer_get(posix)?.1;
        f.that(format!("POSIX timer: {left} ns left"), near_an_hour(left));
        let left = match fd.get()? {
            Some(Expiration::OneShot(t)) => t.tv_sec() * SECOND + t.tv_nsec(),
            other => anyhow::bail!("timer descriptor: {other:?}"),
        };
        f.that(
            format!("timer descriptor: {left} ns left"),
            near_an_hour(left),
        );
        if stage.restored() {
            sys::await_word(&WOKEN, 1);
            f.same("sleep to a moment", &2, &WOKEN.load(Ordering::SeqCst));
        } else {
            f.same("sleep to a moment", &0, &WOKEN.load(Ordering::SeqCst));
        }
        Ok(())
    }))
}

/// Addresses of the vDSO's functions.
struct Vdso {
    base: usize,
    clock_gettime: extern "C" fn(i32, *mut [i64; 2]) -> i32,
    getcpu: extern "C" fn(*mut u32, *mut u32, usize) -> i32,
}

impl Vdso {
    fn find() -> Result<Self> {
        // SAFETY: reads the auxiliary vector.
        let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
        ensure!(base != 0, "no vDSO");
        let clock_gettime = symbol(base, c"__vdso_clock_gettime")?;
        let getcpu = symbol(base, c"__vdso_getcpu")?;
        // SAFETY: the functions have these prototypes on every kernel.
        unsafe {
            Ok(Self {
                base,
                clock_gettime: std::mem::transmute::<usize, extern "C" fn(i32, *mut [i64; 2]) -> i32>(
                    clock_gettime,
                ),
                getcpu: std::mem::transmute::<usize, extern "C" fn(*mut u32, *mut u32, usize) -> i32>(
                    getcpu,
                ),
            })
        }
    }

    fn clock(&self, id: i32) -> i64 {
        let mut t = [0; 2];
        (self.clock_gettime)(id, &mut t);
        t[0] * SECOND + t[1]
    }
}

/// Looks a function up by the image's section table.
fn symbol(base: usize, name: &std::ffi::CStr) -> Result<usize> {
    // SAFETY: the image is mapped whole, sections included.
    let bytes = unsafe { std::slice::from_raw_parts(base as *const u8, 8192) };
    let number = |at: usize, len: usize| -> usize {
        let mut b = [0; 8];
        b[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(b) as usize
    };
    let (sections, size, count) = (number(40, 8), number(58, 2), number(60, 2));
    for s in (0..count).map(|i| sections + i * size) {
        const SHT_DYNSYM: usize = 11;
        if number(s + 4, 4) != SHT_DYNSYM {
            continue;
        }
        let strings = number(sections + number(s + 40, 4) * size + 24, 8);
        let (at, len) = (number(s + 24, 8), number(s + 32, 8));
        for entry in (at..at + len).step_by(24) {
            let text = &bytes[strings + number(entry, 4)..];
            if text.starts_with(name.to_bytes_with_nul()) {
                return Ok(base + number(entry + 8, 8));
            }
        }
    }
    anyhow::bail!("the vDSO has no {name:?}")
}

fn vdso_check() -> Result<Check> {
    let vdso = Vdso::find()?;
    let mut was = vdso.clock(libc::CLOCK_MONOTONIC);
    // A thread that is inside of it most of the time.
    let turns = std::sync::Arc::new(AtomicU64::new(0));
    let theirs = turns.clone();
    thread::spawn(move || {
        let mut last = 0;
        loop {
            let now = sys::clock(libc::CLOCK_MONOTONIC);
            if now >= last {
                theirs.fetch_add(1, Ordering::SeqCst);
            }
            last = now;
        }
    });
    sys::await_word(&turns, 1000);
    Ok(Box::new(move |f| {
        // SAFETY: reads the auxiliary vector.
        let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
        f.same("its address", &vdso.base, &base);
        let is = vdso.clock(libc::CLOCK_MONOTONIC);
        f.that(
            format!("CLOCK_MONOTONIC went from {was} to {is}"),
            is >= was,
        );
        for (name, id) in STEADY
            .into_iter()
            .chain([("CLOCK_REALTIME", libc::CLOCK_REALTIME)])
        {
            let (by_vdso, by_call) = (vdso.clock(id), sys::clock_by_call(id));
            let apart = by_call - by_vdso;
            f.that(
                format!("{name}: call - vDSO = {apart} ns"),
                (0..60 * SECOND).contains(&apart),
            );
        }
        let mut cpu = u32::MAX;
        (vdso.getcpu)(&mut cpu, std::ptr::null_mut(), 0);
        f.that(format!("cpu {cpu}"), cpu < 4096);
        let seen = turns.load(Ordering::SeqCst);
        sys::await_word(&turns, seen + 1000);
        was = vdso.clock(libc::CLOCK_MONOTONIC);
        Ok(())
    }))
}

fn vdso(_: &Stage) -> Result<Check> {
    vdso_check()
}

fn vdso_elsewhere(_: &Stage) -> Result<Check> {
    vdso_check()
}
