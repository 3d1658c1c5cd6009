//! The only code of ours that ever runs inside a target.
//!
//! It walks a table of [`Entry`]s with `r12`, calls the kernel for each, and
//! ends after the last entry, or at the first one that failed and was not
//! allowed to. Then it sends itself [`DONE_SIGNAL`], asking for its own ids
//! first, which are others in a PID namespace: its tracer sees that and
//! takes it from there. Should the tracer be gone, the signal is ignored, as it
//! is by default, and `r14` leads to where it came from (`way_back`). It uses no
//! stack and no memory but these.
//!
//! The signal carries [`DONE_CODE`] and [`DONE_SENDER`], as nobody else's does.
//! Where it cannot be had, since it is pending already, the tracer stops at
//! every call and knows the end by the first one behind it.

use std::arch::global_asm;

global_asm!(
    ".pushsection .rodata",
    ".global rcr_interpreter_start",
    ".global rcr_interpreter_last",
    ".global rcr_interpreter_ended",
    ".global rcr_interpreter_done",
    ".global rcr_interpreter_end",
    ".p2align 4",
    "rcr_interpreter_start:",
    "2:",
    "mov rax, [r12]",
    "cmp rax, -1",
    "je 9f",
    "mov r13, [r12 + 56]",
    "mov rdi, [r12 + 8]",
    "test r13b, 1",
    "jz 3f",
    "mov rdi, [rdi]",
    "3:",
    "mov rsi, [r12 + 16]",
    "test r13b, 2",
    "jz 3f",
    "mov rsi, [rsi]",
    "3:",
    "mov rdx, [r12 + 24]",
    "test r13b, 4",
    "jz 3f",
    "mov rdx, [rdx]",
    "3:",
    "mov r10, [r12 + 32]",
    "test r13b, 8",
    "jz 3f",
    "mov r10, [r10]",
    "3:",
    "mov r8, [r12 + 40]",
    "test r13b, 16",
    "jz 3f",
    "mov r8, [r8]",
    "3:",
    "mov r9, [r12 + 48]",
    "test r13b, 32",
    "jz 3f",
    "mov r9, [r9]",
    "3:",
    "syscall",
    "mov [r12 + 64], rax",
    "bt r13, 8",
    "jnc 4f",
    "cmp rax, -4096",
    "ja 9f",
    "4:",
    "add r12, 80",
    "jmp 2b",
    "9:",
    "rcr_interpreter_last:",
    "mov eax, {getpid}",
    "syscall",
    "rcr_interpreter_ended:",
    "mov r13d, eax",
    "mov eax, {gettid}",
    "syscall",
    "mov edi, r13d",
    "mov esi, eax",
    "mov edx, {done}",
    "lea r10, [rip + 8f]",
    "mov eax, {send}",
    "syscall",
    "rcr_interpreter_done:",
    "jmp r14",
    ".p2align 3",
    // siginfo_t: number, errno, code, padding, sender.
    "8:",
    ".long {done}, 0, {code}, 0, {sender}",
    ".zero 108",
    "rcr_interpreter_end:",
    ".popsection",
    getpid = const libc::SYS_getpid,
    gettid = const libc::SYS_gettid,
    send = const libc::SYS_rt_tgsigqueueinfo,
    done = const DONE_SIGNAL,
    code = const DONE_CODE,
    sender = const DONE_SENDER,
);

unsafe extern "C" {
    static rcr_interpreter_start: u8;
    static rcr_interpreter_last: u8;
    static rcr_interpreter_ended: u8;
    static rcr_interpreter_done: u8;
    static rcr_interpreter_end: u8;
}

/// The interpreter's machine code, position independent.
pub struct Interpreter;

/// See [`Interpreter::code`].
pub const INTERPRETER: Interpreter = Interpreter;

impl Interpreter {
    /// The bytes to write into the target.
    pub fn code(&self) -> &'static [u8] {
        // SAFETY: both symbols bound one read-only piece of this binary, the
        // second after the first (they are in one assembly block).
        unsafe {
            let start = &raw const rcr_interpreter_start;
            let end = &raw const rcr_interpreter_end;
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }
}

impl Interpreter {
    /// Offset of the instruction where a finished program stands.
    pub fn done_offset(&self) -> u64 {
        self.offset_of(&raw const rcr_interpreter_done)
    }

    /// Offset of where a program goes after its last call.
    pub fn last_offset(&self) -> u64 {
        self.offset_of(&raw const rcr_interpreter_last)
    }

    /// Offset of the instruction after the first call that comes from us and
    /// not from the program.
    pub fn ended_offset(&self) -> u64 {
        self.offset_of(&raw const rcr_interpreter_ended)
    }

    fn offset_of(&self, symbol: *const u8) -> u64 {
        symbol as u64 - (&raw const rcr_interpreter_start) as u64
    }
}

/// What a finished program sends itself: ignored by default, rarely handled,
/// and where it is (preemption in Go), a spurious one is foreseen.
pub const DONE_SIGNAL: i32 = libc::SIGURG;

/// Its `si_code`. Not below zero: the kernel then keeps what comes with a signal
/// also for who has more pending than it may (RLIMIT_SIGPENDING).
pub const DONE_CODE: i32 = 0x52;

/// Its `si_pid`, beyond any id.
pub const DONE_SENDER: i32 = 0x5263_7221;

/// What is blocked while we work with a task: everything. Traps may be pending,
/// so nothing of ours may cause any: a blocked one would have its disposition
/// reset.
pub const REMOTE_SIGMASK: u64 = !0;

/// The same while a program runs whose end [`DONE_SIGNAL`] tells.
pub const LISTENING_SIGMASK: u64 = !(1 << (DONE_SIGNAL - 1));

/// The `syscall` instruction.
pub const SYSCALL_INSN: [u8; 2] = [0x0f, 0x05];

/// Bit of [`Entry::control`]: stop when the call returns an error.
pub const STOP_ON_ERROR: u64 = 1 << 8;

/// One call in the interpreter's table: ten 64-bit words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// System call number; -1 ends the table.
    pub nr: i64,
    /// Arguments, or addresses of them (see `control`).
    pub args: [u64; 6],
    /// Bit *n* below 6: argument *n* is loaded from the address given.
    /// [`STOP_ON_ERROR`].
    pub control: u64,
    /// Filled by the interpreter.
    pub result: i64,
}

/// Size of an [`Entry`] in the target.
pub const ENTRY_BYTES: usize = 80;

impl Entry {
    /// The entry that ends a table.
    pub const END: Entry = Entry {
        nr: -1,
        args: [0; 6],
        control: 0,
        result: 0,
    };

    /// Offset of the result within an entry.
    pub const RESULT_OFFSET: usize = 64;

    /// As the interpreter reads it.
    pub fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut out = [0; ENTRY_BYTES];
        let mut words = [0u64; 10];
        words[0] = self.nr as u64;
        words[1..7].copy_from_slice(&self.args);
        words[7] = self.control;
        words[8] = self.result as u64;
        for (chunk, w) in out.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&w.to_le_bytes());
        }
        out
    }
}
