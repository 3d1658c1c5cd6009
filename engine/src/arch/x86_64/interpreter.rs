//! The only code of ours that ever runs inside a target.
//!
//! It walks a table of [`Entry`]s with `r12`, calls the kernel for each, and
//! ends after the last entry, or at the first one that failed and was not
//! allowed to. Then it sends itself [`DONE_SIGNAL`], asking for its own id
//! first, which is another one in a PID namespace: its tracer sees that and
//! takes it from there. Should the tracer be gone, the signal is ignored, as it
//! is by default, and rt_sigreturn(2) brings back the registers of the frame at
//! `r14`. It uses no stack and no memory but these.

use std::arch::global_asm;

global_asm!(
    ".pushsection .rodata",
    ".global rcr_interpreter_start",
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
    "mov eax, {gettid}",
    "syscall",
    "mov edi, eax",
    "mov esi, {done}",
    "mov eax, {tkill}",
    "syscall",
    "rcr_interpreter_done:",
    "mov rsp, r14",
    "mov eax, 15",
    "syscall",
    "hlt",
    "rcr_interpreter_end:",
    ".popsection",
    gettid = const libc::SYS_gettid,
    tkill = const libc::SYS_tkill,
    done = const DONE_SIGNAL,
);

unsafe extern "C" {
    static rcr_interpreter_start: u8;
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
        // SAFETY: both symbols lie in the same piece, see `code`.
        unsafe {
            (&raw const rcr_interpreter_done).offset_from(&raw const rcr_interpreter_start) as u64
        }
    }
}

/// What a finished program sends itself: ignored by default, rarely handled,
/// and where it is (preemption in Go), a spurious one is foreseen.
pub const DONE_SIGNAL: i32 = libc::SIGURG;

/// What is blocked while a program runs: everything but the signal that says
/// it is done. Traps may be pending, so nothing of ours may cause any: a blocked
/// one would have its disposition reset.
pub const REMOTE_SIGMASK: u64 = !(1 << (DONE_SIGNAL - 1));

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
