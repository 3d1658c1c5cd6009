//! x86-64: the interpreter, registers, the vDSO.

mod interpreter;
mod regs;
mod way_back;
pub mod xstate;

pub use interpreter::{
    DONE_CODE, DONE_SENDER, DONE_SIGNAL, ENTRY_BYTES, Entry, INTERPRETER, LISTENING_SIGMASK,
    REMOTE_SIGMASK, STOP_ON_ERROR, SYSCALL_INSN,
};
pub use regs::{interrupted_call, make_again, point_at, restart_syscall, set_call};
pub use way_back::WayBack;
