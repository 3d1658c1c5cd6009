//! Threads: ids, what waits in the kernel, registers, rseq, robust locks.

use std::arch::asm;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use crate::conformance::stage::POLL;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "threads/ids",
        "several threads: ids, names, thread-local data",
        ids,
    ),
    Case::new("threads/many", "a hundred threads", many),
    Case::new(
        "threads/futex",
        "futex waiters are still waiting and are woken",
        futex,
    ),
    Case::new(
        "threads/condvar",
        "a condition variable and a contended lock",
        condvar,
    ),
    Case::new(
        "threads/robust",
        "robust lists: the kernel releases a dead thread's lock",
        robust,
    ),
    Case::new("threads/rseq", "the rseq area is kept up to date", rseq),
    Case::new(
        "threads/registers",
        "x87, SSE and AVX registers of running threads",
        registers,
    ),
    Case::new(
        "threads/spinning",
        "general registers and flags of a running loop",
        spinning,
    ),
    Case::new("threads/blocked-read", "blocked in read(2)", blocked_read),
    Case::new("threads/blocked-poll", "blocked in poll(2)", blocked_poll),
    Case::new(
        "threads/blocked-epoll",
        "blocked in epoll_wait(2)",
        blocked_epoll,
    ),
    Case::new(
        "threads/blocked-accept",
        "blocked in accept(2)",
        blocked_accept,
    ),
    Case::new(
        "threads/blocked-wait",
        "blocked in wait4(2) and pause(2)",
        blocked_wait,
    ),
];

fn ids(_: &Stage) -> Result<Check> {
    thread_local!(static MINE: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    struct Worker {
        tid: i32,
        ask: mpsc::Sender<()>,
        answer: mpsc::Receiver<(i32, u64, String)>,
        _join: JoinHandle<()>,
    }
    let mut workers = Vec::new();
    for n in 0..5_u64 {
        let (ask, asked) = mpsc::channel();
        let (answered, answer) = mpsc::channel();
        let (said, tid) = mpsc::channel();
        let name = format!("worker {n}");
        let join = thread::Builder::new().name(name).spawn(move || {
            MINE.set(n + 1000);
            let _ = said.send(sys::gettid());
            while asked.recv().is_ok() {
                let comm = fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
                let _ = answered.send((sys::gettid(), MINE.get(), comm));
            }
        })?;
        workers.push(Worker {
            tid: tid.recv()?,
            ask,
            answer,
            _join: join,
        });
    }
    let me = sys::gettid();
    Ok(Box::new(move |f| {
        f.same("the first thread's id", &me, &sys::gettid());
        f.same("the process's id", &me, &(std::process::id() as i32));
        for (n, w) in workers.iter().enumerate() {
            w.ask.send(())?;
            let (tid, mine, comm) = w.answer.recv()?;
            f.same("a thread's id", &w.tid, &tid);
            f.same("thread-local data", &(n as u64 + 1000), &mine);
            f.same("name", format!("worker {n}\n").as_str(), comm.as_str());
        }
        let answer = thread::spawn(|| 7).join();
        f.same("a new thread", &Some(7), &answer.ok());
        Ok(())
    }))
}

fn many(_: &Stage) -> Result<Check> {
    let turn = Arc::new(AtomicU64::new(0));
    let sum = Arc::new(AtomicU64::new(0));
    let up = Arc::new(AtomicU64::new(0));
    for _ in 0..100 {
        let (turn, sum, up) = (turn.clone(), sum.clone(), up.clone());
        thread::Builder::new().stack_size(64 << 10).spawn(move || {
            let mut seen = 0;
            up.fetch_add(1, Ordering::SeqCst);
            loop {
                if turn.load(Ordering::SeqCst) > seen {
                    seen += 1;
                    sum.fetch_add(1, Ordering::SeqCst);
                }
                thread::sleep(POLL);
            }
        })?;
    }
    sys::await_word(&up, 100);
    Ok(Box::new(move |_| {
        let before = sum.load(Ordering::SeqCst);
        turn.fetch_add(1, Ordering::SeqCst);
        sys::await_word(&sum, before + 100);
        Ok(())
    }))
}

fn futex(_: &Stage) -> Result<Check> {
    let word = Arc::new(AtomicU32::new(0));
    let woken = Arc::new(AtomicU64::new(0));
    let interrupted = Arc::new(AtomicU64::new(0));
    let mut tids = Vec::new();
    for _ in 0..4 {
        let (word, woken, interrupted) = (word.clone(), woken.clone(), interrupted.clone());
        let (said, tid) = mpsc::channel();
        thread::spawn(move || {
            let _ = said.send(sys::gettid());
            let mut seen = 0;
            loop {
                if !sys::futex_wait(&word, seen) {
                    interrupted.fetch_add(1, Ordering::SeqCst);
                }
                let now = word.load(Ordering::SeqCst);
                if now != seen {
                    seen = now;
                    woken.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        tids.push(tid.recv()?);
    }
    let all_wait = move || tids.iter().all(|&t| in_call(t, libc::SYS_futex));
    await_that(&all_wait);
    let mut round = 0;
    Ok(Box::new(move |f| {
        await_that(&all_wait);
        round += 1;
        word.store(round, Ordering::SeqCst);
        f.same("waiters woken", &4, &sys::futex_wake(&word));
        sys::await_word(&woken, u64::from(round) * 4);
        f.same("waits that failed", &0, &interrupted.load(Ordering::SeqCst));
        await_that(&all_wait);
        Ok(())
    }))
}

/// Whether a thread of ours sleeps in that system call. One that was stopped
/// and left running may have come back to it by restart_syscall(2).
fn in_call(tid: i32, number: i64) -> bool {
    let text = fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap_or_default();
    let now = text.split(' ').next().and_then(|w| w.parse().ok());
    now == Some(number) || now == Some(libc::SYS_restart_syscall)
}

fn await_that(holds: &dyn Fn() -> bool) {
    while !holds() {
        thread::sleep(POLL);
    }
}

fn condvar(_: &Stage) -> Result<Check> {
    let pair = Arc::new((Mutex::new(0_u64), Condvar::new()));
    let done = Arc::new(AtomicU64::new(0));
    for _ in 0..3 {
        let (pair, done) = (pair.clone(), done.clone());
        thread::spawn(move || {
            for round in 1.. {
                let mut value = pair.0.lock().expect("no panics");
                while *value < round {
                    value = pair.1.wait(value).expect("no panics");
                }
                drop(value);
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let mut round = 0;
    Ok(Box::new(move |_| {
        round += 1;
        *pair.0.lock().expect("no panics") = round;
        pair.1.notify_all();
        sys::await_word(&done, round * 3);
        Ok(())
    }))
}

fn robust(_: &Stage) -> Result<Check> {
    // A robust mutex of libc, kept by a thread that ends on demand.
    struct Lock(Box<std::cell::UnsafeCell<libc::pthread_mutex_t>>);
    // SAFETY: mutexes are made to be shared.
    unsafe impl Send for Lock {}
    // SAFETY: as above.
    unsafe impl Sync for Lock {}
    impl Lock {
        fn at(&self) -> *mut libc::pthread_mutex_t {
            self.0.get()
        }
    }
    fn held() -> Result<(Arc<Lock>, mpsc::Sender<()>, i32)> {
        let lock = Arc::new(Lock(Box::new(std::cell::UnsafeCell::new(
            libc::PTHREAD_MUTEX_INITIALIZER,
        ))));
        // SAFETY: the attribute is initialised before use and the mutex lives
        // in a box that stays in place.
        unsafe {
            let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attr);
            libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
            ensure!(libc::pthread_mutex_init(lock.at(), &attr) == 0, "mutex");
        }
        let (end, ended) = mpsc::channel();
        let (said, up) = mpsc::channel();
        let theirs = lock.clone();
        thread::spawn(move || {
            // SAFETY: initialised above, kept alive by the Arc.
            unsafe { libc::pthread_mutex_lock(theirs.at()) };
            let _ = said.send(sys::gettid());
            let _ = ended.recv();
        });
        let tid = up.recv()?;
        Ok((lock, end, tid))
    }
    let mut current = held()?;
    let head = move |tid: i32| -> Result<(u64, u64)> {
        let mut out = [0_u64; 2];
        let (at, len) = (&raw mut out[0] as u64, &raw mut out[1] as u64);
        // SAFETY: both results are written to words that outlive the call.
        unsafe { sys::call(libc::SYS_get_robust_list, [tid as u64, at, len, 0, 0, 0]) }?;
        Ok((out[0], out[1]))
    };
    let mut was = head(current.2)?;
    Ok(Box::new(move |f| {
        let (lock, end, tid) = &current;
        f.same("robust list", &was, &head(*tid)?);
        // SAFETY: a valid mutex.
        let busy = unsafe { libc::pthread_mutex_trylock(lock.at()) };
        f.same("the lock is held", &libc::EBUSY, &busy);
        end.send(())?;
        // SAFETY: a valid mutex; the wait ends when the owner is dead.
        let got = unsafe { libc::pthread_mutex_lock(lock.at()) };
        f.same("taking a dead owner's lock", &libc::EOWNERDEAD, &got);
        current = held()?;
        was = head(current.2)?;
        Ok(())
    }))
}

unsafe extern "C" {
    /// Where libc's rseq area lies from the thread pointer.
    static __rseq_offset: isize;
    /// Its size, 0 where libc registered none.
    static __rseq_size: u32;
}

/// `cpu_id` of this thread's rseq area (linux/rseq.h).
fn rseq_cpu() -> i32 {
    let thread_pointer: usize;
    // SAFETY: reads the first word of the thread control block, which on this
    // architecture is its own address.
    unsafe { asm!("mov {}, fs:0", out(reg) thread_pointer) };
    // SAFETY: libc's area lies there for the thread's whole life; the kernel
    // writes to it at any time.
    unsafe {
        let area = thread_pointer.wrapping_add_signed(__rseq_offset);
        std::ptr::read_volatile((area + 4) as *const i32)
    }
}

fn rseq(_: &Stage) -> Result<Check> {
    // SAFETY: set by libc before main.
    let size = unsafe { __rseq_size };
    ensure!(size >= 20, "libc has registered no rseq area");
    Ok(Box::new(move |f| {
        let look = || -> Result<Vec<(usize, i32, usize)>> {
            let mut out = Vec::new();
            let all = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
            for cpu in (0..nix::sched::CpuSet::count()).filter(|&c| all.is_set(c) == Ok(true)) {
                let mut one = nix::sched::CpuSet::new();
                one.set(cpu)?;
                nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one)?;
                out.push((cpu, rseq_cpu(), nix::sched::sched_getcpu()?));
            }
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &all)?;
            Ok(out)
        };
        for (cpu, area, call) in look()? {
            f.same("cpu in the rseq area", &(cpu as i32), &area);
            f.same("cpu by sched_getcpu", &cpu, &call);
        }
        let there = thread::spawn(move || look().map_err(|e| e.to_string()));
        let there = there.join().ok().context("a thread panicked")?;
        for (cpu, area, _) in there.map_err(anyhow::Error::msg)? {
            f.same("cpu in a new thread's area", &(cpu as i32), &area);
        }
        Ok(())
    }))
}

/// Shared with loops in assembly: `stop` at offset 0, `turns` at 8.
#[repr(C, align(64))]
struct Loop {
    stop: AtomicU64,
    turns: AtomicU64,
    out: [AtomicU64; 64],
}

impl Loop {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            out: [const { AtomicU64::new(0) }; 64],
        })
    }

    fn out(&self) -> Vec<u64> {
        self.out.iter().map(|w| w.load(Ordering::SeqCst)).collect()
    }
}

/// Starts `body` in a thread; it loops until told to stop.
fn running(body: fn(&Loop)) -> (Arc<Loop>, JoinHandle<()>) {
    let shared = Loop::new();
    let theirs = shared.clone();
    let join = thread::spawn(move || body(&theirs));
    sys::await_word(&shared.turns, 1000);
    (shared, join)
}

/// Values in registers, a loop that leaves them alone, values out.
fn sse_loop(l: &Loop) {
    let values: [u64; 16] = std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
    // SAFETY: reads 128 bytes of `values`, writes 128 of `out`, counts in
    // `turns`; all registers it changes are declared.
    unsafe {
        asm!(
            "movups xmm8, [{v}]", "movups xmm9, [{v}+16]", "movups xmm10, [{v}+32]",
            "movups xmm11, [{v}+48]", "movups xmm12, [{v}+64]", "movups xmm13, [{v}+80]",
            "movups xmm14, [{v}+96]", "movups xmm15, [{v}+112]",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "movups [{o}], xmm8", "movups [{o}+16], xmm9", "movups [{o}+32], xmm10",
            "movups [{o}+48], xmm11", "movups [{o}+64], xmm12", "movups [{o}+80], xmm13",
            "movups [{o}+96], xmm14", "movups [{o}+112], xmm15",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
}

#[target_feature(enable = "avx")]
fn avx_inner(l: &Loop) {
    let values: [u64; 32] = std::array::from_fn(|i| 0x1111_2222_3333_4400 + i as u64);
    // SAFETY: as in `sse_loop`, with 256 bytes each way.
    unsafe {
        asm!(
            "vmovups ymm8, [{v}]", "vmovups ymm9, [{v}+32]", "vmovups ymm10, [{v}+64]",
            "vmovups ymm11, [{v}+96]", "vmovups ymm12, [{v}+128]", "vmovups ymm13, [{v}+160]",
            "vmovups ymm14, [{v}+192]", "vmovups ymm15, [{v}+224]",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "vmovups [{o}], ymm8", "vmovups [{o}+32], ymm9", "vmovups [{o}+64], ymm10",
            "vmovups [{o}+96], ymm11", "vmovups [{o}+128], ymm12", "vmovups [{o}+160], ymm13",
            "vmovups [{o}+192], ymm14", "vmovups [{o}+224], ymm15",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
}

fn avx_loop(l: &Loop) {
    // SAFETY: started only where the processor has AVX.
    unsafe { avx_inner(l) }
}

#[target_feature(enable = "avx512f")]
fn avx512_inner(l: &Loop) {
    let values: [u64; 32] = std::array::from_fn(|i| 0x5555_6666_7777_8800 + i as u64);
    // SAFETY: as in `sse_loop`; a mask register on top.
    unsafe {
        asm!(
            "vmovups zmm16, [{v}]", "vmovups zmm17, [{v}+64]", "vmovups zmm30, [{v}+128]",
            "vmovups zmm31, [{v}+192]", "mov {t:e}, 0xa55a", "kmovw k3, {t:e}",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "vmovups [{o}], zmm16", "vmovups [{o}+64], zmm17", "vmovups [{o}+128], zmm30",
            "vmovups [{o}+192], zmm31", "kmovw {t:e}, k3", "mov [{o}+256], {t}",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            t = out(reg) _,
            out("zmm16") _, out("zmm17") _, out("zmm30") _, out("zmm31") _, out("k3") _,
        );
    }
}

fn avx512_loop(l: &Loop) {
    // SAFETY: started only where the processor has AVX-512.
    unsafe { avx512_inner(l) }
}

/// Three numbers on the x87 stack, and control words that are not the usual.
fn x87_loop(l: &Loop) {
    let (control, mxcsr) = (0x0f7f_u16, 0x5f80_u32);
    let (usual_control, usual_mxcsr) = (0x037f_u16, 0x1f80_u32);
    // SAFETY: leaves the x87 stack empty and the control words as usual.
    unsafe {
        asm!(
            "fldcw word ptr [{c}]", "ldmxcsr dword ptr [{m}]",
            "fldpi", "fldl2e", "fldl2t",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "fstp tbyte ptr [{o}]", "fstp tbyte ptr [{o}+16]", "fstp tbyte ptr [{o}+32]",
            "fnstcw word ptr [{o}+48]", "stmxcsr dword ptr [{o}+56]",
            "fldcw word ptr [{uc}]", "ldmxcsr dword ptr [{um}]",
            c = in(reg) &control, m = in(reg) &mxcsr,
            uc = in(reg) &usual_control, um = in(reg) &usual_mxcsr,
            l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _,
            out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

fn registers(_: &Stage) -> Result<Check> {
    type Body = (&'static str, fn(&Loop));
    let mut bodies: Vec<Body> = vec![("SSE", sse_loop), ("x87", x87_loop)];
    if std::is_x86_feature_detected!("avx") {
        bodies.push(("AVX", avx_loop));
    }
    if std::is_x86_feature_detected!("avx512f") {
        bodies.push(("AVX-512", avx512_loop));
    }
    // What a loop gives that is not disturbed.
    let mut expected = Vec::new();
    for (name, body) in &bodies {
        let (l, join) = running(*body);
        l.stop.store(1, Ordering::SeqCst);
        ensure!(join.join().is_ok(), "{name}");
        expected.push(l.out());
    }
    let start = move |bodies: &[Body]| bodies.iter().map(|b| running(b.1)).collect::<Vec<_>>();
    let mut loops = start(&bodies);
    Ok(Box::new(move |f| {
        for (((l, join), want), (name, _)) in loops.drain(..).zip(&expected).zip(&bodies) {
            l.stop.store(1, Ordering::SeqCst);
            f.that(format!("{name}: the thread ended"), join.join().is_ok());
            f.same(&format!("{name} registers"), want, &l.out());
        }
        loops = start(&bodies);
        Ok(())
    }))
}

fn general_loop(l: &Loop) {
    // SAFETY: counts in `turns`, writes 8 words and the flags to `out`; the
    // direction flag is clear again at the end.
    unsafe {
        asm!(
            "mov r8, 0x1001", "mov r9, 0x1002", "mov r10, 0x1003", "mov r11, 0x1004",
            "mov r12, 0x1005", "mov r13, 0x1006", "mov r14, 0x1007", "mov r15, -8",
            "std",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "mov [{o}], r8", "mov [{o}+8], r9", "mov [{o}+16], r10", "mov [{o}+24], r11",
            "mov [{o}+32], r12", "mov [{o}+40], r13", "mov [{o}+48], r14", "mov [{o}+56], r15",
            "pushfq", "pop r8", "and r8, 0x400", "mov [{o}+64], r8", "cld",
            l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}

fn spinning(_: &Stage) -> Result<Check> {
    let mut want: Vec<u64> = (0x1001..0x1008).collect();
    want.extend([(-8_i64) as u64, 0x400]);
    let mut current = Some(running(general_loop));
    Ok(Box::new(move |f| {
        let (l, join) = current.take().context("a loop")?;
        let turns = l.turns.load(Ordering::SeqCst);
        sys::await_word(&l.turns, turns + 1);
        l.stop.store(1, Ordering::SeqCst);
        f.that("the thread ended", join.join().is_ok());
        f.same("registers", &want[..], &l.out()[..9]);
        current = Some(running(general_loop));
        Ok(())
    }))
}

/// A thread that repeats a blocking call and tells its results.
struct Blocked<T> {
    tid: i32,
    number: i64,
    results: mpsc::Receiver<T>,
}

impl<T: Send + 'static> Blocked<T> {
    fn start(number: i64, mut call: impl FnMut() -> T + Send + 'static) -> Result<Self> {
        let (said, tid) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        thread::spawn(move || {
            let _ = said.send(sys::gettid());
            while sender.send(call()).is_ok() {}
        });
        let blocked = Self {
            tid: tid.recv()?,
            number,
            results,
        };
        blocked.await_blocked();
        Ok(blocked)
    }

    fn await_blocked(&self) {
        await_that(&|| in_call(self.tid, self.number));
    }
}

fn blocked_read(_: &Stage) -> Result<Check> {
    let (mut reader, mut writer) = std::io::pipe()?;
    let thread = Blocked::start(libc::SYS_read, move || {
        let mut b = [0; 16];
        // Not `read_exact`, which would try again when interrupted.
        reader
            .read(&mut b)
            .map(|n| b[..n].to_vec())
            .map_err(|e| e.to_string())
    })?;
    Ok(Box::new(move |f| {
        thread.await_blocked();
        f.that("no result yet", thread.results.try_recv().is_err());
        writer.write_all(b"hello")?;
        f.same(
            "what was read",
            &Ok(b"hello".to_vec()),
            &thread.results.recv()?,
        );
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_poll(_: &Stage) -> Result<Check> {
    let event = Arc::new(EventFd::from_value(0)?);
    let theirs = event.clone();
    let forever = Blocked::start(libc::SYS_poll, move || {
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&*theirs),
            PollFlags::POLLIN,
        )];
        let result = poll(&mut fds, PollTimeout::NONE);
        let _ = theirs.read();
        result
    })?;
    let limited_event = Arc::new(EventFd::from_value(0)?);
    let theirs = limited_event.clone();
    let limited = Blocked::start(libc::SYS_poll, move || {
        let mut fds = [PollFd::new(
            std::os::fd::AsFd::as_fd(&*theirs),
            PollFlags::POLLIN,
        )];
        let result = poll(&mut fds, PollTimeout::try_from(600_000_u32).expect("fits"));
        let _ = theirs.read();
        result
    })?;
    Ok(Box::new(move |f| {
        for (name, thread, event) in [
            ("", &forever, &event),
            (" with limit", &limited, &limited_event),
        ] {
            thread.await_blocked();
            f.that(
                format!("no result of poll{name}"),
                thread.results.try_recv().is_err(),
            );
            event.write(1)?;
            f.same(&format!("poll{name}"), &Ok(1), &thread.results.recv()?);
            thread.await_blocked();
        }
        Ok(())
    }))
}

fn blocked_epoll(_: &Stage) -> Result<Check> {
    let event = Arc::new(EventFd::from_value(0)?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(
        &*event,
        EpollEvent::new(EpollFlags::EPOLLIN, 0x1234_5678_9abc),
    )?;
    let theirs = event.clone();
    let thread = Blocked::start(libc::SYS_epoll_wait, move || {
        loop {
            let mut out = [EpollEvent::empty(); 4];
            match epoll.wait(&mut out, EpollTimeout::NONE) {
                // A stop ends this call on any kernel (signal(7)).
                Err(Errno::EINTR) => continue,
                result => {
                    let _ = theirs.read();
                    return result.map(|n| out[..n].iter().map(|e| e.data()).collect::<Vec<_>>());
                }
            }
        }
    })?;
    Ok(Box::new(move |f| {
        f.that("no result yet", thread.results.try_recv().is_err());
        event.write(1)?;
        f.same(
            "events",
            &Ok(vec![0x1234_5678_9abc_u64]),
            &thread.results.recv()?,
        );
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_accept(stage: &Stage) -> Result<Check> {
    let path = stage.path("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    let thread = Blocked::start(libc::SYS_accept4, move || {
        let accepted = listener.accept();
        accepted
            .map(|(s, _)| s.as_raw_fd() >= 0)
            .map_err(|e| e.to_string())
    })?;
    Ok(Box::new(move |f| {
        thread.await_blocked();
        f.that("no result yet", thread.results.try_recv().is_err());
        let _client = std::os::unix::net::UnixStream::connect(&path)?;
        f.same("accept", &Ok(true), &thread.results.recv()?);
        thread.await_blocked();
        Ok(())
    }))
}

fn blocked_wait(_: &Stage) -> Result<Check> {
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};
    fn sleeper() -> Result<Pid> {
        // SAFETY: the child only pauses.
        match unsafe { fork() }? {
            ForkResult::Child => loop {
                nix::unistd::pause();
            },
            ForkResult::Parent { child } => Ok(child),
        }
    }
    let ended = Arc::new(AtomicBool::new(false));
    let watch =
        move |pid: Pid, ended: Arc<AtomicBool>| -> Result<Blocked<nix::Result<WaitStatus>>> {
            ended.store(false, Ordering::SeqCst);
            Blocked::start(libc::SYS_wait4, move || {
                let status = waitpid(pid, None);
                ended.store(true, Ordering::SeqCst);
                // One result is enough.
                while ended.load(Ordering::SeqCst) && status.is_err() {
                    thread::sleep(Duration::from_secs(1));
                }
                status
            })
        };
    let mut child = sleeper()?;
    let mut thread = watch(child, ended.clone())?;
    Ok(Box::new(move |f| {
        let calls = fs::read_to_string(format!("/proc/{child}/syscall"))?;
        f.same(
            "the child is in pause",
            "34",
            calls.split(' ').next().unwrap_or_default(),
        );
        thread.await_blocked();
        kill(child, Signal::SIGTERM)?;
        let want = Ok(WaitStatus::Signaled(child, Signal::SIGTERM, false));
        f.same("wait", &want, &thread.results.recv()?);
        child = sleeper()?;
        thread = watch(child, ended.clone())?;
        Ok(())
    }))
}
