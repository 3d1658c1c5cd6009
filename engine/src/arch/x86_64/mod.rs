//! x86-64: the interpreter, registers, the vDSO.

mod frame;
mod interpreter;
mod regs;
pub mod xstate;

pub use frame::{FRAME_BYTES_MAX, return_frame};
pub use interpreter::{
    DONE_CODE, DONE_SENDER, DONE_SIGNAL, ENTRY_BYTES, Entry, INTERPRETER, LISTENING_SIGMASK,
    REMOTE_SIGMASK, STOP_ON_ERROR, SYSCALL_INSN,
};
pub use regs::{interrupted_call, point_at, restart_syscall, set_call};
