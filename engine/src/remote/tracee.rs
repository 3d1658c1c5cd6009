//! A stopped task that runs programs for us.

use crate::arch::{self, ENTRY_BYTES, Entry, INTERPRETER, STOP_ON_ERROR, SYSCALL_INSN};
use crate::sys::process::{Span, read_memory, tkill, write_memory};
use crate::sys::ptrace::{self, RawSiginfo, Stop};
use crate::sys::{SysError, SysResult};

use super::program::{Arg, OnError, Op, OpId, Outcome, Program};

/// Bytes at the start of an arena that hold the interpreter.
pub(super) const CODE_BYTES: u64 = 4096;
/// The last eight of them: the arena's length.
pub(super) const ARENA_LEN_AT: usize = CODE_BYTES as usize - 8;

/// Why a remote program did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A call in the program failed.
    #[error("task {tid}: {what}: {errno}")]
    Call {
        /// The task that ran it.
        tid: i32,
        /// What the call was for.
        what: String,
        /// The kernel's answer.
        errno: nix::errno::Errno,
    },
    /// The task stopped where it should not have.
    #[error("task {tid}: stopped at {ip:#x} by {stop:?} while running a remote program")]
    Strayed {
        /// The task.
        tid: i32,
        /// Its instruction pointer.
        ip: u64,
        /// What stopped it.
        stop: Stop,
    },
    /// The task is gone.
    #[error("task {tid} ended while running a remote program (wait status {status:#x})")]
    Gone {
        /// The task.
        tid: i32,
        /// As wait(2) gives it.
        status: i32,
    },
    /// The program's data does not fit.
    #[error("task {tid}: a program with {need} bytes of data does not fit an arena of {have}")]
    TooLarge {
        /// The task.
        tid: i32,
        /// Bytes needed.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// No `syscall` instruction was found to start from.
    #[error("task {tid} has no vDSO, so there is nothing to make its first call with")]
    NoVdso {
        /// The task.
        tid: i32,
    },
    /// The vDSO leaves no room for a thread's way back.
    #[error("task {tid}: no room at the end of its vDSO's text")]
    VdsoFull {
        /// The task.
        tid: i32,
    },
    /// ptrace or memory access failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

type Result<T> = std::result::Result<T, RemoteError>;

/// A piece of a target's address space that is ours for a while: one page of
/// code, the rest for tables and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arena {
    /// Where it starts.
    pub base: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Arena {
    /// The address after its last byte.
    pub fn end(&self) -> u64 {
        self.base + self.len
    }

    /// A `syscall` instruction in it.
    pub fn syscall_insn(&self) -> u64 {
        self.base + INTERPRETER.done_offset() - SYSCALL_INSN.len() as u64
    }

    /// Memory of it that the next program overwrites.
    pub fn scratch(&self) -> u64 {
        self.base + CODE_BYTES
    }
}

/// A task in ptrace-stop.
#[derive(Debug, Clone, Copy)]
pub struct Tracee {
    /// Thread id.
    pub tid: i32,
}

/// Tasks that were born while a program ran, attached and stopped like their
/// parent, in the order of their births.
pub type Births = Vec<i32>;

impl Tracee {
    /// Runs one call with a `syscall` instruction that lies at `insn`.
    ///
    /// For the first and last calls of all, when no arena is there. The task's
    /// registers are left as the call left them.
    pub fn call_at(&self, insn: u64, what: &str, nr: i64, args: [u64; 6]) -> Result<i64> {
        let regs = ptrace::get_regs(self.tid)?;
        ptrace::set_regs(self.tid, &arch::set_call(&regs, insn, nr, args))?;
        self.finish_call(what)
    }

    /// Has the task go on at `ip`, up to the end of the first call it makes.
    pub fn next_call(&self, ip: u64, what: &str) -> Result<i64> {
        let regs = ptrace::get_regs(self.tid)?;
        ptrace::set_regs(self.tid, &arch::point_at(&regs, ip, 0, 0))?;
        self.finish_call(what)
    }

    /// To a call's entry, then to its exit. Not by single steps: were we killed
    /// after one, the kernel would leave the trap flag set, and the task would
    /// die of it.
    fn finish_call(&self, what: &str) -> Result<i64> {
        let mut halt = Halt::default();
        self.reach_call(&mut halt)?;
        self.reach_call(&mut halt)?;
        drop(halt);
        let rax = ptrace::get_regs(self.tid)?.rax as i64;
        if (-4095..0).contains(&rax) {
            return Err(self.failed(what, rax));
        }
        Ok(rax)
    }

    /// To the next entry or exit of a system call, whatever is sent meanwhile.
    pub(crate) fn reach_call(&self, halt: &mut Halt) -> Result<()> {
        let tid = self.tid;
        let mut signal = 0;
        loop {
            ptrace::to_syscall(tid, signal)?;
            signal = 0;
            match ptrace::wait(tid)? {
                Stop::Signal(libc::SIGTRAP) => return Ok(()),
                Stop::Signal(s) => signal = self.put_off(s, arch::REMOTE_SIGMASK, halt)?,
                // Woken by SIGCONT.
                Stop::Stopped(_) => {}
                Stop::Gone(status) => return Err(RemoteError::Gone { tid, status }),
                stop @ Stop::Event(_) => return Err(self.strayed(stop)),
            }
        }
    }

    /// Somebody else's signal has stopped the task: it waits until the task is
    /// let go. Gives what to go on with: delivered while `mask` blocks it, a
    /// signal is queued again as it was (ptrace_signal in the kernel).
    fn put_off(&self, signal: i32, mask: u64, halt: &mut Halt) -> Result<i32> {
        if signal == libc::SIGSTOP {
            // Nothing can block it.
            halt.note(self.tid);
            return Ok(0);
        }
        if is_fault(&ptrace::signal_info(self.tid)?) {
            return Err(self.strayed(Stop::Signal(signal)));
        }
        ptrace::set_sigmask(self.tid, mask)?;
        Ok(signal)
    }

    fn failed(&self, what: &str, result: i64) -> RemoteError {
        let errno = nix::errno::Errno::from_raw(-result as i32);
        RemoteError::Call {
            tid: self.tid,
            what: what.to_owned(),
            errno,
        }
    }

    fn strayed(&self, stop: Stop) -> RemoteError {
        let ip = ptrace::get_regs(self.tid).map_or(0, |r| r.rip);
        RemoteError::Strayed {
            tid: self.tid,
            ip,
            stop,
        }
    }

    /// Maps an arena at `at` (or where the kernel likes, for `None`).
    pub fn map_arena(&self, insn: u64, at: Option<u64>, len: u64) -> Result<Arena> {
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        if at.is_some() {
            flags |= libc::MAP_FIXED_NOREPLACE;
        }
        let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let args = [at.unwrap_or(0), len, rw, flags as u64, u64::MAX, 0];
        let base = self.call_at(insn, "mmap of our arena", libc::SYS_mmap, args)? as u64;
        let arena = Arena { base, len };
        self.furnish_arena(insn, arena)?;
        Ok(arena)
    }

    /// Puts our code into a mapping that is to be an arena.
    pub fn furnish_arena(&self, insn: u64, arena: Arena) -> Result<()> {
        let base = arena.base;
        // Executable from the start and never writable: a process may have
        // forbidden itself to gain executable memory (PR_SET_MDWE).
        let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let args = [base, CODE_BYTES, rx, flags as u64, u64::MAX, 0];
        self.call_at(insn, "mmap of our code", libc::SYS_mmap, args)?;
        let mut page = INTERPRETER.code().to_vec();
        page.resize(ARENA_LEN_AT, 0);
        page.extend_from_slice(&arena.len.to_le_bytes());
        Ok(poke(self.tid, base, &page)?)
    }

    /// Unmaps an arena with the `syscall` instruction at `insn`.
    pub fn unmap_arena(&self, insn: u64, arena: Arena) -> Result<()> {
        let args = [arena.base, arena.len, 0, 0, 0, 0];
        self.call_at(insn, "munmap of our arena", libc::SYS_munmap, args)
            .map(drop)
    }

    /// Runs a program to its end.
    ///
    /// Were we killed meanwhile, the task would die behind it.
    pub fn run(&self, arena: Arena, program: &Program) -> Result<Outcome> {
        self.run_homeward(arena, program, 0)
    }

    /// The same for a task that, once it is let go, goes on at `home`.
    pub fn run_homeward(&self, arena: Arena, program: &Program, home: u64) -> Result<Outcome> {
        let (outcome, births) = self.execute(arena, program, home)?;
        debug_assert!(births.is_empty());
        Ok(outcome)
    }

    /// Runs a program; tasks it creates are attached and left stopped.
    pub fn run_with_births(&self, arena: Arena, program: &Program) -> Result<(Outcome, Births)> {
        self.execute(arena, program, 0)
    }

    /// A program longer than the arena is run in pieces.
    fn execute(&self, arena: Arena, program: &Program, home: u64) -> Result<(Outcome, Births)> {
        let mut births = Vec::new();
        let data_at = arena.base + CODE_BYTES;
        let data_len = program.data.len().next_multiple_of(8) as u64;
        let table_at = data_at + data_len;
        let room = arena.end().saturating_sub(table_at) as usize / ENTRY_BYTES;
        if room < 2 {
            let have = (arena.len - CODE_BYTES) as usize;
            return Err(RemoteError::TooLarge {
                tid: self.tid,
                need: program.data.len(),
                have,
            });
        }
        let mut data = data_of(program, data_at);
        let regs = ptrace::get_regs(self.tid)?;
        let mut results: Vec<i64> = Vec::with_capacity(program.ops.len());
        if program.ops.is_empty() {
            let outcome = Outcome {
                results,
                data: program.data.clone(),
            };
            return Ok((outcome, births));
        }
        for chunk in program.ops.chunks(room - 1) {
            let first = results.len();
            let mut table = table_of(chunk, first, &results, data_at, table_at);
            // The data lies in front of the table: both go with one call, there
            // with the first table, back with the last.
            let (is_first, is_last) = (first == 0, first + chunk.len() == program.ops.len());
            let whole = |with_data: bool, table: &[u8], data: &[u8]| match with_data {
                true => (data_at, [data, table].concat()),
                false => (table_at, table.to_vec()),
            };
            let (start, bytes) = whole(is_first, &table, &data);
            let len = bytes.len();
            write_memory(self.tid, &[Span { start, len }], &bytes)?;
            ptrace::set_regs(self.tid, &arch::point_at(&regs, arena.base, table_at, home))?;
            self.go(arena, &mut births)?;

            let stopped_at = (ptrace::get_regs(self.tid)?.r12 - table_at) as usize / ENTRY_BYTES;
            let (start, mut bytes) = whole(is_last, &table, &data);
            let len = bytes.len();
            read_memory(self.tid, &[Span { start, len }], &mut bytes)?;
            let (got, entries) = bytes.split_at(len - table.len());
            if is_last {
                data.copy_from_slice(got);
            }
            table.copy_from_slice(entries);
            results.extend(results_in(&table).take(chunk.len().min(stopped_at + 1)));
            if stopped_at < chunk.len() {
                let op = &chunk[stopped_at];
                return Err(self.failed(&op.what, results[first + stopped_at]));
            }
        }
        data.truncate(program.data.len());
        Ok((Outcome { results, data }, births))
    }

    /// Lets the task run until the interpreter says it is done, or, while the
    /// signal by which it does is somebody else's, until its calls show it.
    fn go(&self, arena: Arena, births: &mut Births) -> Result<()> {
        let tid = self.tid;
        let mut listening = !self.is_pending(arch::DONE_SIGNAL)?;
        if listening {
            ptrace::set_sigmask(tid, arch::LISTENING_SIGMASK)?;
        }
        let mut halt = Halt::default();
        let (mut signal, mut entered) = (0, false);
        loop {
            match listening {
                true => ptrace::cont(tid, signal)?,
                false => ptrace::to_syscall(tid, signal)?,
            }
            signal = 0;
            match ptrace::wait(tid)? {
                Stop::Signal(arch::DONE_SIGNAL) if listening => {
                    ptrace::set_sigmask(tid, arch::REMOTE_SIGMASK)?;
                    if is_ours(&ptrace::signal_info(tid)?) {
                        break;
                    }
                    // Delivered while it is blocked, it is queued again as it
                    // was (ptrace_signal in the kernel). Ours may have been
                    // dropped for it, as one of a kind is enough; and behind the
                    // call that shows the end it would not be seen any more.
                    (listening, signal) = (false, arch::DONE_SIGNAL);
                    let mut regs = ptrace::get_regs(tid)?;
                    let ended = arena.base + INTERPRETER.ended_offset();
                    let done = arena.base + INTERPRETER.done_offset();
                    if (ended..=done).contains(&regs.rip) {
                        regs.rip = arena.base + INTERPRETER.last_offset();
                        ptrace::set_regs(tid, &regs)?;
                    }
                }
                Stop::Signal(libc::SIGTRAP) if !listening => {
                    let ended = arena.base + INTERPRETER.ended_offset();
                    let there = ptrace::get_regs(tid)?.rip == ended;
                    // At the call's entry it would still be ahead.
                    if there && std::mem::replace(&mut entered, there) {
                        break;
                    }
                }
                Stop::Signal(s) => {
                    let mask = match listening {
                        true => arch::LISTENING_SIGMASK,
                        false => arch::REMOTE_SIGMASK,
                    };
                    signal = self.put_off(s, mask, &mut halt)?;
                }
                // Woken by SIGCONT.
                Stop::Stopped(_) => {}
                Stop::Event(
                    libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ) => {
                    let child = ptrace::event_message(tid)? as i32;
                    // Attached by the kernel; it reports its first stop to us.
                    match ptrace::wait(child)? {
                        Stop::Stopped(_) | Stop::Signal(_) => births.push(child),
                        stop => return Err(Tracee { tid: child }.strayed(stop)),
                    }
                }
                Stop::Gone(status) => return Err(RemoteError::Gone { tid, status }),
                stop => return Err(self.strayed(stop)),
            }
        }
        Ok(())
    }

    /// Whether a signal waits to be taken by the task.
    fn is_pending(&self, signal: i32) -> SysResult<bool> {
        for shared in [false, true] {
            let queue = ptrace::peek_signals(self.tid, shared)?;
            if queue.iter().any(|s| word(s, 0) == signal) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A task was told to stop while it worked for us; nothing can block that. It
/// is told again when this is dropped, and stops when it is let go.
#[derive(Debug, Default)]
pub(crate) struct Halt(Option<i32>);

impl Halt {
    pub(crate) fn note(&mut self, tid: i32) {
        self.0 = Some(tid);
    }
}

impl Drop for Halt {
    fn drop(&mut self) {
        if let Some(tid) = self.0
            && let Err(e) = tkill(tid, libc::SIGSTOP)
        {
            tracing::warn!(tid, "was to be stopped: {e}");
        }
    }
}

fn word(info: &RawSiginfo, at: usize) -> i32 {
    i32::from_ne_bytes(info[at..at + 4].try_into().expect("4 bytes"))
}

/// Whether a signal comes from the interpreter.
fn is_ours(info: &RawSiginfo) -> bool {
    word(info, 8) == arch::DONE_CODE && word(info, 16) == arch::DONE_SENDER
}

/// Whether a signal comes from what the task itself has done.
fn is_fault(info: &RawSiginfo) -> bool {
    const FAULTS: [i32; 6] = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
    ];
    // What others send has a code that is not above zero (sigaction(2)).
    FAULTS.contains(&word(info, 0)) && word(info, 8) > 0
}

/// The program's data with addresses for pointers, its length a multiple of 8.
fn data_of(program: &Program, data_at: u64) -> Vec<u8> {
    let mut data = program.data.clone();
    for &(at, target) in &program.pointers {
        let address = data_at + target as u64;
        data[at..at + 8].copy_from_slice(&address.to_le_bytes());
    }
    data.resize(data.len().next_multiple_of(8), 0);
    data
}

/// The table for calls of a program, the first of which is its `first`;
/// `results` are those of the calls before.
fn table_of(ops: &[Op], first: usize, results: &[i64], data_at: u64, table_at: u64) -> Vec<u8> {
    let mut table = Vec::with_capacity((ops.len() + 1) * ENTRY_BYTES);
    for op in ops {
        let mut entry = Entry {
            nr: op.nr,
            args: [0; 6],
            control: 0,
            result: 0,
        };
        for (i, arg) in op.args.iter().enumerate() {
            entry.args[i] = match *arg {
                Arg::Imm(v) => v,
                Arg::Data(d) => data_at + d.offset as u64,
                Arg::Result(OpId(n)) if n < first => results[n] as u64,
                Arg::Result(OpId(n)) => {
                    entry.control |= 1 << i;
                    table_at + ((n - first) * ENTRY_BYTES + Entry::RESULT_OFFSET) as u64
                }
            };
        }
        if op.on_error == OnError::Stop {
            entry.control |= STOP_ON_ERROR;
        }
        table.extend_from_slice(&entry.to_bytes());
    }
    table.extend_from_slice(&Entry::END.to_bytes());
    table
}

fn results_in(table: &[u8]) -> impl Iterator<Item = i64> + '_ {
    table.chunks_exact(ENTRY_BYTES).map(|entry| {
        let at = Entry::RESULT_OFFSET;
        i64::from_le_bytes(entry[at..at + 8].try_into().expect("8 bytes"))
    })
}

/// Writes into memory that is not writable for the task itself.
pub(super) fn poke(tid: i32, at: u64, bytes: &[u8]) -> SysResult<()> {
    use std::os::unix::fs::FileExt;
    let path = format!("/proc/{tid}/mem");
    let open = std::fs::OpenOptions::new().write(true).open(&path);
    open.and_then(|f| f.write_all_at(bytes, at)).map_err(|e| {
        let errno = nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        SysError::new("write", &path, errno)
    })
}

/// Finds a `syscall` instruction in the task's vDSO, whose range is given.
pub fn find_syscall(tid: i32, vdso: Option<(u64, u64)>) -> Result<u64> {
    let (start, end) = vdso.ok_or(RemoteError::NoVdso { tid })?;
    let mut text = vec![0; (end - start) as usize];
    read_vdso(tid, start, &mut text)?;
    text.windows(2)
        .position(|w| w == SYSCALL_INSN)
        .map(|at| start + at as u64)
        .ok_or(RemoteError::NoVdso { tid })
}

fn read_vdso(tid: i32, start: u64, text: &mut [u8]) -> SysResult<()> {
    read_memory(
        tid,
        &[Span {
            start,
            len: text.len(),
        }],
        text,
    )
}
