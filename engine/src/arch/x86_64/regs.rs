//! Register conventions.

use crate::sys::ptrace::Regs;

/// `ERESTARTSYS` and its kin (linux/errno.h): what a stopped task's `rax` holds
/// when the kernel is going to restart its system call.
const ERESTARTSYS: i64 = 512;
/// The flag by which a program has every instruction of it trap.
pub(super) const TRAP_FLAG: u64 = 1 << 8;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// Lets the task continue at `ip` with `r12` = `table` and `r14` = `way_back`.
///
/// `orig_rax` is cleared: else a pending syscall restart would rewind `ip`.
pub fn point_at(regs: &Regs, ip: u64, table: u64, way_back: u64) -> Regs {
    Regs {
        rip: ip,
        r12: table,
        r14: way_back,
        orig_rax: u64::MAX,
        eflags: regs.eflags & !TRAP_FLAG,
        ..*regs
    }
}

/// Prepares one system call by an instruction at `ip`.
pub fn set_call(regs: &Regs, ip: u64, nr: i64, a: [u64; 6]) -> Regs {
    Regs {
        rip: ip,
        rax: nr as u64,
        rdi: a[0],
        rsi: a[1],
        rdx: a[2],
        r10: a[3],
        r8: a[4],
        r9: a[5],
        orig_rax: u64::MAX,
        eflags: regs.eflags & !TRAP_FLAG,
        ..*regs
    }
}

/// Registers with which an interrupted system call is made again from user
/// space, since the kernel's own memory of it does not survive.
///
/// A call that the kernel would resume through its restart block (nanosleep,
/// poll, futex with a relative timeout) starts over with its full timeout;
/// `task::nap` makes up for that.
pub fn restart_syscall(regs: &Regs) -> Regs {
    let mut r = *regs;
    if (r.orig_rax as i64) < 0 {
        return r;
    }
    match -(r.rax as i64) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK => {
            r.rax = r.orig_rax;
            r.rip -= 2;
        }
        _ => {}
    }
    r.orig_rax = u64::MAX;
    r
}

/// The same in a task that has never made the call, which is told by `call`
/// where the kernel was to go on with it by restart_syscall(2): there is nothing
/// there to go on with. One that is not known has been interrupted, which the
/// calls that are restarted like this may be at any time.
pub fn make_again(regs: &Regs, call: Option<i64>) -> Regs {
    let mut r = restart_syscall(regs);
    if r.rip == regs.rip || r.rax as i64 != libc::SYS_restart_syscall {
        return r;
    }
    match call {
        Some(call) => r.rax = call as u64,
        None => {
            r.rip = regs.rip;
            r.rax = -i64::from(libc::EINTR) as u64;
        }
    }
    r
}

/// Registers about to make a call by [`restart_syscall`], as the kernel leaves
/// them when the call was interrupted with `result`.
pub fn interrupted_call(regs: &Regs, nr: i64, result: i64) -> Regs {
    Regs {
        rip: regs.rip + 2,
        rax: result as u64,
        orig_rax: nr as u64,
        ..*regs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs() -> Regs {
        // SAFETY: plain integers; all-zero is valid.
        unsafe { std::mem::zeroed() }
    }

    #[test]
    fn interrupted_call_is_made_again() {
        let r = Regs {
            rip: 0x1002,
            orig_rax: 232,
            rax: (-514i64) as u64,
            ..regs()
        };
        let n = restart_syscall(&r);
        assert_eq!((n.rip, n.rax, n.orig_rax), (0x1000, 232, u64::MAX));
    }

    #[test]
    fn nobody_else_can_go_on_with_a_restarted_call() {
        let r = Regs {
            rip: 0x1002,
            orig_rax: libc::SYS_restart_syscall as u64,
            rax: (-ERESTART_RESTARTBLOCK) as u64,
            ..regs()
        };
        let known = make_again(&r, Some(libc::SYS_poll));
        assert_eq!((known.rip, known.rax), (0x1000, libc::SYS_poll as u64));
        let unknown = make_again(&r, None);
        assert_eq!((unknown.rip, unknown.rax as i64), (0x1002, -4));
        assert_eq!(unknown.orig_rax, u64::MAX);
    }

    #[test]
    fn finished_call_keeps_its_result() {
        let r = Regs {
            rip: 0x1002,
            orig_rax: 0,
            rax: (-4i64) as u64,
            ..regs()
        };
        let n = restart_syscall(&r);
        assert_eq!((n.rip, n.rax as i64), (0x1002, -4));
    }
}
