//! Clocks and the vDSO, on the kernel of the dump and on others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::timers::{
    HOUR_NS, SECOND, handle, itimer, near_an_hour, set_itimer, sleep_call, timer_create, timer_get,
    timer_set,
};
use crate::conformance::forge::{AGE_NS, Forge};
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
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
