//! Signals: dispositions, masks, what is pending, alternate stacks.

use std::fs;
use std::os::raw::{c_int, c_void};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, pthread_sigmask, raise,
    sigaction,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::conformance::stage::POLL;
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "signals/dispositions",
        "handlers with flags and masks, ignored and default signals",
        dispositions,
    ),
    Case::new("signals/masks", "blocked signals of each thread", masks),
    Case::new(
        "signals/pending",
        "pending signals with everything known about them",
        pending,
    ),
    Case::new(
        "signals/pending-each",
        "each signal pending, for the process and for each of two threads",
        pending_each,
    ),
    Case::new(
        "signals/urgent-storm",
        "signals that nobody waits for, arriving all the time",
        storm,
    ),
    Case::new(
        "signals/altstack",
        "handlers on an alternate stack",
        altstack,
    ),
    Case::new(
        "signals/in-handler",
        "a thread inside a signal handler returns from it",
        in_handler,
    ),
    Case::new(
        "signals/stopped",
        "a stopped process stays stopped and goes on when told",
        stopped,
    ),
    Case::new(
        "signals/parent-death",
        "the signal a child asked for at its parent's death",
        parent_death,
    ),
];

static COUNTS: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];
static SENDER: AtomicI32 = AtomicI32::new(0);
static STACK: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(signal: c_int) {
    let here = 0_u8;
    STACK.store(&raw const here as u64, Ordering::SeqCst);
    COUNTS[signal as usize].fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_with_info(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid siginfo; this handler is installed for
    // signals sent by processes.
    SENDER.store(unsafe { (*info).si_pid() }, Ordering::SeqCst);
    COUNTS[signal as usize].fetch_add(1, Ordering::SeqCst);
}

fn counted(signal: Signal) -> u64 {
    COUNTS[signal as usize].load(Ordering::SeqCst)
}

fn set(signal: Signal, action: SigAction) -> Result<()> {
    // SAFETY: the handlers only store to atomics.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// What the kernel holds for a signal: handler, flags, restorer, mask.
fn action(signal: i32) -> Result<[u64; 4]> {
    let mut out = [0_u64; 4];
    let args = [signal as u64, 0, out.as_mut_ptr() as u64, 8, 0, 0];
    // SAFETY: the buffer has the size of the kernel's sigaction.
    unsafe { sys::call(libc::SYS_rt_sigaction, args) }?;
    Ok(out)
}

fn actions() -> Result<Vec<[u64; 4]>> {
    (1..=64).map(action).collect()
}

fn dispositions(_: &Stage) -> Result<Check> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGHUP);
    mask.add(Signal::SIGWINCH);
    let plain = |flags| SigAction::new(SigHandler::Handler(count), flags, mask);
    set(Signal::SIGUSR1, plain(SaFlags::SA_RESTART))?;
    set(
        Signal::SIGUSR2,
        plain(SaFlags::SA_NODEFER | SaFlags::SA_ONSTACK),
    )?;
    let info = SigHandler::SigAction(count_with_info);
    set(
        Signal::SIGALRM,
        SigAction::new(info, SaFlags::SA_SIGINFO, SigSet::all()),
    )?;
    let ignored = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    set(Signal::SIGHUP, ignored)?;
    let once = plain(SaFlags::SA_RESETHAND);
    set(Signal::SIGCONT, once)?;
    let was = actions()?;
    let mut used = 0;
    Ok(Box::new(move |f| {
        for (i, (was, is)) in was.iter().zip(actions()?).enumerate() {
            f.same(
                &format!("signal {}: handler, flags, restorer, mask", i + 1),
                was,
                &is,
            );
        }
        used += 1;
        for s in [
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGALRM,
            Signal::SIGHUP,
            Signal::SIGCONT,
        ] {
            kill(Pid::this(), s)?;
        }
        f.same("SIGUSR1 handled", &used, &counted(Signal::SIGUSR1));
        f.same("SIGUSR2 handled", &used, &counted(Signal::SIGUSR2));
        f.same("SIGALRM handled", &used, &counted(Signal::SIGALRM));
        f.same(
            "its sender",
            &(std::process::id() as i32),
            &SENDER.load(Ordering::SeqCst),
        );
        f.same("SIGHUP ignored", &0, &counted(Signal::SIGHUP));
        f.same("SIGCONT handled", &used, &counted(Signal::SIGCONT));
        set(Signal::SIGCONT, once)
    }))
}

fn blocked() -> Result<u64> {
    let mut out = 0_u64;
    let args = [0, 0, &raw mut out as u64, 8, 0, 0];
    // SAFETY: the kernel's signal set has eight bytes.
    unsafe { sys::call(libc::SYS_rt_sigprocmask, args) }?;
    Ok(out)
}

fn masks(_: &Stage) -> Result<Check> {
    set(
        Signal::SIGUSR1,
        SigAction::new(
            SigHandler::Handler(count),
            SaFlags::empty(),
            SigSet::empty(),
        ),
    )?;
    let mut workers = Vec::new();
    let sets = [
        vec![],
        vec![Signal::SIGUSR1],
        vec![Signal::SIGTERM, Signal::SIGUSR2, Signal::SIGSEGV],
        Signal::iterator().collect(),
    ];
    for signals in sets {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        thread::spawn(move || {
            let set: SigSet = signals.into_iter().collect();
            let _ = set.thread_set_mask();
            loop {
                let _ = answered.send(blocked().unwrap_or(u64::MAX));
                if asked.recv().is_err() {
                    return;
                }
            }
        });
        let was = answer.recv()?;
        workers.push((ask, answer, was));
    }
    let mut mine = SigSet::empty();
    mine.add(Signal::SIGUSR2);
    mine.thread_block()?;
    let own = blocked()?;
    Ok(Box::new(move |f| {
        f.same("the first thread's mask", &own, &blocked()?);
        for (ask, answer, was) in &workers {
            ask.send(())?;
            f.same("a thread's mask", was, &answer.recv()?);
        }
        Ok(())
    }))
}

/// Signal, code, sender's pid and uid, value.
type Sent = (i32, i32, i32, i32, u64);

/// What sigtimedwait gives at once.
fn take(set: &SigSet) -> Result<Option<Sent>> {
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: all-zero is a valid siginfo, set and time outlive the call.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let r = libc::sigtimedwait(set.as_ref(), &mut info, &zero);
        if r < 0 {
            ensure!(
                Errno::last() == Errno::EAGAIN,
                "sigtimedwait: {}",
                Errno::last()
            );
            return Ok(None);
        }
        let value = info.si_value().sival_ptr as u64;
        Ok(Some((
            r,
            info.si_code,
            info.si_pid(),
            info.si_uid() as i32,
            value,
        )))
    }
}

fn queue(signal: i32, value: u64) -> Result<()> {
    let value = libc::sigval {
        sival_ptr: value as *mut c_void,
    };
    // SAFETY: the value is data, nobody follows it.
    let r = unsafe { libc::sigqueue(libc::getpid(), signal, value) };
    ensure!(r == 0, "sigqueue: {}", Errno::last());
    Ok(())
}

fn pending(_: &Stage) -> Result<Check> {
    fn fill() -> Result<()> {
        let rt = libc::SIGRTMIN();
        for value in [0xdead_beef_0001_u64, 2, 3] {
            queue(rt + 3, value)?;
        }
        queue(rt + 1, 77)?;
        kill(Pid::this(), Signal::SIGUSR1)?;
        // For this thread alone.
        raise(Signal::SIGUSR2)?;
        Ok(())
    }
    let set = SigSet::all();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
    let read_all = move || -> Result<Vec<_>> {
        let mut all = Vec::new();
        while let Some(one) = take(&set)? {
            all.push(one);
        }
        Ok(all)
    };
    fill()?;
    let want = read_all()?;
    ensure!(want.len() == 6, "six signals are pending: {want:?}");
    fill()?;
    Ok(Box::new(move |f| {
        let is = read_all()?;
        f.same("pending signals", &want, &is);
        fill()
    }))
}

/// The signals that can wait side by side: those which stop a process and the
/// one that lets it go on take each other away.
fn waiting() -> impl Iterator<Item = c_int> {
    let apart = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
    ];
    (1..=64).filter(move |s| !apart.contains(s) && ![32, 33, 34].contains(s))
}

fn mask_of(key: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/thread-self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(key));
    Ok(u64::from_str_radix(line.unwrap_or_default().trim(), 16)?)
}

fn pending_each(_: &Stage) -> Result<Check> {
    let set = SigSet::all();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
    // Of one thread: all that wait for it alone.
    fn fill() -> Result<u64> {
        for signal in waiting() {
            // SAFETY: numbers only; the signal is blocked.
            ensure!(unsafe { libc::raise(signal) } == 0, "raise {signal}");
        }
        mask_of("SigPnd:")
    }
    let all = waiting().fold(0, |all, s| all | 1 << (s - 1));
    for signal in waiting() {
        // SAFETY: as above.
        ensure!(unsafe { libc::kill(libc::getpid(), signal) } == 0, "kill");
    }
    let (ask, asked) = mpsc::channel::<()>();
    let (answered, answer) = mpsc::channel();
    thread::spawn(move || {
        let mut is = fill();
        loop {
            let _ = answered.send(is);
            if asked.recv().is_err() {
                return;
            }
            is = mask_of("SigPnd:");
        }
    });
    ensure!(answer.recv()?? == all, "all wait for the second thread");
    ensure!(fill()? == all, "all wait for the first thread");
    Ok(Box::new(move |f| {
        f.same("for the first thread", &all, &mask_of("SigPnd:")?);
        f.same("for the process", &all, &mask_of("ShdPnd:")?);
        ask.send(())?;
        f.same("for the second thread", &all, &answer.recv()??);
        Ok(())
    }))
}

/// A process beside the tree sends signals all the time.
fn storm(stage: &Stage) -> Result<Check> {
    let me = Pid::this();
    stage.outsider(|| {
        let signals = [
            Signal::SIGURG,
            Signal::SIGWINCH,
            Signal::SIGCHLD,
            Signal::SIGCONT,
        ];
        for s in signals.iter().cycle() {
            // In between dump and restore there is nobody.
            let _ = kill(me, *s);
            thread::sleep(std::time::Duration::from_micros(50));
        }
        Ok(())
    })?;
    let plain = SigHandler::Handler(count);
    let action = SigAction::new(plain, SaFlags::SA_RESTART, SigSet::empty());
    set(Signal::SIGURG, action)?;
    let (begin, begun) = mpsc::channel();
    let asleep = thread::spawn(move || {
        let _ = begin.send(());
        thread::sleep(std::time::Duration::from_secs(3600));
    });
    begun.recv()?;
    Ok(Box::new(move |f| {
        let before = counted(Signal::SIGURG);
        while counted(Signal::SIGURG) == before {
            thread::sleep(POLL);
        }
        f.that("a thread's sleep has ended", !asleep.is_finished());
        Ok(())
    }))
}

fn altstack(_: &Stage) -> Result<Check> {
    let stack = Map::private(64 << 10)?;
    let described = libc::stack_t {
        ss_sp: stack.ptr().as_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: the stack is mapped as long as the program lives.
    let r = unsafe { libc::sigaltstack(&described, std::ptr::null_mut()) };
    ensure!(r == 0, "sigaltstack");
    let handler = SigHandler::Handler(count);
    set(
        Signal::SIGUSR1,
        SigAction::new(handler, SaFlags::SA_ONSTACK, SigSet::empty()),
    )?;
    Ok(Box::new(move |f| {
        // SAFETY: all-zero is valid; the kernel fills it.
        let now = unsafe {
            let mut now: libc::stack_t = std::mem::zeroed();
            ensure!(
                libc::sigaltstack(std::ptr::null(), &mut now) == 0,
                "sigaltstack"
            );
            now
        };
        f.same("place", &stack.addr(), &(now.ss_sp as usize));
        f.same("size", &stack.len(), &now.ss_size);
        f.same("flags", &0, &now.ss_flags);
        raise(Signal::SIGUSR1)?;
        let at = STACK.load(Ordering::SeqCst) as usize;
        let inside = (stack.addr()..stack.addr() + stack.len()).contains(&at);
        f.that(
            format!("the handler ran at {at:x}, not on its stack"),
            inside,
        );
        Ok(())
    }))
}

static INSIDE: AtomicU64 = AtomicU64::new(0);
static LEAVE: AtomicU64 = AtomicU64::new(0);

extern "C" fn stay(_: c_int) {
    let turn = INSIDE.fetch_add(1, Ordering::SeqCst) + 1;
    while LEAVE.load(Ordering::SeqCst) < turn {
        thread::sleep(POLL);
    }
}

fn in_handler(_: &Stage) -> Result<Check> {
    let handler = SigHandler::Handler(stay);
    set(
        Signal::SIGUSR1,
        SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty()),
    )?;
    fn enter() -> Result<mpsc::Receiver<(u64, u64)>> {
        let (sender, result) = mpsc::channel();
        thread::spawn(move || {
            let before = blocked().unwrap_or(1);
            let held = std::hint::black_box(0x1234_5678_u64);
            let _ = raise(Signal::SIGUSR1);
            let _ = sender.send((before ^ blocked().unwrap_or(0), std::hint::black_box(held)));
        });
        Ok(result)
    }
    let mut result = enter()?;
    sys::await_word(&INSIDE, 1);
    let mut turn = 1;
    Ok(Box::new(move |f| {
        f.that("still inside", result.try_recv().is_err());
        LEAVE.store(turn, Ordering::SeqCst);
        f.same(
            "mask and values after the handler",
            &(0, 0x1234_5678),
            &result.recv()?,
        );
        turn += 1;
        result = enter()?;
        sys::await_word(&INSIDE, turn);
        Ok(())
    }))
}

fn stopped(_: &Stage) -> Result<Check> {
    let word = Map::forever(4096)?;
    let member = Member::start("the stopped process", || {
        Ok(Box::new(|_: &mut Findings| {
            word.word(0).fetch_add(1, Ordering::SeqCst);
            Ok(())
        }) as Check)
    })?;
    let child = Pid::from_raw(member.pid);
    let stop = move |word: &Map| -> Result<u64> {
        kill(child, Signal::SIGSTOP)?;
        let status = waitpid(child, Some(WaitPidFlag::WUNTRACED))?;
        ensure!(
            status == WaitStatus::Stopped(child, Signal::SIGSTOP),
            "{status:?}"
        );
        Ok(word.word(0).load(Ordering::SeqCst))
    };
    let mut turns = stop(word)?;
    let state = move || -> Result<String> {
        let stat = fs::read_to_string(format!("/proc/{child}/stat"))?;
        Ok(stat.rsplit(") ").next().unwrap_or_default()[..1].to_owned())
    };
    Ok(Box::new(move |f| {
        f.same("state", "T", &state()?);
        kill(child, Signal::SIGCONT)?;
        member.check(f)?;
        f.same(
            "turns of the child",
            &(turns + 1),
            &word.word(0).load(Ordering::SeqCst),
        );
        turns = stop(word)?;
        Ok(())
    }))
}

fn parent_death(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    // The middle process ends on demand; its child asked to be told.
    let start = move || -> Result<(Pid, i32)> {
        words.word(0).store(0, Ordering::SeqCst);
        words.word(1).store(0, Ordering::SeqCst);
        // SAFETY: the children use shared words and async-signal-safe calls.
        match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Parent { child } => {
                sys::await_word(words.word(0), 1);
                Ok((child, words.word(0).load(Ordering::SeqCst) as i32))
            }
            nix::unistd::ForkResult::Child => {
                // SAFETY: as above.
                if let Ok(nix::unistd::ForkResult::Child) = unsafe { nix::unistd::fork() } {
                    let _ = SigSet::all().thread_set_mask();
                    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGUSR2);
                    let me = std::process::id();
                    words.word(0).store(u64::from(me), Ordering::SeqCst);
                    let mut wanted = SigSet::empty();
                    wanted.add(Signal::SIGUSR2);
                    loop {
                        if let Ok(s) = wanted.wait() {
                            words.word(1).store(s as u64, Ordering::SeqCst);
                        }
                    }
                }
                loop {
                    nix::unistd::pause();
                }
            }
        }
    };
    let mut family = start()?;
    Ok(Box::new(move |f| {
        f.same("signals so far", &0, &words.word(1).load(Ordering::SeqCst));
        kill(family.0, Signal::SIGKILL)?;
        waitpid(family.0, None)?;
        sys::await_word(words.word(1), 1);
        let got = words.word(1).load(Ordering::SeqCst);
        f.same(
            "signal at the parent's death",
            &(Signal::SIGUSR2 as u64),
            &got,
        );
        kill(Pid::from_raw(family.1), Signal::SIGKILL)?;
        family = start()?;
        Ok(())
    }))
}
