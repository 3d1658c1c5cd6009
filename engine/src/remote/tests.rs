use std::process::{Child, Command};

use super::*;
use crate::arch;
use crate::memory::maps;
use crate::memory::vdso::Vdso;
use crate::sys::ptrace::{self, Stop};

/// A stopped program with an arena in it; killed when dropped.
struct Target {
    child: Child,
    tracee: Tracee,
    arena: Arena,
}

impl Target {
    fn new() -> Self {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let tid = child.id() as i32;
        // It is in its sleep as soon as it runs its own text.
        while std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap() != "sleep\n" {
            std::thread::yield_now();
        }
        ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(tid).unwrap();
        assert_eq!(ptrace::wait(tid).unwrap(), Stop::Stopped(libc::SIGTRAP));
        let vdso = Vdso::find(&maps::read(tid).unwrap()).unwrap();
        let insn = find_syscall(tid, Some((vdso.text.start, vdso.text.end))).unwrap();
        ptrace::set_sigmask(tid, arch::REMOTE_SIGMASK).unwrap();
        let tracee = Tracee { tid };
        let arena = tracee.map_arena(insn, None, 64 << 10).unwrap();
        Self {
            child,
            tracee,
            arena,
        }
    }

    /// Runs a program that asks for the task's id, and `more`.
    fn run(&self, more: impl Fn(&mut Program)) {
        let mut program = Program::new();
        more(&mut program);
        let id = program.call(libc::SYS_gettid, "id", &[]);
        let out = self.tracee.run(self.arena, &program).unwrap();
        assert_eq!(out.result(id), i64::from(self.tracee.tid));
        let mask = ptrace::get_sigmask(self.tracee.tid).unwrap();
        // Two signals cannot be blocked.
        assert_eq!(mask | 1 << 8 | 1 << 18, !0);
    }

    /// Number, code and sender of what is pending.
    fn pending(&self, shared: bool) -> Vec<[i32; 3]> {
        let queue = ptrace::peek_signals(self.tracee.tid, shared).unwrap();
        let words = |s: &ptrace::RawSiginfo| {
            [0, 8, 16].map(|at| i32::from_ne_bytes(s[at..at + 4].try_into().unwrap()))
        };
        queue.iter().map(words).collect()
    }

    /// Sends itself a signal in the midst of a program: to the process or to
    /// the thread.
    fn send(&self, signal: i32, shared: bool) {
        let tid = self.tracee.tid;
        self.run(|p| {
            let (nr, args) = match shared {
                true => (libc::SYS_kill, vec![tid.into(), signal.into()]),
                false => (
                    libc::SYS_tgkill,
                    vec![tid.into(), tid.into(), signal.into()],
                ),
            };
            p.call(nr, "send", &args);
        });
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Ignored by default, so candidates for a signal of ours.
const QUIET: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];

#[test]
fn a_signal_of_somebody_else_stays_pending() {
    for signal in QUIET {
        for first_shared in [false, true] {
            let target = Target::new();
            target.run(|_| {});
            assert_eq!(target.pending(false), target.pending(true));
            let me = target.tracee.tid;
            // SI_TKILL and SI_USER.
            let of = |shared| [signal, if shared { 0 } else { -6 }, me];
            target.send(signal, first_shared);
            assert_eq!(target.pending(first_shared), [of(first_shared)]);
            assert!(target.pending(!first_shared).is_empty());
            target.run(|_| {});
            target.send(signal, !first_shared);
            assert_eq!(target.pending(first_shared), [of(first_shared)]);
            assert_eq!(target.pending(!first_shared), [of(!first_shared)]);
            target.run(|_| {});
        }
    }
}

#[test]
fn one_with_our_number_and_everything_else_is_known_as_anothers() {
    let target = Target::new();
    let me = target.tracee.tid;
    target.run(|p| {
        let mut info = [0; 128];
        info[8..12].copy_from_slice(&(arch::DONE_CODE - 1).to_ne_bytes());
        info[16..20].copy_from_slice(&me.to_ne_bytes());
        let info = p.bytes(&info);
        let args = [me.into(), me.into(), libc::SIGURG.into(), info.into()];
        p.call(libc::SYS_rt_tgsigqueueinfo, "queue", &args);
    });
    assert_eq!(
        target.pending(false),
        [[libc::SIGURG, arch::DONE_CODE - 1, me]]
    );
}

#[test]
fn its_end_is_known_when_no_more_signals_may_be_pending() {
    let target = Target::new();
    target.run(|p| {
        let none = p.zeroed(16);
        let resource = libc::RLIMIT_SIGPENDING as i32;
        p.call(
            libc::SYS_setrlimit,
            "allow none",
            &[resource.into(), none.into()],
        );
    });
    target.run(|_| {});
    assert!(target.pending(false).is_empty());
}

#[test]
fn a_stop_is_put_off() {
    let target = Target::new();
    target.send(libc::SIGSTOP, true);
    assert_eq!(target.pending(false)[0][0], libc::SIGSTOP);
    target.run(|_| {});
    assert_eq!(target.pending(false)[0][0], libc::SIGSTOP);
    ptrace::cont(target.tracee.tid, 0).unwrap();
    let stop = ptrace::wait(target.tracee.tid).unwrap();
    assert_eq!(stop, Stop::Signal(libc::SIGSTOP));
}

#[test]
fn whatever_others_send_meanwhile_waits() {
    const REALTIME: i32 = 40;
    const CALLS: usize = 300;
    let target = Target::new();
    let tid = target.tracee.tid;
    let over = std::sync::atomic::AtomicBool::new(false);
    let (sent, got) = std::thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut sent = 0;
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                for signal in [libc::SIGURG, libc::SIGCONT, libc::SIGTERM, libc::SIGSEGV] {
                    // SAFETY: numbers only.
                    unsafe { libc::kill(tid, signal) };
                }
                // SAFETY: numbers only.
                if sent < 200 && unsafe { libc::kill(tid, REALTIME) } == 0 {
                    sent += 1;
                }
            }
            sent
        });
        let mut got = Vec::new();
        for _ in 0..CALLS {
            // As a task that was never told to block anything.
            ptrace::set_sigmask(tid, 0).unwrap();
            let insn = target.arena.syscall_insn();
            got.push(target.tracee.call_at(insn, "id", libc::SYS_gettid, [0; 6]));
            ptrace::set_sigmask(tid, arch::REMOTE_SIGMASK).unwrap();
            target.run(|_| {});
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        (storm.join().unwrap(), got)
    });
    assert!(got.into_iter().all(|id| id.unwrap() == i64::from(tid)));
    let queue = [target.pending(false), target.pending(true)].concat();
    let of = |signal: i32| queue.iter().filter(|s| s[0] == signal).count();
    assert_eq!(of(REALTIME), sent);
    for signal in [libc::SIGURG, libc::SIGTERM, libc::SIGSEGV] {
        assert!((1..=2).contains(&of(signal)), "{signal}: {queue:?}");
    }
}
