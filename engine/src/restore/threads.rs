//! The threads of a process, and the last touches of each.

use nix::errno::Errno;

use super::RestoreError;
use super::births::Birth;
use super::images::{LiveImage, ProcessImage, ThreadImage};
use super::process::Step;
use crate::arch;
use crate::image::schema::SeccompMode;
use crate::memory::policy;
use crate::namespace::pid::Places;
use crate::remote::{Halt, Program, RemoteError, Tracee};
use crate::sys::process::CloneArgs;
use crate::sys::ptrace::{self, Stop};
use crate::task::{creds, knobs, seccomp, signals};

const PR_SET_PDEATHSIG: i32 = 1;
const PR_SET_DUMPABLE: i32 = 4;
const PR_SET_NAME: i32 = 15;
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;
/// How often a wrong thread id is given back before giving up.
const TRIES: usize = 1000;

impl Step<'_, '_> {
    /// Makes the other threads and gives every thread what is its own.
    pub(super) fn threads(
        &mut self,
        p: &ProcessImage,
        live: &LiveImage,
        birth: &Birth,
    ) -> Result<(), RestoreError> {
        let others = &live.threads[1..];
        let nested = self.worlds.user(&live.ids).is_some();
        if nested {
            for t in others {
                make_by_counter(p.pid, t.tid, birth)?;
            }
        } else {
            make_by_id(p.pid, others, birth, &self.images.pids)?;
        }
        let first = &live.threads[0].ext.seccomp_chain;
        let one_chain = live.threads.iter().all(|t| t.ext.seccomp_chain == *first);
        let ours = knobs::own();
        // The leader comes last, so that a filter it spreads finds all ready.
        for t in live.threads.iter().rev() {
            let is_leader = t.tid == p.pid;
            let mut prog = Program::new();
            own_state(&mut prog, p.pid, t);
            if let Some(knobs) = &t.ext.knobs {
                knobs::restore(&mut prog, knobs, &ours);
            }
            // Born before the leader changed, or after it entered its user
            // namespace with the ids in place.
            if !nested
                && !is_leader
                && let Some(c) = &t.core.creds
            {
                creds::restore_ids(&mut prog, c);
            }
            if !one_chain {
                seccomp::restore_filters(
                    &mut prog,
                    &self.images.seccomp,
                    &t.ext.seccomp_chain,
                    false,
                );
            } else if is_leader {
                let all = live.threads.len() > 1;
                seccomp::restore_filters(&mut prog, &self.images.seccomp, first, all);
            }
            if t.core.seccomp_mode == Some(SeccompMode::Strict as i32) {
                seccomp::restore_strict(&mut prog);
            }
            if let Some(c) = &t.core.creds {
                creds::restore_caps(&mut prog, c);
            }
            // A change of credentials clears it, so it comes after.
            let signal = t.core.pdeath_sig.unwrap_or(0);
            let args = [PR_SET_PDEATHSIG.into(), u64::from(signal).into()];
            prog.call(libc::SYS_prctl, "set the parent death signal", &args);
            if let Some(queue) = &t.core.signals_p {
                let pids = &self.images.pids;
                let (process, thread) = (pids.seen(p.pid, p.pid), pids.seen(p.pid, t.tid));
                signals::restore_queue(&mut prog, process, Some(thread), queue);
            }
            Tracee { tid: t.tid }.run(birth.arena, &prog)?;
        }
        Ok(())
    }
}

fn own_state(prog: &mut Program, pid: i32, t: &ThreadImage) {
    if let Some(sas) = &t.core.sas {
        signals::restore_altstack(prog, sas);
    }
    let list = [
        t.core.futex_rla.into(),
        u64::from(t.core.futex_rla_len).into(),
    ];
    if t.core.futex_rla_len != 0 {
        prog.call(libc::SYS_set_robust_list, "set the robust list", &list);
    }
    let tid_address = [t.info.clear_tid_addr.into()];
    prog.call(
        libc::SYS_set_tid_address,
        "set clear_child_tid",
        &tid_address,
    );
    if let Some(r) = &t.core.rseq_entry {
        let (size, signature) = (u64::from(r.rseq_abi_size), u64::from(r.signature));
        let args = [
            r.rseq_abi_pointer.into(),
            size.into(),
            0.into(),
            signature.into(),
        ];
        prog.call(libc::SYS_rseq, format!("register rseq of {pid}"), &args);
    }
    if let Some(policy) = &t.ext.memory_policy {
        policy::restore_thread(prog, policy);
    }
    if let Some(comm) = &t.core.comm {
        let name = prog.cstr(comm.as_bytes());
        prog.call(
            libc::SYS_prctl,
            "set the name",
            &[PR_SET_NAME.into(), name.into()],
        );
    }
}

/// How long a thread may take to end.
const END_PATIENCE: std::time::Duration = std::time::Duration::from_secs(3);

/// All threads in one program, each asking for its id.
fn make_by_id(
    pid: i32,
    threads: &[ThreadImage],
    birth: &Birth,
    pids: &Places,
) -> Result<(), RestoreError> {
    let mut prog = Program::new();
    for t in threads {
        let ids = pids.set_tid(t.tid);
        let tid = prog.bytes(&ids.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<_>>());
        let args = CloneArgs {
            flags: THREAD_FLAGS as u64,
            set_tid_size: ids.len() as u64,
            ..CloneArgs::default()
        };
        let holder = prog.bytes(&args.as_bytes());
        prog.point(holder, 64, tid);
        let len = args.as_bytes().len() as u64;
        let what = format!("make thread {}", t.tid);
        prog.call(libc::SYS_clone3, what, &[holder.into(), len.into()]);
    }
    let run = Tracee { tid: pid }.run_with_births(birth.arena, &prog);
    let (_, births) = run.map_err(|e| match e {
        RemoteError::Call {
            errno: Errno::EEXIST,
            ref what,
            ..
        } => {
            let tid = what
                .rsplit(' ')
                .next()
                .and_then(|w| w.parse().ok())
                .unwrap_or(0);
            RestoreError::PidTaken {
                pid: tid,
                comm: "another task".into(),
            }
        }
        e => e.into(),
    })?;
    for tid in births {
        ptrace::set_sigmask(tid, arch::REMOTE_SIGMASK)?;
    }
    Ok(())
}

/// In a user namespace of its own a task may not choose ids: we set the
/// kernel's counter (`ns_last_pid`) and try again when somebody was faster.
///
/// The counter is then put back: who is started next must not get the id of
/// something that is still to be restored.
fn make_by_counter(pid: i32, tid: i32, birth: &Birth) -> Result<(), RestoreError> {
    let before = std::fs::read(COUNTER).map_err(RestoreError::io(COUNTER))?;
    let made = make_with_counter(pid, tid, birth);
    std::fs::write(COUNTER, before).map_err(RestoreError::io(COUNTER))?;
    made
}

/// The id that the kernel gave out last; it looks for the next one behind it.
const COUNTER: &str = "/proc/sys/kernel/ns_last_pid";

fn make_with_counter(pid: i32, tid: i32, birth: &Birth) -> Result<(), RestoreError> {
    for _ in 0..TRIES {
        let mut prog = Program::new();
        let args = CloneArgs {
            flags: THREAD_FLAGS as u64,
            ..CloneArgs::default()
        };
        let holder = prog.bytes(&args.as_bytes());
        let len = args.as_bytes().len() as u64;
        prog.call(
            libc::SYS_clone3,
            format!("make thread {tid}"),
            &[holder.into(), len.into()],
        );
        std::fs::write(COUNTER, (tid - 1).to_string()).map_err(RestoreError::io(COUNTER))?;
        let (_, births) = Tracee { tid: pid }.run_with_births(birth.arena, &prog)?;
        let [born] = births[..] else { continue };
        ptrace::set_sigmask(born, arch::REMOTE_SIGMASK)?;
        if born == tid {
            return Ok(());
        }
        let mut prog = Program::new();
        prog.call(libc::SYS_exit, "leave with a wrong id", &[0.into()]);
        match (Tracee { tid: born }).run(birth.arena, &prog) {
            Err(RemoteError::Gone { .. }) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => return Err(RestoreError::Tid { tid }),
        }
    }
    Err(RestoreError::Tid { tid })
}

/// Ends a process with the wait status that it had.
pub fn end_again(pid: i32, status: i32, birth: &Birth) -> Result<(), RestoreError> {
    let tracee = Tracee { tid: pid };
    if libc::WIFSIGNALED(status) {
        let target = nix::unistd::Pid::from_raw(pid);
        let signal = libc::WTERMSIG(status);
        let signal = nix::sys::signal::Signal::try_from(signal)
            .map_err(|e| RestoreError::io(format!("zombie {pid}"))(e.into()))?;
        if signal != nix::sys::signal::Signal::SIGKILL {
            let mut prog = Program::new();
            let default = prog.zeroed(32);
            let args = [(signal as i32).into(), default.into(), 0.into(), 8.into()];
            prog.call(libc::SYS_rt_sigaction, "let the signal end it", &args);
            // There is nothing of the program in it to be looked at.
            let args = [PR_SET_DUMPABLE, 0, 0, 0, 0].map(Into::into);
            prog.call(libc::SYS_prctl, "let it leave no core", &args);
            tracee.run(birth.arena, &prog)?;
        }
        // What others send is not what ended it.
        let awaited = 1 << (signal as i32 - 1);
        ptrace::set_sigmask(pid, arch::REMOTE_SIGMASK & !awaited)?;
        nix::sys::signal::kill(target, signal)
            .map_err(|e| RestoreError::io(format!("zombie {pid}"))(e.into()))?;
        // A kill wakes a stopped task, other signals do not.
        if signal != nix::sys::signal::Signal::SIGKILL {
            ptrace::cont(pid, 0)?;
        }
        loop {
            match ptrace::wait(pid)? {
                Stop::Signal(s) if s == signal as i32 => ptrace::cont(pid, s)?,
                Stop::Gone(_) => return Ok(()),
                _ => ptrace::cont(pid, 0)?,
            }
        }
    }
    let mut prog = Program::new();
    let code = libc::WEXITSTATUS(status);
    prog.call(libc::SYS_exit_group, "end again", &[code.into()]);
    match tracee.run(birth.arena, &prog) {
        Err(RemoteError::Gone { .. }) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => Err(RestoreError::Tree {
            pid,
            what: "did not end".into(),
        }),
    }
}

/// The leader ends while the other threads live on; `insn` is a `syscall`
/// instruction in its memory.
pub fn end_leader(
    pid: i32,
    status: i32,
    live: &LiveImage,
    insn: Option<u64>,
) -> Result<(), RestoreError> {
    let insn = insn.ok_or_else(|| RestoreError::Tree {
        pid,
        what: "has no code to end with".into(),
    })?;
    let regs = ptrace::get_regs(pid)?;
    let code = libc::WEXITSTATUS(status) as u64;
    let call = arch::set_call(&regs, insn, libc::SYS_exit, [code, 0, 0, 0, 0, 0]);
    ptrace::set_regs(pid, &call)?;
    let mut halt = Halt::default();
    Tracee { tid: pid }.reach_call(&mut halt)?;
    ptrace::set_sigmask(pid, live.threads[0].core.blk_sigset.unwrap_or(0))?;
    // Its tracer is told of its end only when all threads have ended. Once in the
    // call it takes no signal any more.
    ptrace::detach(pid, 0)?;
    let end = std::time::Instant::now() + END_PATIENCE;
    while !crate::tree::thread_is_dead(pid, pid) {
        if std::time::Instant::now() > end {
            let what = "its first thread does not end".into();
            return Err(RestoreError::Tree { pid, what });
        }
        std::thread::yield_now();
    }
    Ok(())
}
