//! Interval timers and POSIX timers (getitimer(2), timer_create(2)).
//!
//! Remaining times are saved, and run on from the restore.

use std::io;

use crate::image::schema::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use crate::remote::{DataRef, Outcome, Program};
use crate::sys::text;

const ITIMER_BYTES: usize = 32;
const SIGEVENT_BYTES: usize = 64;
const TIMER_ABSTIME_OFF: i32 = 0;
/// `CLOCK_THREAD_CPUTIME_ID` as the kernel shows it, of the thread that made
/// the timer.
const THREAD_CLOCK: u32 = -2_i32 as u32;
/// `PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.15).
pub const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// How many ids are tried where the kernel only counts up.
pub const ID_MAX: u32 = 4096;

/// A POSIX timer as `/proc/PID/timers` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    id: u32,
    signal: u32,
    value: u64,
    notify: u32,
    thread: Option<i32>,
    clock: u32,
}

/// Where the answers of [`query`] will be.
#[derive(Debug)]
pub struct Query {
    interval: [DataRef; 3],
    posix: Vec<(Listed, DataRef)>,
}

/// Asks for all timers of the process.
pub fn query(pid: i32, p: &mut Program) -> io::Result<Query> {
    let interval = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
        let out = p.zeroed(ITIMER_BYTES);
        p.call(
            libc::SYS_getitimer,
            "read an interval timer",
            &[which.into(), out.into()],
        );
        out
    });
    let text = text::read_string(format!("/proc/{pid}/timers"))?;
    let listed = parse(&text).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/timers is not understood"),
        )
    })?;
    let posix = listed
        .into_iter()
        .map(|t| {
            let out = p.zeroed(ITIMER_BYTES);
            let args = [u64::from(t.id).into(), out.into()];
            p.call(
                libc::SYS_timer_gettime,
                format!("read timer {}", t.id),
                &args,
            );
            (t, out)
        })
        .collect();
    Ok(Query { interval, posix })
}

pub(crate) fn parse(text: &str) -> Option<Vec<Listed>> {
    let mut out: Vec<Listed> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        match key {
            "ID" => out.push(Listed {
                id: value.parse().ok()?,
                signal: 0,
                value: 0,
                notify: 0,
                thread: None,
                clock: 0,
            }),
            "signal" => {
                let (signal, sigval) = value.split_once('/')?;
                let t = out.last_mut()?;
                t.signal = signal.parse().ok()?;
                let hex = sigval.trim_start_matches("0x");
                t.value = if hex == "(null)" {
                    0
                } else {
                    u64::from_str_radix(hex, 16).ok()?
                };
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let t = out.last_mut()?;
                t.notify = match how {
                    "signal" => libc::SIGEV_SIGNAL as u32,
                    "none" => libc::SIGEV_NONE as u32,
                    "thread" => libc::SIGEV_THREAD as u32,
                    _ => return None,
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    t.notify |= libc::SIGEV_THREAD_ID as u32;
                    t.thread = Some(tid.parse().ok()?);
                }
            }
            "ClockID" => out.last_mut()?.clock = value.parse::<i32>().ok()? as u32,
            _ => {}
        }
    }
    Some(out)
}

/// Reads the answers.
pub fn answers(outcome: &Outcome, q: &Query) -> TaskTimersEntry {
    let words = |r: DataRef| -> [u64; 4] {
        let mut w = [0; 4];
        for (w, c) in w.iter_mut().zip(outcome.data(r).chunks_exact(8)) {
            *w = u64::from_le_bytes(c.try_into().expect("8 bytes"));
        }
        w
    };
    let [real, virt, prof] = q.interval.map(|r| {
        let [isec, iusec, vsec, vusec] = words(r);
        ItimerEntry {
            isec,
            iusec,
            vsec,
            vusec,
        }
    });
    let posix = q.posix.iter().map(|(t, r)| {
        let [isec, insec, vsec, vnsec] = words(*r);
        PosixTimerEntry {
            it_id: t.id,
            clock_id: t.clock,
            si_signo: t.signal,
            it_sigev_notify: t.notify,
            sival_ptr: t.value,
            overrun: 0,
            isec,
            insec,
            vsec,
            vnsec,
            notify_thread_id: t.thread,
        }
    });
    TaskTimersEntry {
        real,
        virt,
        prof,
        posix: posix.collect(),
    }
}

/// Arms the interval timers.
pub fn restore_interval(p: &mut Program, t: &TaskTimersEntry) {
    let all = [
        (libc::ITIMER_REAL, &t.real),
        (libc::ITIMER_VIRTUAL, &t.virt),
        (libc::ITIMER_PROF, &t.prof),
    ];
    for (which, e) in all {
        if (e.vsec, e.vusec) == (0, 0) {
            continue;
        }
        let v = p.bytes(
            &[e.isec, e.iusec, e.vsec, e.vusec]
                .map(u64::to_le_bytes)
                .concat(),
        );
        let args = [which.into(), v.into(), 0.into()];
        p.call(libc::SYS_setitimer, "set an interval timer", &args);
    }
}

/// Creates the POSIX timers with their ids.
///
/// From Linux 6.15 the process asks for an id; before, ids count up from zero
/// in a new process, so the ones in between are made and deleted.
///
/// A timer on the clock of its thread measures the thread that makes it: as far
/// as can be told the one it signals. Returns programs with the threads that
/// are to run them, in this order. `seen` tells how the process knows a thread.
pub fn restore_posix(
    leader: i32,
    timers: &[PosixTimerEntry],
    ids_can_be_asked: bool,
    seen: impl Fn(i32) -> i32,
) -> Vec<(i32, Program)> {
    if timers.is_empty() {
        return Vec::new();
    }
    let mut sorted: Vec<_> = timers.iter().collect();
    sorted.sort_by_key(|t| t.it_id);
    let mut programs = vec![(leader, Program::new())];
    if ids_can_be_asked {
        choose_ids(&mut programs[0].1, 1);
    }
    let mut next = 0;
    for t in sorted {
        let maker = t.notify_thread_id.filter(|_| t.clock_id == THREAD_CLOCK);
        let maker = maker.unwrap_or(leader);
        if programs.last().is_none_or(|(tid, _)| *tid != maker) {
            programs.push((maker, Program::new()));
        }
        let (_, p) = programs.last_mut().expect("just pushed");
        if !ids_can_be_asked {
            count(p, next..t.it_id);
            next = t.it_id + 1;
        }
        let t = PosixTimerEntry {
            notify_thread_id: t.notify_thread_id.map(&seen),
            ..*t
        };
        create(p, &t);
    }
    let mut p = Program::new();
    if ids_can_be_asked {
        choose_ids(&mut p, 0);
    }
    for t in timers.iter().filter(|t| (t.vsec, t.vnsec) != (0, 0)) {
        arm(&mut p, t);
    }
    programs.push((leader, p));
    programs
}

fn choose_ids(p: &mut Program, on: i32) {
    let args = [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0].map(Into::into);
    p.call(libc::SYS_prctl, "ask for timer ids", &args);
}

/// Makes and deletes timers until the kernel has counted through these ids.
fn count(p: &mut Program, ids: std::ops::Range<u32>) {
    for n in ids {
        let skip = p.zeroed(4);
        let event = sigevent(p, libc::SIGEV_NONE as u32, 0, 0, None);
        let args = [libc::CLOCK_MONOTONIC.into(), event.into(), skip.into()];
        let what = format!("count to timer id {n}");
        p.call(libc::SYS_timer_create, what, &args);
        p.call(libc::SYS_timer_delete, "delete it", &[u64::from(n).into()]);
    }
}

fn create(p: &mut Program, t: &PosixTimerEntry) {
    let id = p.bytes(&t.it_id.to_le_bytes());
    let event = sigevent(
        p,
        t.it_sigev_notify,
        t.si_signo,
        t.sival_ptr,
        t.notify_thread_id,
    );
    let clock = i64::from(t.clock_id as i32) as u64;
    let args = [clock.into(), event.into(), id.into()];
    let what = format!("create timer {}", t.it_id);
    p.call(libc::SYS_timer_create, what, &args);
}

fn arm(p: &mut Program, t: &PosixTimerEntry) {
    let words = [t.isec, t.insec, t.vsec, t.vnsec];
    let v = p.bytes(&words.map(u64::to_le_bytes).concat());
    let args = [
        u64::from(t.it_id).into(),
        TIMER_ABSTIME_OFF.into(),
        v.into(),
        0.into(),
    ];
    let what = format!("arm timer {}", t.it_id);
    p.call(libc::SYS_timer_settime, what, &args);
}

fn sigevent(p: &mut Program, notify: u32, signal: u32, value: u64, tid: Option<i32>) -> DataRef {
    let e = p.zeroed(SIGEVENT_BYTES);
    p.write(e, 0, &value.to_le_bytes());
    p.write(e, 8, &signal.to_le_bytes());
    p.write(e, 12, &notify.to_le_bytes());
    p.write(e, 16, &tid.unwrap_or(0).to_le_bytes());
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_list() {
        let t = parse("ID: 3\nsignal: 14/00007ffd12345678\nnotify: signal/tid.77\nClockID: 1\n")
            .unwrap();
        assert_eq!(t[0].id, 3);
        assert_eq!(
            (t[0].signal, t[0].value, t[0].clock),
            (14, 0x7ffd_1234_5678, 1)
        );
        assert_eq!(
            (t[0].notify, t[0].thread),
            (libc::SIGEV_THREAD_ID as u32, Some(77))
        );
    }

    proptest::proptest! {
        #[test]
        fn never_panics(s in "\\PC{0,200}") {
            let _ = parse(&s);
        }
    }
}
