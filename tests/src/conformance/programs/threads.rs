//! Threads: ids, what waits in the kernel, registers, rseq, robust locks.

use std::arch::asm;
use std::fs;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};

use super::blocked::{await_that, in_call};
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
