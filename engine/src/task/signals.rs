//! Signals: dispositions, pending queues, alternate stacks.

use crate::image::schema::{SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use crate::remote::{DataRef, Outcome, Program};
use crate::sys::SysResult;
use crate::sys::ptrace;
use crate::sys::text;

/// Bytes of the kernel's `struct sigaction` and of its mask.
const SIGACTION_BYTES: usize = 32;
const MASK_BYTES: u64 = 8;

/// The signals whose disposition can be set, in image order.
fn settable() -> impl Iterator<Item = i32> {
    (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s))
}

/// Asks for every disposition; answers are read by [`parse_actions`].
pub fn query_actions(p: &mut Program) -> Vec<DataRef> {
    settable()
        .map(|signal| {
            let out = p.zeroed(SIGACTION_BYTES);
            p.call(
                libc::SYS_rt_sigaction,
                format!("read the disposition of signal {signal}"),
                &[signal.into(), 0.into(), out.into(), MASK_BYTES.into()],
            );
            out
        })
        .collect()
}

/// Reads the answers to [`query_actions`].
pub fn parse_actions(outcome: &Outcome, refs: &[DataRef]) -> Vec<SaEntry> {
    refs.iter()
        .map(|&r| {
            let w: Vec<u64> = outcome
                .data(r)
                .chunks_exact(8)
                .map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")))
                .collect();
            SaEntry {
                sigaction: w[0],
                flags: w[1],
                restorer: w[2],
                mask: w[3],
                ..SaEntry::default()
            }
        })
        .collect()
}

/// Sets every disposition, in a process that has ours.
///
/// Not of a signal that is ignored by default, where it is already: to set that
/// throws away what has been sent meanwhile, also to who blocks it and waits.
pub fn restore_actions(p: &mut Program, actions: &[SaEntry]) {
    let changed = own_actions();
    for (signal, a) in settable().zip(actions) {
        let default = [a.sigaction, a.flags, a.mask] == [0; 3];
        if IGNORED.contains(&signal) && default && changed >> (signal - 1) & 1 == 0 {
            continue;
        }
        let words = [a.sigaction, a.flags, a.restorer, a.mask];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let action = p.bytes(&bytes);
        p.call(
            libc::SYS_rt_sigaction,
            format!("set the disposition of signal {signal}"),
            &[signal.into(), action.into(), 0.into(), MASK_BYTES.into()],
        );
    }
}

/// Ignored by default (signal(7)).
const IGNORED: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];

/// The signals that we ourselves ignore or handle (`SigIgn` and `SigCgt` of
/// proc_pid_status(5)); all, where that cannot be told.
fn own_actions() -> u64 {
    let Ok(status) = text::read_string("/proc/self/status") else {
        return !0;
    };
    let mask = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
    };
    match (mask("SigIgn:"), mask("SigCgt:")) {
        (Some(ignored), Some(caught)) => ignored | caught,
        _ => !0,
    }
}

/// Copies a pending queue without taking from it.
pub fn save_queue(tid: i32, shared: bool) -> SysResult<SignalQueueEntry> {
    let signals = ptrace::peek_signals(tid, shared)?;
    let signals = signals
        .into_iter()
        .map(|s| SiginfoEntry {
            siginfo: s.to_vec(),
        })
        .collect();
    Ok(SignalQueueEntry { signals })
}

/// Queues the signals again: to the process (`tid` `None`) or to one thread.
pub fn restore_queue(p: &mut Program, pid: i32, tid: Option<i32>, queue: &SignalQueueEntry) {
    for s in &queue.signals {
        let signal =
            i32::from_le_bytes(s.siginfo[..4].try_into().expect("a siginfo has 128 bytes"));
        let info = p.bytes(&s.siginfo);
        let what = format!("queue signal {signal}");
        match tid {
            None => p.call(
                libc::SYS_rt_sigqueueinfo,
                what,
                &[pid.into(), signal.into(), info.into()],
            ),
            Some(tid) => p.call(
                libc::SYS_rt_tgsigqueueinfo,
                what,
                &[pid.into(), tid.into(), signal.into(), info.into()],
            ),
        };
    }
}

/// Bytes of `stack_t`.
const STACK_T_BYTES: usize = 24;

/// Asks for the alternate signal stack.
pub fn query_altstack(p: &mut Program) -> DataRef {
    let out = p.zeroed(STACK_T_BYTES);
    p.call(
        libc::SYS_sigaltstack,
        "read the alternate signal stack",
        &[0.into(), out.into()],
    );
    out
}

/// Reads the answer to [`query_altstack`].
pub fn parse_altstack(outcome: &Outcome, r: DataRef) -> ThreadSasEntry {
    let d = outcome.data(r);
    let u64_at = |o: usize| u64::from_le_bytes(d[o..o + 8].try_into().expect("8 bytes"));
    ThreadSasEntry {
        ss_sp: u64_at(0),
        ss_flags: u64_at(8) as u32,
        ss_size: u64_at(16),
    }
}

/// Sets the alternate signal stack.
pub fn restore_altstack(p: &mut Program, sas: &ThreadSasEntry) {
    // SS_ONSTACK only reports where the stack pointer is.
    let flags = sas.ss_flags & !(libc::SS_ONSTACK as u32);
    let words = [sas.ss_sp, u64::from(flags), sas.ss_size];
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let stack = p.bytes(&bytes);
    p.call(
        libc::SYS_sigaltstack,
        "set the alternate signal stack",
        &[stack.into(), 0.into()],
    );
}

/// Takes back the SIGCHLD that children which had to end now have caused: the
/// task has had its signal before the dump, or has it in its queue.
pub fn forget_child_signal(p: &mut Program) {
    let set = p.bytes(&(1u64 << (libc::SIGCHLD - 1)).to_le_bytes());
    let at_once = p.zeroed(16);
    let args = [set.into(), 0.into(), at_once.into(), 8.into()];
    // EAGAIN: there was none.
    p.try_call(libc::SYS_rt_sigtimedwait, "take SIGCHLD back", &args);
}
