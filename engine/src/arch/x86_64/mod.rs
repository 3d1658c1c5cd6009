//! x86-64: the interpreter, registers, the vDSO.

mod interpreter;
mod regs;

pub use interpreter::{ENTRY_BYTES, Entry, INTERPRETER, STOP_ON_ERROR, SYSCALL_INSN};
pub use regs::{point_at, restart_syscall, set_call};
