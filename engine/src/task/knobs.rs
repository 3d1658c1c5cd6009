//! What a thread has set for itself by prctl(2) and arch_prctl(2), beside
//! what other files here carry.

use std::io;

use crate::ext::RcrKnobs;
use crate::remote::{DataRef, OpId, Outcome, Program};
use crate::sys::text;
use crate::tree::Stat;

const PR_GET_TSC: i32 = 25;
const PR_SET_TSC: i32 = 26;
const PR_TSC_ENABLE: i32 = 1;
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_SET_SPECULATION_CTRL: i32 = 53;
/// `PR_SPEC_PRCTL`: the thread may choose.
const SPEC_PRCTL: i64 = 1;
/// `PR_SPEC_ENABLE`, `DISABLE`, `FORCE_DISABLE`, `DISABLE_NOEXEC`.
const SPEC_CHOICE: i64 = 0b11110;
const PR_SET_IO_FLUSHER: i32 = 57;
const ARCH_GET_CPUID: i32 = 0x1011;
const ARCH_SET_CPUID: i32 = 0x1012;
/// `PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE`, which make an I/O flusher.
const PF_IO_FLUSHER: u64 = 0x0018_0000;

/// Where the answers of [`query`] will be.
#[derive(Debug)]
pub struct Query {
    tsc: DataRef,
    speculation: [OpId; 3],
    cpuid: OpId,
}

/// Asks the thread. Processors and kernels without a knob answer with errors.
pub fn query(p: &mut Program) -> Query {
    let tsc = p.zeroed(8);
    let zero = || 0.into();
    let args = [PR_GET_TSC.into(), tsc.into(), zero(), zero(), zero()];
    p.try_call(libc::SYS_prctl, "read the time stamp counter's mode", &args);
    let speculation = [0, 1, 2].map(|which| {
        let args = [
            PR_GET_SPECULATION_CTRL.into(),
            which.into(),
            zero(),
            zero(),
            zero(),
        ];
        p.try_call(libc::SYS_prctl, "read speculation control", &args)
    });
    let args = [ARCH_GET_CPUID.into(), zero()];
    let cpuid = p.try_call(libc::SYS_arch_prctl, "read CPUID faulting", &args);
    Query {
        tsc,
        speculation,
        cpuid,
    }
}

/// Reads the answers, and what `/proc` tells.
pub fn answers(seen: &Seen, outcome: &Outcome, q: &Query) -> RcrKnobs {
    let tsc = i32::from_le_bytes(outcome.data(q.tsc)[..4].try_into().expect("4 bytes"));
    let chosen = |op: OpId| {
        let value = outcome.result(op);
        (value > 0 && value & SPEC_PRCTL != 0).then_some(value & SPEC_CHOICE)
    };
    RcrKnobs {
        tsc_mode: tsc,
        speculation: q.speculation.map(|op| chosen(op).unwrap_or(0)).to_vec(),
        cpuid_faults: outcome.result(q.cpuid) == 0,
        personality: seen.personality,
        io_flusher: seen.io_flusher,
    }
}

/// What can be seen from outside of a thread.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    personality: u32,
    io_flusher: bool,
}

/// Looks at a thread from outside.
pub fn look(pid: i32, tid: i32) -> io::Result<Seen> {
    let personality = text::read_string(format!("/proc/{pid}/task/{tid}/personality"))?;
    Ok(Seen {
        personality: u32::from_str_radix(personality.trim(), 16).unwrap_or(0),
        io_flusher: Stat::read(tid)?.number(9) & PF_IO_FLUSHER == PF_IO_FLUSHER,
    })
}

/// Sets what is not as in every new thread; `ours` is how this process, whose
/// fork the thread is, has it.
pub fn restore(p: &mut Program, k: &RcrKnobs, ours: &RcrKnobs) {
    let args = [u64::from(k.personality).into()];
    p.call(libc::SYS_personality, "set personality", &args);
    let mut prctl = |what: &str, option: i32, a: i64, b: i64| {
        let args = [
            option.into(),
            (a as u64).into(),
            (b as u64).into(),
            0.into(),
            0.into(),
        ];
        p.call(libc::SYS_prctl, what, &args);
    };
    for (which, &value) in k.speculation.iter().enumerate() {
        if value != 0 && ours.speculation.get(which) != Some(&value) {
            let which = which as i64;
            prctl(
                "set speculation control",
                PR_SET_SPECULATION_CTRL,
                which,
                value,
            );
        }
    }
    if k.io_flusher {
        prctl("become an I/O flusher", PR_SET_IO_FLUSHER, 1, 0);
    }
    if k.tsc_mode > PR_TSC_ENABLE {
        let mode = k.tsc_mode.into();
        prctl("set the time stamp counter's mode", PR_SET_TSC, mode, 0);
    }
    if k.cpuid_faults {
        let args = [ARCH_SET_CPUID.into(), 0.into()];
        p.call(libc::SYS_arch_prctl, "let CPUID fault", &args);
    }
}

/// The knobs of this process that its forks inherit and that may differ from
/// the kernel's defaults.
pub fn own() -> RcrKnobs {
    let speculation = [0, 1, 2].map(|which| {
        let value = crate::sys::process::prctl_get(PR_GET_SPECULATION_CTRL, which).unwrap_or(0);
        match value & SPEC_PRCTL {
            0 => 0,
            _ => value & SPEC_CHOICE,
        }
    });
    RcrKnobs {
        speculation: speculation.to_vec(),
        ..RcrKnobs::default()
    }
}
