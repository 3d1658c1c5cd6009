//! Processes that share kernel objects with each other (clone(2)).

use std::fs;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getsid, setsid};

use crate::conformance::stage::POLL;
use crate::conformance::sys::{self, Map};
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "process/clone-files",
        "a child that shares the descriptor table (CLONE_FILES)",
        clone_files,
    ),
    Case::new(
        "process/clone-files-brothers",
        "brothers that share a descriptor table their parent does not have",
        clone_files_brothers,
    ),
    Case::new(
        "process/clone-fs",
        "a child that shares working directory and umask (CLONE_FS)",
        clone_fs,
    ),
    Case::new(
        "process/clone-vm",
        "a child that shares the address space (CLONE_VM)",
        clone_vm,
    ),
    Case::new(
        "process/clone-everything",
        "a child that shares memory, files, directory and handlers",
        clone_everything,
    ),
    Case::new(
        "process/exit-signals",
        "children that end with another signal than SIGCHLD, or none",
        exit_signals,
    ),
    Case::new(
        "process/before-setsid",
        "children from before their parent became a session leader",
        before_setsid,
    ),
    Case::new(
        "process/vfork",
        "a parent that waits in vfork(2) until its child runs a program",
        vfork,
    )
    .refused(),
    Case::new(
        "process/ptrace",
        "a process that traces another one of the tree",
        ptraced,
    )
    .refused(),
];

/// What a process that shares and its maker say to each other.
const ASK: usize = 0;
const DONE: usize = 1;
const VALUE: usize = 2;

/// A child made with `flags`, which does `work` whenever it is asked to.
fn serving(flags: i32, words: &'static Map, work: impl Fn(u64) -> u64) -> Result<Pid> {
    let flags = i64::from(flags | libc::SIGCHLD);
    match sys::numbers(libc::SYS_clone, &[flags, 0, 0, 0, 0])? {
        0 => loop {
            let round = words.word(DONE).load(Ordering::SeqCst);
            sys::await_word(words.word(ASK), round + 1);
            words.word(VALUE).store(work(round), Ordering::SeqCst);
            words.word(DONE).store(round + 1, Ordering::SeqCst);
        },
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

fn ask(words: &Map) -> u64 {
    let round = words.word(ASK).fetch_add(1, Ordering::SeqCst) + 1;
    sys::await_word(words.word(DONE), round);
    words.word(VALUE).load(Ordering::SeqCst)
}

/// Opens one more descriptor and tells its number.
fn open_one(_: u64) -> u64 {
    fs::File::open("/proc/self/stat").map_or(u64::MAX, |f| {
        use std::os::fd::IntoRawFd;
        f.into_raw_fd() as u64
    })
}

fn has_fd(pid: i32, fd: u64) -> bool {
    fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok()
}

/// Takes a descriptor that another process opened in the table we share.
fn close_theirs(fd: u64) -> Result<()> {
    sys::numbers(libc::SYS_close, &[fd as i64])?;
    Ok(())
}

fn clone_files(stage: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let file = fs::File::create(stage.path("kept"))?;
    let child = serving(libc::CLONE_FILES, words, open_one)?;
    Ok(Box::new(move |f| {
        let fd = ask(words);
        let me = std::process::id() as i32;
        f.that("the child's new descriptor is ours too", has_fd(me, fd));
        close_theirs(fd)?;
        f.that("and closed for both", !has_fd(child.as_raw(), fd));
        let kept = file.as_raw_fd() as u64;
        f.that("ours is the child's too", has_fd(child.as_raw(), kept));
        Ok(())
    }))
}

fn clone_files_brothers(_: &Stage) -> Result<Check> {
    let (one, two) = (Map::forever(4096)?, Map::forever(4096)?);
    // The first makes its brother: it shares its table, not ours.
    // SAFETY: one thread; the child serves until it is killed.
    let first = match unsafe { fork() }? {
        ForkResult::Child => {
            let brother = serving(libc::CLONE_FILES | libc::CLONE_PARENT, two, open_one)?;
            two.word(VALUE)
                .store(brother.as_raw() as u64, Ordering::SeqCst);
            loop {
                let round = one.word(DONE).load(Ordering::SeqCst);
                sys::await_word(one.word(ASK), round + 1);
                one.word(VALUE).store(open_one(round), Ordering::SeqCst);
                one.word(DONE).store(round + 1, Ordering::SeqCst);
            }
        }
        ForkResult::Parent { child } => child,
    };
    while two.word(VALUE).load(Ordering::SeqCst) == 0 {
        thread::sleep(POLL);
    }
    let second = two.word(VALUE).load(Ordering::SeqCst) as i32;
    Ok(Box::new(move |f| {
        let fd = ask(one);
        f.that("the brother has it too", has_fd(second, fd));
        let fd = ask(two);
        f.that("and the other way round", has_fd(first.as_raw(), fd));
        let me = std::process::id() as i32;
        f.that("it is not ours", !has_fd(me, fd));
        Ok(())
    }))
}

fn clone_fs(stage: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let dirs = [stage.path("even"), stage.path("odd")];
    for dir in &dirs {
        fs::create_dir(dir)?;
    }
    std::env::set_current_dir(&dirs[0])?;
    let theirs = dirs.clone();
    serving(libc::CLONE_FS, words, move |round| {
        let done = std::env::set_current_dir(&theirs[(round as usize + 1) % 2]);
        let mask = nix::sys::stat::Mode::from_bits_truncate(0o70 + round as u32 % 8);
        nix::sys::stat::umask(mask);
        u64::from(done.is_ok())
    })?;
    let mut round = 0;
    Ok(Box::new(move |f| {
        f.same("the child went", &1, &ask(words));
        round += 1;
        f.same(
            "and we with it",
            &dirs[round % 2],
            &std::env::current_dir()?,
        );
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        f.same("umask", &(0o70 + (round as u32 - 1) % 8), &mask.bits());
        Ok(())
    }))
}

/// What a child does that lives in our memory, thread-local storage included:
/// nothing but system calls and work on shared words.
extern "C" fn serve(words: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the caller passes memory of four counters that stays for good.
    let words = unsafe { std::slice::from_raw_parts(words.cast::<AtomicU64>(), 4) };
    loop {
        let round = words[DONE].load(Ordering::SeqCst);
        while words[ASK].load(Ordering::SeqCst) <= round {
            let nap = [0_i64, 2_000_000];
            let args = [nap.as_ptr() as u64, 0, 0, 0, 0, 0];
            // SAFETY: a timespec that outlives the call.
            let _ = unsafe { sys::call(libc::SYS_nanosleep, args) };
        }
        let private = words[3].load(Ordering::SeqCst) as *mut u64;
        // SAFETY: the address of a leaked private word, nobody else's now.
        let value = unsafe {
            *private += 1;
            *private
        };
        words[VALUE].store(value, Ordering::SeqCst);
        words[DONE].store(round + 1, Ordering::SeqCst);
    }
}

/// A child in our own address space, with a stack of its own.
fn in_our_memory(flags: i32, words: &'static Map) -> Result<Pid> {
    let private: &'static mut u64 = Box::leak(Box::new(7));
    words
        .word(3)
        .store(private as *mut u64 as u64, Ordering::SeqCst);
    let stack: &'static mut [u8] = Box::leak(vec![0_u8; 64 << 10].into_boxed_slice());
    let top = (stack.as_mut_ptr_range().end as usize & !63) as *mut libc::c_void;
    let at = words.addr() as *mut libc::c_void;
    // SAFETY: the stack and the words are never freed, and `serve` keeps to them.
    let pid = unsafe { libc::clone(serve, top, flags | libc::CLONE_VM | libc::SIGCHLD, at) };
    Ok(Pid::from_raw(nix::errno::Errno::result(pid)?))
}

fn clone_vm(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let child = in_our_memory(0, words)?;
    let mut counted = 7;
    Ok(Box::new(move |f| {
        counted += 1;
        f.same("its count", &counted, &ask(words));
        let private = words.word(3).load(Ordering::SeqCst) as *const u64;
        // SAFETY: leaked memory of ours.
        let here = unsafe { private.read_volatile() };
        f.same("the count in our memory", &counted, &here);
        let fd = fs::File::open("/")?;
        let theirs = has_fd(child.as_raw(), fd.as_raw_fd() as u64);
        f.that("the descriptors are not shared", !theirs);
        Ok(())
    }))
}

fn clone_everything(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let flags = libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND;
    let child = in_our_memory(flags, words)?;
    let handler = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    let mut signals = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH].into_iter();
    let mut counted = 7;
    Ok(Box::new(move |f| {
        counted += 1;
        f.same("its count", &counted, &ask(words));
        let fd = fs::File::open("/")?;
        let theirs = has_fd(child.as_raw(), fd.as_raw_fd() as u64);
        f.that("one table of descriptors", theirs);
        let signal = signals.next().expect("few rounds");
        // SAFETY: no handler runs.
        unsafe { sigaction(signal, &handler) }?;
        let status = fs::read_to_string(format!("/proc/{child}/status"))?;
        let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:\t"));
        let ignored = u64::from_str_radix(ignored.unwrap_or("0"), 16)?;
        let bit = 1 << (signal as i32 - 1);
        f.that("one table of handlers", ignored & bit != 0);
        Ok(())
    }))
}

fn exit_signals(_: &Stage) -> Result<Check> {
    let start = || -> Result<Vec<(i32, i32)>> {
        let mut children = Vec::new();
        for signal in [0, libc::SIGURG, libc::SIGCHLD] {
            match sys::numbers(libc::SYS_clone, &[signal.into(), 0, 0, 0, 0])? {
                0 => loop {
                    nix::unistd::pause();
                },
                pid => children.push((pid as i32, signal)),
            }
        }
        Ok(children)
    };
    let mut children = start()?;
    Ok(Box::new(move |f| {
        for &(pid, signal) in &children {
            let stat = rcr_engine::Process::read(pid)?;
            let is = stat.map(|s| s.exit_signal);
            f.same("exit signal", &Some(signal), &is);
            let pid = Pid::from_raw(pid);
            kill(pid, Signal::SIGKILL)?;
            let status = waitpid(pid, Some(WaitPidFlag::__WALL))?;
            let want = WaitStatus::Signaled(pid, Signal::SIGKILL, false);
            f.same("its end", &want, &status);
        }
        children = start()?;
        Ok(())
    }))
}

fn before_setsid(_: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let session = getsid(None)?;
    let note = |at: usize| {
        words
            .word(at)
            .store(std::process::id().into(), Ordering::SeqCst)
    };
    let rest = || loop {
        nix::unistd::pause();
    };
    // SAFETY: one thread; the children only pause.
    let parent = match unsafe { fork() }? {
        ForkResult::Child => {
            // SAFETY: as above.
            if let ForkResult::Child = unsafe { fork() }? {
                note(1);
                // Leads a session, with a child from before.
                // SAFETY: as above.
                if let ForkResult::Child = unsafe { fork() }? {
                    note(2);
                    rest();
                }
                sys::await_word(words.word(2), 1);
                setsid()?;
                note(3);
                rest();
            }
            sys::await_word(words.word(3), 1);
            setsid()?;
            // SAFETY: as above.
            if let ForkResult::Child = unsafe { fork() }? {
                note(4);
                rest();
            }
            rest()
        }
        ForkResult::Parent { child } => child,
    };
    sys::await_word(words.word(4), 1);
    let pid = |at: usize| Pid::from_raw(words.word(at).load(Ordering::SeqCst) as i32);
    let want = [
        (parent, parent),
        (pid(1), pid(1)),
        (pid(2), session),
        (pid(4), parent),
    ];
    for (pid, sid) in want {
        ensure!(getsid(Some(pid))? == sid, "session of {pid}");
    }
    Ok(Box::new(move |f| {
        for (pid, sid) in want {
            f.same("session", &sid, &getsid(Some(pid))?);
        }
        Ok(())
    }))
}

/// Ends when the first of the words is set.
extern "C" fn wait_and_end(words: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the caller passes a counter that stays for good.
    let word = unsafe { &*words.cast::<AtomicU64>() };
    while word.load(Ordering::SeqCst) == 0 {
        let nap = [0_i64, 2_000_000];
        let args = [nap.as_ptr() as u64, 0, 0, 0, 0, 0];
        // SAFETY: a timespec that outlives the call.
        let _ = unsafe { sys::call(libc::SYS_nanosleep, args) };
    }
    5
}

fn vfork(stage: &Stage) -> Result<Check> {
    let words = Map::forever(4096)?;
    let parent = thread::spawn(move || {
        let stack: &'static mut [u8] = Box::leak(vec![0_u8; 64 << 10].into_boxed_slice());
        let top = (stack.as_mut_ptr_range().end as usize & !63) as *mut libc::c_void;
        let at = words.addr() as *mut libc::c_void;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the stack and the words are never freed.
        unsafe { libc::clone(wait_and_end, top, flags, at) }
    });
    let me = std::process::id();
    let child = || -> Result<Option<i32>> {
        for entry in fs::read_dir("/proc/self/task")? {
            let tid = entry?.file_name().to_string_lossy().into_owned();
            let text = fs::read_to_string(format!("/proc/{me}/task/{tid}/children"))?;
            if let Some(word) = text.split_ascii_whitespace().next() {
                return Ok(Some(word.parse()?));
            }
        }
        Ok(None)
    };
    let child = loop {
        if let Some(pid) = child()? {
            break pid;
        }
        thread::sleep(POLL);
    };
    stage.expect_refusal(&[format!("waits until its child {child} runs a program")])?;
    let mut parent = Some(parent);
    Ok(Box::new(move |f| {
        words.word(0).store(1, Ordering::SeqCst);
        let made = parent.take().expect("one round").join();
        f.same("what vfork gave", &Some(child), &made.ok());
        let pid = Pid::from_raw(child);
        f.same("its end", &WaitStatus::Exited(pid, 5), &waitpid(pid, None)?);
        Ok(())
    }))
}

fn ptraced(stage: &Stage) -> Result<Check> {
    use nix::sys::ptrace;
    // SAFETY: one thread; the child only pauses.
    let child = match unsafe { fork() }? {
        ForkResult::Child => loop {
            nix::unistd::pause();
        },
        ForkResult::Parent { child } => child,
    };
    ptrace::seize(child, ptrace::Options::empty())?;
    let me = std::process::id();
    stage.expect_refusal(&[format!("pid {child}"), format!("is traced by process {me}")])?;
    Ok(Box::new(move |f| {
        ptrace::interrupt(child)?;
        let want = WaitStatus::PtraceEvent(child, Signal::SIGTRAP, libc::PTRACE_EVENT_STOP);
        f.same("its stop", &want, &waitpid(child, None)?);
        ptrace::detach(child, None)?;
        Ok(())
    }))
}
