//! Sleeps with a relative timeout that were interrupted: nanosleep(2),
//! clock_nanosleep(2), poll(2), futex(2).
//!
//! The kernel goes on with them by restart_syscall(2) from memory of its own,
//! which does not survive. What is left of the timeout is found at the dump; on
//! restore the call is begun with just that and interrupted at once, so that
//! the kernel remembers it again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::arch;
use crate::ext::RcrNap;
use crate::remote::{Arena, Halt, RemoteError, Tracee};
use crate::sys::process::{Span, clock_ns, read_memory, write_memory};
use crate::sys::ptrace::{self, Regs, Stop};
use crate::sys::text;
use crate::tree::{Process, Stat};

const SECOND: i64 = 1_000_000_000;
/// `ERESTART_RESTARTBLOCK` (linux/errno.h).
const RESTART_BLOCK: i64 = -516;
const FUTEX_COMMAND: u64 = 127;

/// Since when threads sleep, by thread id: CLOCK_MONOTONIC, nanoseconds.
#[derive(Debug, Default)]
pub struct Naps {
    since: BTreeMap<i32, i64>,
    /// The call a thread is really in, should the kernel restart it.
    calls: BTreeMap<i32, i64>,
    /// When all stood still.
    pub now: i64,
}

impl Naps {
    /// Looks at all threads before anything wakes them: what they wait in, and
    /// when they ran last.
    ///
    /// Nothing here is needed for a correct restore; where the kernel does not
    /// tell, a sleep starts over with its whole timeout.
    pub fn note(processes: &[Process]) -> io::Result<Self> {
        let mut out = Self::default();
        let mut asleep: Vec<(i32, usize, i64)> = Vec::new();
        for p in processes {
            for &tid in &p.tids {
                let dir = format!("/proc/{}/task/{tid}", p.pid);
                let read = |file: &str| text::read_string(format!("{dir}/{file}"));
                let Some(call) = read("syscall").ok().as_deref().and_then(call_number) else {
                    continue;
                };
                let real = match call {
                    libc::SYS_restart_syscall => read("wchan").ok().as_deref().and_then(restarted),
                    libc::SYS_nanosleep
                    | libc::SYS_clock_nanosleep
                    | libc::SYS_poll
                    | libc::SYS_futex => Some(call),
                    _ => None,
                };
                let Some(real) = real else { continue };
                // Also where it has not been restarted: it may be, until it stops.
                out.calls.insert(tid, real);
                let cpu = Stat::read(tid).map(|s| s.number(39) as usize);
                let ran = read("sched").ok().as_deref().and_then(last_ran);
                if let (Ok(cpu), Some(ran)) = (cpu, ran) {
                    asleep.push((tid, cpu, ran));
                }
            }
        }
        let cpus: BTreeSet<usize> = asleep.iter().map(|a| a.1).collect();
        let clocks = cpu_clocks(&cpus)?;
        for (tid, cpu, ran) in asleep {
            if let Some((cpu_now, now)) = clocks.get(&cpu) {
                out.since.insert(tid, now - (cpu_now - ran).max(0));
            }
        }
        Ok(out)
    }

    /// The threads and since when they sleep: CLOCK_MONOTONIC, nanoseconds.
    pub fn since(&self) -> impl Iterator<Item = (i32, i64)> + '_ {
        self.since.iter().map(|(&tid, &since)| (tid, since))
    }

    /// What is left of the call that a stopped thread was interrupted in. `since`
    /// is when it began, where that is known better than here.
    pub fn save(&self, tid: i32, regs: &Regs, since: Option<i64>) -> Option<RcrNap> {
        if regs.rax as i64 != RESTART_BLOCK || (regs.orig_rax as i64) < 0 {
            return None;
        }
        let mut call = regs.orig_rax as i64;
        if call == libc::SYS_restart_syscall {
            call = self.calls.get(&tid).copied()?;
            // Both look alike to the kernel; a clock is a small number.
            if call == libc::SYS_nanosleep && regs.rdi < 4096 {
                call = libc::SYS_clock_nanosleep;
            }
        }
        let (timeout, left) = match call {
            libc::SYS_nanosleep => (timespec(tid, regs.rdi)?, timespec(tid, regs.rsi)),
            libc::SYS_clock_nanosleep if regs.rsi & libc::TIMER_ABSTIME as u64 == 0 => {
                (timespec(tid, regs.rdx)?, timespec(tid, regs.r10))
            }
            libc::SYS_poll if regs.rdx as i32 >= 0 => {
                (i64::from(regs.rdx as i32) * (SECOND / 1000), None)
            }
            libc::SYS_futex if regs.rsi & FUTEX_COMMAND == libc::FUTEX_WAIT as u64 => {
                (timespec(tid, regs.r10)?, None)
            }
            // Without a timeout, or until a point in time: the same again.
            _ => {
                return Some(RcrNap {
                    call,
                    left_ns: None,
                });
            }
        };
        // The kernel has written what is left where it was asked to.
        let left = left.filter(|l| (1..=timeout).contains(l)).or_else(|| {
            let since = since.as_ref().or_else(|| self.since.get(&tid))?;
            Some((timeout - (self.now - since).max(0)).max(1))
        });
        Some(RcrNap {
            call,
            left_ns: Some(left.unwrap_or(timeout)),
        })
    }

    /// Marks the moment when every thread stood still.
    pub fn all_stopped(&mut self) {
        self.now = clock_ns(libc::CLOCK_MONOTONIC);
    }
}

/// Lets the kernel remember an interrupted call of a stopped thread. `regs`
/// are those of the image, about to make the call. Returns the registers to go
/// on with; `None`: the call has nothing to wait for and is to be made anew.
pub fn restore(
    tid: i32,
    arena: Arena,
    regs: &Regs,
    nap: &RcrNap,
) -> Result<Option<Regs>, RemoteError> {
    let Some(left) = nap.left_ns else {
        return Ok(None);
    };
    let at = arena.scratch();
    let words = [left.div_euclid(SECOND), left.rem_euclid(SECOND)];
    let span = Span { start: at, len: 16 };
    write_memory(tid, &[span], &words.map(i64::to_le_bytes).concat())?;
    let mut args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    match nap.call {
        libc::SYS_nanosleep => args[0] = at,
        libc::SYS_clock_nanosleep => args[2] = at,
        libc::SYS_futex => args[3] = at,
        libc::SYS_poll => {
            let ms = left.div_euclid(SECOND / 1000) + 1;
            args[2] = ms.min(i64::from(i32::MAX)) as u64;
        }
        _ => return Ok(None),
    }
    let now = ptrace::get_regs(tid)?;
    ptrace::set_regs(
        tid,
        &arch::set_call(&now, arena.syscall_insn(), nap.call, args),
    )?;
    let mut halt = Halt::default();
    Tracee { tid }.reach_call(&mut halt)?;
    // At the call's entry: it is interrupted as soon as it waits.
    ptrace::interrupt(tid)?;
    ptrace::cont(tid, 0)?;
    match ptrace::wait(tid)? {
        Stop::Stopped(libc::SIGTRAP) => {}
        // Interrupted by what cannot be blocked.
        Stop::Signal(libc::SIGSTOP) => halt.note(tid),
        stop => return Err(unexpected(tid, stop)),
    }
    let interrupted = ptrace::get_regs(tid)?.rax as i64 == RESTART_BLOCK;
    Ok(interrupted.then(|| arch::interrupted_call(regs, nap.call, RESTART_BLOCK)))
}

fn unexpected(tid: i32, stop: Stop) -> RemoteError {
    match stop {
        Stop::Gone(status) => RemoteError::Gone { tid, status },
        stop => {
            let ip = ptrace::get_regs(tid).map_or(0, |r| r.rip);
            RemoteError::Strayed { tid, ip, stop }
        }
    }
}

/// Nanoseconds of a timespec in a task's memory; `None` where there is none.
fn timespec(tid: i32, at: u64) -> Option<i64> {
    let mut b = [0; 16];
    if at == 0 {
        return None;
    }
    read_memory(tid, &[Span { start: at, len: 16 }], &mut b).ok()?;
    let word = |o: usize| i64::from_le_bytes(b[o..o + 8].try_into().expect("8 bytes"));
    word(0).checked_mul(SECOND)?.checked_add(word(8))
}

/// The first word of `/proc/PID/syscall`.
pub(crate) fn call_number(text: &str) -> Option<i64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// The call behind restart_syscall(2), by the kernel function it waits in.
fn restarted(wchan: &str) -> Option<i64> {
    match wchan.trim() {
        "" | "0" => None,
        w if w.contains("poll") => Some(libc::SYS_poll),
        w if w.contains("futex") => Some(libc::SYS_futex),
        // Nothing else is restarted; its functions call each other last, so
        // that the one seen here may be the system call's entry.
        _ => Some(libc::SYS_nanosleep),
    }
}

/// When a thread ran last, by its processor's own clock: `se.exec_start` of
/// `/proc/PID/sched`, milliseconds with six places.
pub(crate) fn last_ran(text: &str) -> Option<i64> {
    let line = text.lines().find(|l| l.starts_with("se.exec_start"))?;
    let (ms, fraction) = line.rsplit(':').next()?.trim().split_once('.')?;
    let ns: i64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    ms.parse::<i64>()
        .ok()?
        .checked_mul(1_000_000)?
        .checked_add(ns)
}

/// The clocks of processors beside CLOCK_MONOTONIC: we run on each for a
/// moment. Those that we may not run on are left out.
fn cpu_clocks(cpus: &BTreeSet<usize>) -> io::Result<BTreeMap<usize, (i64, i64)>> {
    let me = Pid::from_raw(0);
    let was = sched_getaffinity(me)?;
    let mut out = BTreeMap::new();
    for &cpu in cpus {
        let mut one = CpuSet::new();
        if one.set(cpu).is_err() || sched_setaffinity(me, &one).is_err() {
            continue;
        }
        // Brings our own last moment up to date.
        std::thread::yield_now();
        let text = std::fs::read_to_string("/proc/thread-self/sched");
        let now = clock_ns(libc::CLOCK_MONOTONIC);
        if let Some(ran) = text.ok().as_deref().and_then(last_ran) {
            out.insert(cpu, (ran, now));
        }
    }
    if !cpus.is_empty() {
        sched_setaffinity(me, &was)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_when_a_thread_ran() {
        let text = "cat (1, #threads: 1)\n---\nse.exec_start     :      12382509.406649\n";
        assert_eq!(last_ran(text), Some(12_382_509_406_649));
    }

    #[test]
    fn knows_how_long_a_thread_sleeps() {
        let (said, tid) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            said.send(nix::unistd::gettid().as_raw()).unwrap();
            std::thread::sleep(std::time::Duration::from_secs(60));
        });
        let tid = tid.recv().unwrap();
        let call = || text::read_string(format!("/proc/self/task/{tid}/syscall"));
        while call_number(&call().unwrap())
            .is_none_or(|n| n != libc::SYS_nanosleep && n != libc::SYS_clock_nanosleep)
        {
            std::thread::yield_now();
        }
        let before = clock_ns(libc::CLOCK_MONOTONIC);
        let me = crate::Tree::Root(std::process::id() as i32);
        let naps = Naps::note(&me.scan().unwrap()).unwrap();
        let since = naps.since[&tid];
        // It fell asleep before we looked; the clocks are read one after the other.
        assert!(since <= before + 20_000_000, "{since} {before}");
        assert!(since >= before - 60_000_000_000, "{since} {before}");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(s in "\\PC{0,100}") {
            let _ = (last_ran(&s), last_ran(&format!("se.exec_start : {s}")));
            let _ = (call_number(&s), restarted(&s));
        }
    }
}
