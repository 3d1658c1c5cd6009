//! What processes and threads have set for themselves by prctl(2) and its kin.

use std::arch::asm;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::conformance::case::Unavailable;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "process/syscall-dispatch",
        "system calls that go to the program itself (PR_SET_SYSCALL_USER_DISPATCH)",
        syscall_dispatch,
    ),
    Case::new(
        "threads/single-step",
        "a thread that steps itself (trap flag)",
        single_step,
    ),
    Case::new(
        "process/speculation",
        "speculation control (PR_SET_SPECULATION_CTRL)",
        speculation,
    ),
    Case::new(
        "threads/no-tsc",
        "a thread that may not read the time stamp counter (PR_SET_TSC)",
        no_tsc,
    ),
    Case::new(
        "threads/no-cpuid",
        "a thread in which CPUID faults (ARCH_SET_CPUID)",
        no_cpuid,
    ),
    Case::new(
        "threads/personality",
        "threads with personalities of their own",
        personalities,
    ),
    Case::new(
        "process/io-flusher",
        "an I/O flusher (PR_SET_IO_FLUSHER)",
        io_flusher,
    ),
    Case::new(
        "process/autogroup",
        "nice values of scheduling autogroups",
        autogroup,
    ),
    Case::new(
        "process/huge-pages-if-advised",
        "transparent huge pages only where advised",
        thp_except_advised,
    ),
    Case::new(
        "process/deadline",
        "a thread scheduled by deadlines",
        deadline,
    ),
    Case::new(
        "timers/chosen-ids",
        "a process that chooses the ids of its timers",
        chosen_timer_ids,
    ),
    Case::new(
        "creds/securebits",
        "securebits, locked ones and keep-capabilities",
        securebits,
    ),
    Case::new(
        "signals/autodisarm",
        "an alternate stack that is taken off in handlers (SS_AUTODISARM)",
        autodisarm,
    ),
    Case::new("threads/amx", "AMX tiles and the permission for them", amx),
    Case::new(
        "threads/shadow-stack",
        "a thread with a shadow stack",
        shadow_stack,
    )
    .refused(),
];

/// A thread that is asked for numbers again and again.
struct Asked {
    ask: mpsc::Sender<()>,
    answer: mpsc::Receiver<Vec<i64>>,
}

impl Asked {
    /// Changes the thread by `setup`, which says whether it could, and asks it.
    fn start(
        setup: impl FnOnce() -> std::io::Result<i64> + Send + 'static,
        read: impl Fn() -> Vec<i64> + Send + 'static,
    ) -> Result<(Self, Vec<i64>)> {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        let (said, could) = mpsc::channel();
        thread::spawn(move || {
            let done = setup().map(drop);
            let good = done.is_ok();
            let _ = said.send(done);
            while good && answered.send(read()).is_ok() && asked.recv().is_ok() {}
        });
        could.recv()?.map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => Unavailable::because("it takes a capability we lack"),
            Some(libc::EINVAL | libc::ENODEV | libc::ENXIO | libc::EOPNOTSUPP) => {
                Unavailable::because("neither this kernel nor this processor has it")
            }
            _ => e.into(),
        })?;
        let was = answer.recv()?;
        Ok((Self { ask, answer }, was))
    }

    fn check(self, what: &'static str, was: Vec<i64>) -> Check {
        Box::new(move |f: &mut Findings| {
            self.ask.send(())?;
            f.same(what, &was, &self.answer.recv()?);
            Ok(())
        })
    }
}

fn get(option: i32, args: &[i64]) -> i64 {
    let mut all = [0; 4];
    all[..args.len()].copy_from_slice(args);
    sys::prctl(option, &all).unwrap_or(-1)
}

static SELECTOR: AtomicU8 = AtomicU8::new(0);
static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn caught(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Calls go through again, the return from here first of all.
    SELECTOR.store(0, Ordering::SeqCst);
    // SAFETY: the kernel gives a valid siginfo; SYS_USER_DISPATCH is 2.
    if unsafe { (*info).si_code } == 2 {
        CAUGHT.fetch_add(1, Ordering::SeqCst);
    }
}

fn syscall_dispatch(_: &Stage) -> Result<Check> {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_RESTART;
    let action = SigAction::new(SigHandler::SigAction(caught), flags, SigSet::empty());
    // SAFETY: the handler stores to atomics.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    let (thread, _) = Asked::start(
        || {
            let at = SELECTOR.as_ptr() as i64;
            sys::prctl(PR_SET_SYSCALL_USER_DISPATCH, &[1, 0, 0, at])
        },
        || {
            let before = CAUGHT.load(Ordering::SeqCst);
            SELECTOR.store(1, Ordering::SeqCst);
            // SAFETY: a call without arguments; it ends up in the handler.
            unsafe { libc::syscall(libc::SYS_getpid) };
            SELECTOR.store(0, Ordering::SeqCst);
            vec![(CAUGHT.load(Ordering::SeqCst) - before) as i64]
        },
    )?;
    Ok(thread.check("calls that were caught", vec![1]))
}

static STEPS: AtomicU64 = AtomicU64::new(0);

extern "C" fn stepped(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    STEPS.fetch_add(1, Ordering::SeqCst);
}

fn single_step(_: &Stage) -> Result<Check> {
    let action = SigAction::new(
        SigHandler::SigAction(stepped),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler counts.
    unsafe { sigaction(Signal::SIGTRAP, &action) }?;
    let turns: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    thread::spawn(move || {
        // SAFETY: sets the trap flag and counts for ever; each instruction
        // traps into the handler. The red zone is left alone.
        unsafe {
            asm!(
                "lea rsp, [rsp - 128]",
                "pushfq",
                "or qword ptr [rsp], 0x100",
                "popfq",
                "2:",
                "lock inc qword ptr [{0}]",
                "jmp 2b",
                in(reg) turns.as_ptr(),
                options(noreturn)
            )
        }
    });
    Ok(Box::new(move |f| {
        sys::await_word(turns, turns.load(Ordering::SeqCst) + 3);
        // A thread that steps makes two steps a turn.
        let (steps, from) = (STEPS.load(Ordering::SeqCst), turns.load(Ordering::SeqCst));
        sys::await_word(turns, from + 20);
        let made = STEPS.load(Ordering::SeqCst) - steps;
        f.that(format!("steps go on: {made}"), made >= 20);
        Ok(())
    }))
}

fn speculation(_: &Stage) -> Result<Check> {
    const PR_GET: i32 = 52;
    const PR_SET: i32 = 53;
    const DISABLE: i64 = 4;
    let mut done = false;
    for which in 0..3 {
        if get(PR_GET, &[which]) & 1 == 1 {
            sys::prctl(PR_SET, &[which, DISABLE, 0, 0])?;
            done = true;
        }
    }
    if !done {
        return Err(Unavailable::because(
            "this processor leaves no choice of speculation",
        ));
    }
    let read = || (0..3).map(|w| get(PR_GET, &[w])).collect::<Vec<_>>();
    let was = read();
    Ok(Box::new(move |f| {
        f.same("speculation control", &was, &read());
        Ok(())
    }))
}

fn no_tsc(_: &Stage) -> Result<Check> {
    let (thread, was) = Asked::start(
        || sys::prctl(26, &[2, 0, 0, 0]),
        || {
            let mut mode = 0_i32;
            let args = [25, &raw mut mode as u64, 0, 0, 0, 0];
            // SAFETY: the int outlives the call.
            let r = unsafe { sys::call(libc::SYS_prctl, args) };
            vec![r.unwrap_or(-1), mode.into()]
        },
    )?;
    ensure!(was == [0, 2], "{was:?}");
    Ok(thread.check("the counter's mode", was))
}

fn no_cpuid(_: &Stage) -> Result<Check> {
    let (thread, was) = Asked::start(
        || sys::numbers(libc::SYS_arch_prctl, &[0x1012, 0]),
        || vec![sys::numbers(libc::SYS_arch_prctl, &[0x1011, 0]).unwrap_or(-1)],
    )?;
    Ok(thread.check("whether CPUID may be used", was))
}

fn personalities(_: &Stage) -> Result<Check> {
    const ADDR_NO_RANDOMIZE: i64 = 0x004_0000;
    let read = || vec![sys::numbers(libc::SYS_personality, &[0xffff_ffff]).unwrap_or(-1)];
    let (one, was_one) = Asked::start(|| Ok(0), read)?;
    sys::numbers(libc::SYS_personality, &[ADDR_NO_RANDOMIZE])?;
    let (two, was_two) = Asked::start(
        || sys::numbers(libc::SYS_personality, &[0x0200_0000 | ADDR_NO_RANDOMIZE]),
        read,
    )?;
    ensure!(was_one == [0], "{was_one:?}");
    let mut checks = [
        one.check("a thread without", was_one),
        two.check("a thread with another one", was_two),
    ];
    Ok(Box::new(move |f| {
        for check in &mut checks {
            check(f)?;
        }
        f.same("the first thread's", &vec![ADDR_NO_RANDOMIZE], &read());
        Ok(())
    }))
}

fn io_flusher(_: &Stage) -> Result<Check> {
    let (thread, was) = Asked::start(|| sys::prctl(57, &[1, 0, 0, 0]), || vec![get(58, &[])])?;
    Ok(thread.check("I/O flusher", was))
}

fn autogroup(_: &Stage) -> Result<Check> {
    const FILE: &str = "/proc/self/autogroup";
    if !fs::exists(FILE)? {
        return Err(Unavailable::because("this kernel has no autogroups"));
    }
    let nice = || -> Result<String> {
        let text = fs::read_to_string(FILE)?;
        Ok(text.rsplit(' ').next().context("nice")?.trim().to_owned())
    };
    fs::write(FILE, "7")?;
    let other = Member::start("another session", move || {
        nix::unistd::setsid()?;
        fs::write(FILE, "-3")?;
        Ok(Box::new(move |f: &mut Findings| {
            f.same("nice of its group", "-3", nice()?.as_str());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        f.same("nice of our group", "7", nice()?.as_str());
        other.check(f)
    }))
}

fn thp_except_advised(_: &Stage) -> Result<Check> {
    if sys::prctl(41, &[1, 2, 0, 0]).is_err() {
        return Err(Unavailable::because("a kernel before 6.18"));
    }
    ensure!(get(42, &[]) == 3, "{}", get(42, &[]));
    Ok(Box::new(move |f| {
        f.same("THP disabled", &3, &get(42, &[]));
        Ok(())
    }))
}

/// `struct sched_attr` without what came later.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    times: [u64; 3],
}

fn deadline(_: &Stage) -> Result<Check> {
    const SCHED_DEADLINE: u32 = 6;
    let (thread, was) = Asked::start(
        || {
            let attr = SchedAttr {
                size: 48,
                policy: SCHED_DEADLINE,
                times: [1_000_000, 50_000_000, 100_000_000],
                ..SchedAttr::default()
            };
            let args = [0, &raw const attr as u64, 0, 0, 0, 0];
            // SAFETY: the struct carries its size and outlives the call.
            unsafe { sys::call(libc::SYS_sched_setattr, args) }
        },
        || {
            let mut attr = SchedAttr::default();
            let args = [0, &raw mut attr as u64, 48, 0, 0, 0];
            // SAFETY: as above.
            let r = unsafe { sys::call(libc::SYS_sched_getattr, args) };
            let [runtime, deadline, period] = attr.times.map(|t| t as i64);
            vec![
                r.unwrap_or(-1),
                attr.policy.into(),
                runtime,
                deadline,
                period,
            ]
        },
    )?;
    ensure!(was[1] == i64::from(SCHED_DEADLINE), "{was:?}");
    Ok(thread.check("policy and times", was))
}

fn chosen_timer_ids(_: &Stage) -> Result<Check> {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    if sys::prctl(PR_TIMER_CREATE_RESTORE_IDS, &[1, 0, 0, 0]).is_err() {
        return Err(Unavailable::because("a kernel before 6.15"));
    }
    Ok(Box::new(move |f| {
        f.same("chosen ids", &1, &get(PR_TIMER_CREATE_RESTORE_IDS, &[2]));
        Ok(())
    }))
}

fn securebits(_: &Stage) -> Result<Check> {
    const PR_GET_SECUREBITS: i32 = 27;
    const PR_SET_SECUREBITS: i32 = 28;
    const PR_GET_KEEPCAPS: i32 = 7;
    let mut threads = Vec::new();
    // NOROOT and its lock, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE and its lock.
    for bits in [0b11, 0b100, 0b1100_0000, 0b1_0000] {
        let (thread, was) = Asked::start(
            move || sys::prctl(PR_SET_SECUREBITS, &[bits, 0, 0, 0]),
            || vec![get(PR_GET_SECUREBITS, &[]), get(PR_GET_KEEPCAPS, &[])],
        )?;
        ensure!(was == [bits, bits >> 4 & 1], "{was:?}");
        threads.push(thread.check("securebits, keep capabilities", was));
    }
    Ok(Box::new(move |f| {
        for check in &mut threads {
            check(f)?;
        }
        Ok(())
    }))
}

fn autodisarm(_: &Stage) -> Result<Check> {
    const SS_AUTODISARM: i32 = 1 << 31;
    let stack = sys::Map::private(64 << 10)?;
    let described = libc::stack_t {
        ss_sp: stack.ptr().as_ptr().cast(),
        ss_flags: SS_AUTODISARM,
        ss_size: stack.len(),
    };
    // SAFETY: the stack is mapped as long as the program lives.
    let r = unsafe { libc::sigaltstack(&described, std::ptr::null_mut()) };
    ensure!(r == 0, "sigaltstack");
    Ok(Box::new(move |f| {
        // SAFETY: all-zero is valid; the kernel fills it.
        let (r, now) = unsafe {
            let mut now: libc::stack_t = std::mem::zeroed();
            (libc::sigaltstack(std::ptr::null(), &mut now), now)
        };
        f.same("sigaltstack", &0, &r);
        f.same("place", &stack.addr(), &(now.ss_sp as usize));
        f.same("size", &stack.len(), &now.ss_size);
        f.same("flags", &SS_AUTODISARM, &now.ss_flags);
        Ok(())
    }))
}

fn amx(_: &Stage) -> Result<Check> {
    const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    if sys::numbers(libc::SYS_arch_prctl, &[ARCH_REQ_XCOMP_PERM, TILE_DATA]).is_err() {
        return Err(Unavailable::because("the processor has no AMX"));
    }
    let read = || -> Result<u64> {
        let mut mask = 0_u64;
        let args = [ARCH_GET_XCOMP_PERM, &raw mut mask as u64, 0, 0, 0, 0];
        // SAFETY: the mask outlives the call.
        unsafe { sys::call(libc::SYS_arch_prctl, args) }?;
        Ok(mask)
    };
    let was = read()?;
    Ok(Box::new(move |f| {
        f.same("permitted features", &was, &read()?);
        Ok(())
    }))
}

fn shadow_stack(stage: &Stage) -> Result<Check> {
    let stop = Arc::new(AtomicBool::new(false));
    let (theirs, said) = (stop.clone(), mpsc::channel());
    let (tell, told) = said;
    thread::spawn(move || {
        // SAFETY: numbers only. On success this function never returns, since
        // its callers are not on the new shadow stack.
        let on = unsafe { libc::syscall(libc::SYS_arch_prctl, 0x5001, 1) } == 0;
        let _ = tell.send((on, sys::gettid()));
        while on && !theirs.load(Ordering::SeqCst) {
            std::hint::spin_loop();
        }
    });
    let (on, tid) = told.recv()?;
    if !on {
        return Err(Unavailable::because(
            "neither this kernel nor this processor has shadow stacks",
        ));
    }
    stage.expect_refusal(&["shadow stack".into(), format!("thread {tid}")])?;
    Ok(Box::new(move |f| {
        f.that("it runs on", fs::exists(format!("/proc/self/task/{tid}"))?);
        Ok(())
    }))
}
