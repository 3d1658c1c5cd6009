//! One thread: registers, signal state, scheduling, credentials, seccomp.

use super::facts::Facts;
use super::settled::{Settled, Workshop};
use super::{Dump, DumpError};
use crate::arch;
use crate::ext::{self, RcrThread};
use crate::image::schema::{
    CoreEntry, March, RseqEntry, SeccompMode, ThreadCoreEntry, ThreadInfoX86,
};
use crate::image::{Kind, put_records};
use crate::memory::policy;
use crate::remote::{Outcome, Program};
use crate::sys::process::robust_list;
use crate::sys::ptrace;
use crate::task::status::Status;
use crate::task::{knobs, registers, signals};

const PR_GET_PDEATHSIG: i32 = 2;
const PR_GET_SECUREBITS: i32 = 27;
const PR_GET_TID_ADDRESS: i32 = 40;

impl Dump<'_> {
    /// Saves a thread; the leader's image is to be completed.
    pub(super) fn thread(
        &mut self,
        t: &Settled,
        workshop: &Workshop<'_>,
    ) -> Result<(CoreEntry, RcrThread), DumpError> {
        let tid = t.tid;
        // Before anything runs in the thread: calls of ours would change it.
        let xstate = ptrace::get_xstate(tid)?;

        let mut p = Program::new();
        let altstack = signals::query_altstack(&mut p);
        let mut word = |what: &str, option: i32| {
            let out = p.zeroed(8);
            p.call(
                libc::SYS_prctl,
                what,
                &[option.into(), out.into(), 0.into(), 0.into(), 0.into()],
            );
            out
        };
        let clear_tid = word("read the clear_child_tid address", PR_GET_TID_ADDRESS);
        let pdeath = word("read the parent death signal", PR_GET_PDEATHSIG);
        let zero = [
            PR_GET_SECUREBITS.into(),
            0.into(),
            0.into(),
            0.into(),
            0.into(),
        ];
        let secbits = p.call(libc::SYS_prctl, "read securebits", &zero);
        let asked = policy::query_thread(&mut p);
        let knobs_query = knobs::query(&mut p);
        let outcome = workshop.run_in(t, &p)?;

        let read_u64 = |o: &Outcome, r| u64::from_le_bytes(o.data(r).try_into().expect("8 bytes"));
        let facts = self.facts.remove(&tid).unwrap_or_else(|| {
            let gone = "it was not looked at when the tree stood still";
            Err(std::io::Error::other(gone))
        });
        let Facts {
            status,
            core: scheduling,
            ext: more,
            seen,
        } = facts.map_err(DumpError::io(format!("thread {tid}")))?;
        let creds = status
            .creds(outcome.result(secbits) as u32)
            .map_err(DumpError::io(format!("credentials of {tid}")))?;
        let (rla, rla_len) = robust_list(tid)?;
        let rseq = ptrace::rseq_configuration(tid)?;
        let mut ext = RcrThread {
            xstate,
            memory_policy: policy::answer(&outcome, asked),
            ..more
        };
        ext.knobs = Some(knobs::answers(&seen, &outcome, &knobs_query));
        ext.dispatch = t.saved.dispatch().copied();
        let mode = status.seccomp_mode();
        if mode == SeccompMode::Filter as i32 {
            ext.seccomp_chain = self.filters.save(tid)?;
        }
        let core = ThreadCoreEntry {
            futex_rla: rla,
            futex_rla_len: rla_len as u32,
            blk_sigset: Some(t.saved.sigmask()),
            sas: Some(signals::parse_altstack(&outcome, altstack)),
            pdeath_sig: Some(read_u64(&outcome, pdeath) as u32),
            signals_p: Some(signals::save_queue(tid, false)?),
            creds: Some(creds),
            seccomp_mode: Some(mode),
            seccomp_filter: ext.seccomp_chain.last().copied(),
            rseq_entry: (rseq.pointer != 0).then_some(RseqEntry {
                rseq_abi_pointer: rseq.pointer,
                rseq_abi_size: rseq.size,
                signature: rseq.signature,
                rseq_cs_pointer: None,
            }),
            cg_set: Some(1),
            ..scheduling
        };
        let mut regs = arch::restart_syscall(t.saved.regs());
        let sleepers = self.parent.map(|p| &p.tracking.sleepers);
        let since = sleepers.and_then(|s| s.since(tid, t.saved.regs()));
        ext.nap = self.naps.save(tid, t.saved.regs(), since);
        if let Some(nap) = &ext.nap {
            // The kernel may have called it restart_syscall(2).
            regs.rax = nap.call as u64;
        }
        let entry = CoreEntry {
            mtype: March::X8664 as i32,
            thread_info: Some(ThreadInfoX86 {
                clear_tid_addr: read_u64(&outcome, clear_tid),
                gpregs: registers::save(&regs),
                fpregs: registers::save_fp(&ext.xstate),
                tls: Vec::new(),
            }),
            thread_core: Some(core),
            ..CoreEntry::default()
        };
        Ok((entry, ext))
    }

    /// Writes a thread's images.
    pub(super) fn put_thread(
        &mut self,
        tid: i32,
        core: CoreEntry,
        ext: RcrThread,
    ) -> Result<(), DumpError> {
        let id = self.numbering.id(tid);
        let name = crate::image::names::core(id);
        put_records(self.sink, Kind::Core, &name, &[core])?;
        Ok(put_records(
            self.sink,
            Kind::RcrTasks,
            &ext::thread_image(id),
            &[ext],
        )?)
    }
}

/// What stands for an ended leader: the state of a living thread, without
/// what ends with a thread.
pub(super) fn dead_leader(
    pid: i32,
    core: &CoreEntry,
    ext: &RcrThread,
) -> Result<(CoreEntry, RcrThread), DumpError> {
    let status =
        Status::read_thread(pid, pid).map_err(DumpError::io(format!("status of {pid}")))?;
    let mut core = core.clone();
    if let Some(info) = &mut core.thread_info {
        info.clear_tid_addr = 0;
    }
    if let Some(t) = &mut core.thread_core {
        t.futex_rla_len = 0;
        t.rseq_entry = None;
        t.signals_p = None;
        t.comm = Some(status.get("Name").to_owned());
        t.blk_sigset = u64::from_str_radix(status.get("SigBlk"), 16).ok();
    }
    Ok((core, ext.clone()))
}
