//! A thread's way back: code from which it returns to what it was doing, all by
//! itself, should nobody hold it any more.
//!
//! It is a few hundred bytes, with the thread's state among them, in the zeros
//! at the end of the vDSO's text: executable memory that every program has and
//! no program uses. From [`leave`](WayBack::LEAVE) it takes our mapping away,
//! restores the signal mask, where system calls go and the registers, in an
//! order in which nothing can come between, and jumps. Calls that make our
//! mapping are made at [`call`](WayBack::CALL), behind which a new mapping is
//! taken away as well.
//!
//! Floating point and vector registers are as they were: calls leave them alone.

use std::arch::global_asm;

use crate::ext::RcrDispatch;
use crate::sys::ptrace::Regs;

use super::regs::TRAP_FLAG;

global_asm!(
    ".pushsection .rodata",
    ".global rcr_way_back_start",
    ".global rcr_way_back_leave",
    ".global rcr_way_back_data",
    ".p2align 4",
    "rcr_way_back_start:",
    "syscall",
    // No mapping, no more to do than to return.
    "cmp rax, -4096",
    "ja 2f",
    "mov rdi, rax",
    "jmp 1f",
    "rcr_way_back_leave:",
    "mov rdi, [rip + rcr_way_back_data]",
    "test rdi, rdi",
    "jz 2f",
    "1:",
    "mov rsi, [rip + rcr_way_back_data + 8]",
    "mov eax, {munmap}",
    "syscall",
    "2:",
    // From here on no instruction changes a flag, and no signal needs the
    // stack before it is one again.
    "lea rsp, [rip + rcr_way_back_data + 16]",
    "popfq",
    "mov rsp, [rip + rcr_way_back_data + 24]",
    "mov edi, 2",
    "lea rsi, [rip + rcr_way_back_data + 32]",
    "mov edx, 0",
    "mov r10d, 8",
    "mov eax, {sigprocmask}",
    "syscall",
    "mov rcx, [rip + rcr_way_back_data + 40]",
    "jrcxz 3f",
    "mov edi, {dispatch}",
    "mov rsi, rcx",
    "mov rdx, [rip + rcr_way_back_data + 48]",
    "mov r10, [rip + rcr_way_back_data + 56]",
    "mov r8, [rip + rcr_way_back_data + 64]",
    "mov eax, {prctl}",
    "syscall",
    "3:",
    "mov rax, [rip + rcr_way_back_data + 72]",
    "mov rcx, [rip + rcr_way_back_data + 80]",
    "mov rdx, [rip + rcr_way_back_data + 88]",
    "mov rsi, [rip + rcr_way_back_data + 96]",
    "mov rdi, [rip + rcr_way_back_data + 104]",
    "mov r8, [rip + rcr_way_back_data + 112]",
    "mov r9, [rip + rcr_way_back_data + 120]",
    "mov r10, [rip + rcr_way_back_data + 128]",
    "mov r11, [rip + rcr_way_back_data + 136]",
    "mov r12, [rip + rcr_way_back_data + 144]",
    "mov r13, [rip + rcr_way_back_data + 152]",
    "mov r14, [rip + rcr_way_back_data + 160]",
    "jmp [rip + rcr_way_back_data + 168]",
    ".p2align 3",
    "rcr_way_back_data:",
    ".popsection",
    munmap = const libc::SYS_munmap,
    sigprocmask = const libc::SYS_rt_sigprocmask,
    prctl = const libc::SYS_prctl,
    dispatch = const PR_SET_SYSCALL_USER_DISPATCH,
);

const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
/// Words behind the code.
const WORDS: usize = 22;

unsafe extern "C" {
    static rcr_way_back_start: u8;
    static rcr_way_back_leave: u8;
    static rcr_way_back_data: u8;
}

/// What a thread returns to.
#[derive(Debug, Clone, Copy)]
pub struct WayBack<'a> {
    /// Where our mapping starts, 0 as long as there is none, and its length.
    pub mapping: (u64, u64),
    /// The registers, those of a call to be restarted set back to it.
    pub regs: &'a Regs,
    /// The signal mask.
    pub sigmask: u64,
    /// Where its system calls go, unless to the kernel.
    pub dispatch: Option<&'a RcrDispatch>,
}

impl WayBack<'_> {
    /// Offset of the `syscall` instruction for calls that make our mapping.
    pub const CALL: u64 = 0;

    /// Offset from which a thread returns.
    pub fn leave() -> u64 {
        (&raw const rcr_way_back_leave) as u64 - (&raw const rcr_way_back_start) as u64
    }

    /// The part that is the same for all threads.
    pub fn code() -> &'static [u8] {
        // SAFETY: both symbols bound one read-only piece of this binary, the
        // second after the first (they are in one assembly block).
        unsafe {
            let start = &raw const rcr_way_back_start;
            let end = &raw const rcr_way_back_data;
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }

    /// Bytes of a way back.
    pub fn len() -> usize {
        Self::code().len() + WORDS * 8
    }

    /// As it lies in the thread's memory.
    pub fn to_bytes(self) -> Vec<u8> {
        let r = self.regs;
        let dispatch = self.dispatch.copied().unwrap_or_default();
        let words: [u64; WORDS] = [
            self.mapping.0,
            self.mapping.1,
            // A program that has its own instructions trap would trap in ours.
            r.eflags & !TRAP_FLAG,
            r.rsp,
            self.sigmask,
            dispatch.mode,
            dispatch.offset,
            dispatch.len,
            dispatch.selector,
            r.rax,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.rip,
        ];
        let mut out = Self::code().to_vec();
        out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        out
    }
}
