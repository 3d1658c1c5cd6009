//! The frame that rt_sigreturn(2) takes a thread's whole state from
//! (arch/x86/include/uapi/asm/sigcontext.h, ucontext.h).

use crate::sys::ptrace::Regs;

/// Room for a frame with the largest XSAVE area there is (AMX: 11 KiB).
pub const FRAME_BYTES_MAX: usize = 16 << 10;

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 1 | 2 | 4;
/// No flags sigaltstack(2) knows: the kernel then leaves the stack alone.
const NO_ALTSTACK: u64 = 0x5555;
/// Bytes of `struct ucontext` with the kernel's 8-byte mask.
const UCONTEXT_BYTES: usize = 8 + 8 + 24 + 256 + 8;
/// Where the XSAVE area starts; it must be 64-byte aligned.
const XSTATE_AT: usize = UCONTEXT_BYTES.next_multiple_of(64);
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// `struct _fpx_sw_bytes` within the area's legacy part.
const SW_BYTES: usize = 464;
/// Bits of the features present, in the area's header.
const XSTATE_BV: usize = 512;

/// A frame to lie at `at` (64-byte aligned) that brings back these registers,
/// this XSAVE area and this signal mask. `None`: the area is too large.
pub fn return_frame(at: u64, regs: &Regs, xstate: &[u8], sigmask: u64) -> Option<Vec<u8>> {
    let mut frame = vec![0u8; XSTATE_AT];
    let segments = regs.cs & 0xffff | (regs.ss & 0xffff) << 48;
    let words = [
        UC_FLAGS,
        0,
        0,
        NO_ALTSTACK,
        0,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
        segments,
        0,
        0,
        0,
        0,
        at + XSTATE_AT as u64,
    ];
    for (chunk, w) in frame.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&w.to_le_bytes());
    }
    frame[UCONTEXT_BYTES - 8..UCONTEXT_BYTES].copy_from_slice(&sigmask.to_le_bytes());
    let mut area = xstate.to_vec();
    let len = area.len() as u32;
    let features = area.get(SW_BYTES..SW_BYTES + 8)?.to_vec();
    area.get(XSTATE_BV..XSTATE_BV + 8)?;
    area[SW_BYTES..SW_BYTES + 4].copy_from_slice(&MAGIC1.to_le_bytes());
    area[SW_BYTES + 4..SW_BYTES + 8].copy_from_slice(&(len + 4).to_le_bytes());
    area[SW_BYTES + 8..SW_BYTES + 16].copy_from_slice(&features);
    area[SW_BYTES + 16..SW_BYTES + 20].copy_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(&area);
    frame.extend_from_slice(&MAGIC2.to_le_bytes());
    (frame.len() <= FRAME_BYTES_MAX).then_some(frame)
}
