//! One process, from newborn to complete.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::RestoreError;
use super::births::Birth;
use super::images::{Images, LiveImage, ProcessImage};
use super::memory::open_own_pidfd;
use super::worlds::{Worlds, join, take};
use crate::ext::RcrUndo;
use crate::file::{FileBuilder, spare_number};
use crate::image::schema::PosixTimerEntry;
use crate::remote::{OpId, Program, Tracee};
use crate::sys::process::{permitted_features, prctl_get};
use crate::sys::ptrace;
use crate::sys::text;
use crate::task::autogroup_nice;
use crate::task::{creds, limits, registers, sched, signals, timers};

const PR_SET_DUMPABLE: i32 = 4;
const PR_SET_CHILD_SUBREAPER: i32 = 36;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_SET_MDWE: i32 = 65;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
/// What the making of one process needs.
pub struct Step<'a, 'f> {
    pub images: &'a Images,
    pub worlds: &'a Worlds,
    pub files: &'a mut FileBuilder<'f>,
}

impl Step<'_, '_> {
    /// Makes the process complete; it stays stopped.
    pub fn process(
        &mut self,
        p: &ProcessImage,
        live: &LiveImage,
        birth: &Birth,
    ) -> Result<(), RestoreError> {
        let tracee = Tracee { tid: p.pid };
        let mut prog = Program::new();
        let pidfd = match live.owns.files {
            true => start(&mut prog, birth.pidfd),
            // It has the table of a process that has left us in it.
            false if self.images.pids.depth(p.pid) > 0 => {
                let args = [
                    (spare_number(&live.fdinfo) as i32).into(),
                    libc::F_DUPFD_CLOEXEC.into(),
                    0.into(),
                ];
                prog.call(libc::SYS_fcntl, "find the pidfd of the restorer", &args)
            }
            false => open_own_pidfd(&mut prog),
        };
        self.worlds.enter_time(&mut prog, pidfd, &p.ext);
        if p.ext.time_for_children.is_some() {
            let kind = crate::sys::process::CLONE_NEWTIME;
            let what = "give children another time namespace";
            prog.call(libc::SYS_unshare, what, &[kind.into()]);
        }
        self.worlds.enter(&mut prog, pidfd, &live.ids);
        if live.owns.fs {
            self.directories(&mut prog, pidfd, live)?;
        }
        let mut placed = pidfd;
        if live.owns.files {
            let spare = spare_number(&live.fdinfo) as i32;
            let args = [pidfd.into(), spare.into(), libc::O_CLOEXEC.into()];
            placed = prog.call(libc::SYS_dup3, "set our pidfd aside", &args);
            prog.call(libc::SYS_close, "close its old number", &[pidfd.into()]);
            self.place(&mut prog, placed, spare, &live.fdinfo)?;
        }
        self.files.late(p.id, &live.fdinfo, &mut prog)?;
        undo(&mut prog, &p.ext.undo);
        self.state(&mut prog, p, live);
        if p.ext.mdwe != 0 {
            let forbidden = p.ext.mdwe as i32;
            set(
                &mut prog,
                "forbid gaining executable memory",
                PR_SET_MDWE,
                forbidden,
            );
        }
        let of_children = self.children_namespace(&mut prog, placed, p)?;
        creds::restore_ids(&mut prog, leader(live)?);
        if let Some(user) = self.worlds.user(&live.ids) {
            let fd = user.ns().as_raw_fd();
            join(
                &mut prog,
                placed,
                fd,
                libc::CLONE_NEWUSER,
                "enter the user namespace",
            );
        }
        match self.pidfd_is_needed(p, live) {
            Some(true) if live.owns.files => {}
            Some(needed) => {
                let spare = spare_number(&live.fdinfo) as i32;
                prog.call(libc::SYS_close, "close our pidfd", &[placed.into()]);
                if !needed && !live.owns.files {
                    prog.call(libc::SYS_close, "close the last pidfd", &[spare.into()]);
                }
            }
            None => {
                prog.call(libc::SYS_close, "close our pidfd", &[placed.into()]);
            }
        }
        tracee.run(birth.arena, &prog)?;
        drop(of_children);

        self.threads(p, live, birth)?;
        let pids = &self.images.pids;
        self.files.rings(p.id, &live.fdinfo, |tid, program| {
            let tid = pids.here(tid);
            Tracee { tid }.run(birth.arena, program)?;
            Ok::<_, RestoreError>(())
        })?;
        let mut prog = Program::new();
        self.files.last(p.id, &live.fdinfo, &mut prog);
        if let Some(queue) = &live.tc.signals_s {
            let me = self.images.pids.seen(p.pid, p.pid);
            signals::restore_queue(&mut prog, me, None, queue);
        }
        if let Some(t) = &live.tc.timers {
            tracee.run(birth.arena, &std::mem::take(&mut prog))?;
            // Some are to signal a thread, which has to be there.
            let asked = kernel_gives_timer_ids();
            let pids = &self.images.pids;
            let here = |t: &PosixTimerEntry| PosixTimerEntry {
                notify_thread_id: t.notify_thread_id.map(|tid| pids.here(tid)),
                ..*t
            };
            let posix: Vec<_> = t.posix.iter().map(here).collect();
            let seen = |tid: i32| pids.seen(p.pid, tid);
            for (tid, program) in timers::restore_posix(p.pid, &posix, asked, seen) {
                Tracee { tid }.run(birth.arena, &program)?;
            }
            timers::restore_interval(&mut prog, t);
        }
        if p.ext.timer_ids {
            set(
                &mut prog,
                "choose timer ids",
                timers::PR_TIMER_CREATE_RESTORE_IDS,
                1,
            );
        }
        // 2 (readable by root alone) is what the change of ids has left.
        if let Some(d @ (0 | 1)) = live.mm.dumpable {
            set(&mut prog, "set dumpable", PR_SET_DUMPABLE, d);
        }
        tracee.run(birth.arena, &prog)?;
        self.outer_state(p, live)
    }

    /// Whether others that share the descriptor table of a process below our
    /// PID namespace need our pidfd in it later on. `None`: nobody shares it.
    fn pidfd_is_needed(&self, p: &ProcessImage, live: &LiveImage) -> Option<bool> {
        if self.images.pids.depth(p.pid) == 0 {
            return None;
        }
        let shares = |l: &LiveImage| l.ids.files_id == live.ids.files_id;
        let sharers: Vec<i32> = self
            .images
            .live()
            .filter(|(_, l)| shares(l))
            .map(|(q, _)| q.pid)
            .collect();
        (sharers.len() > 1).then(|| sharers.last() != Some(&p.pid))
    }

    /// Its children are to be born into another PID namespace than its own.
    /// What is returned has to live until the program has run.
    fn children_namespace(
        &self,
        prog: &mut Program,
        pidfd: OpId,
        p: &ProcessImage,
    ) -> Result<Option<File>, RestoreError> {
        let what = "have children in another PID namespace";
        match p.ext.pid_ns_of_children {
            None => Ok(None),
            Some(0) => {
                prog.call(libc::SYS_unshare, what, &[libc::CLONE_NEWPID.into()]);
                Ok(None)
            }
            Some(init) => {
                let ns = super::worlds::pid_ns(self.images.pids.here(init))?;
                join(prog, pidfd, ns.as_raw_fd(), libc::CLONE_NEWPID, what);
                Ok(Some(ns))
            }
        }
    }

    /// Root, working directory, umask.
    fn directories(
        &mut self,
        p: &mut Program,
        pidfd: OpId,
        live: &LiveImage,
    ) -> Result<(), RestoreError> {
        let dot = p.cstr(b".");
        let mut go = |p: &mut Program, id: u32, what: &str| -> Result<(), RestoreError> {
            let fd = self.files.open(id)?.as_raw_fd();
            let op = take(p, pidfd, fd);
            p.call(libc::SYS_fchdir, what, &[op.into()]);
            p.call(libc::SYS_close, "close the directory", &[op.into()]);
            Ok(())
        };
        go(p, live.fs.root_id, "go to the root directory")?;
        p.call(libc::SYS_chroot, "make it the root", &[dot.into()]);
        go(p, live.fs.cwd_id, "go to the working directory")?;
        let umask = u64::from(live.fs.umask.unwrap_or(0o022));
        p.call(libc::SYS_umask, "set umask", &[umask.into()]);
        Ok(())
    }

    /// What a process has once, while it is still root.
    fn state(&self, p: &mut Program, task: &ProcessImage, live: &LiveImage) {
        let tc = &live.tc;
        p.call(
            libc::SYS_personality,
            "set personality",
            &[u64::from(tc.personality).into()],
        );
        if live.owns.actions {
            signals::restore_actions(p, &tc.sigactions);
        }
        set(
            p,
            "set child subreaper",
            PR_SET_CHILD_SUBREAPER,
            tc.child_subreaper == Some(true),
        );
        let flags = task.ext.thp_disabled & !1;
        let disabled = live.mm.thp_disabled == Some(true);
        let args = [
            PR_SET_THP_DISABLE.into(),
            i32::from(disabled).into(),
            u64::from(flags).into(),
            0.into(),
            0.into(),
        ];
        p.call(libc::SYS_prctl, "set THP disable", &args);
        let permitted = task.ext.xstate_permitted & !own_permitted_features();
        for feature in (0..63).filter(|f| permitted >> f & 1 == 1) {
            let args = [ARCH_REQ_XCOMP_PERM.into(), feature.into()];
            let what = format!("ask for processor feature {feature}");
            p.call(libc::SYS_arch_prctl, what, &args);
        }
        let mask = tc.membarrier_registration_mask.unwrap_or(0);
        for bit in (0..31).map(|b| 1 << b).filter(|b| mask & b != 0) {
            let args = [u64::from(bit).into(), 0.into(), 0.into()];
            p.call(libc::SYS_membarrier, "register for membarrier", &args);
        }
        if let Some(l) = &tc.rlimits {
            limits::restore(p, l);
        }
    }

    /// What can be set without the process's help.
    fn outer_state(&self, p: &ProcessImage, live: &LiveImage) -> Result<(), RestoreError> {
        for t in &live.threads {
            let len = ptrace::get_xstate(t.tid)?.len();
            let area = registers::fit_xstate(&t.ext.xstate, len).ok_or_else(|| {
                let what = "uses processor features that this kernel does not enable".into();
                RestoreError::Tree { pid: t.tid, what }
            })?;
            ptrace::set_xstate(t.tid, &area)?;
            sched::restore(t.tid, &t.core, &t.ext)
                .map_err(RestoreError::io(format!("scheduling of thread {}", t.tid)))?;
        }
        let write = |file: &str, value: String| {
            let path = format!("/proc/{}/{file}", p.pid);
            match text::read_string(&path) {
                Ok(now) if now.trim() == value => Ok(()),
                _ => std::fs::write(&path, value).map_err(RestoreError::io(path)),
            }
        };
        if let Some(time) = &p.ext.time_for_children {
            let base = self.images.offsets().map_err(RestoreError::io("clocks"))?;
            let path = format!("/proc/{}/timens_offsets", p.pid);
            let text = base.shifted(time).to_text();
            std::fs::write(&path, text).map_err(RestoreError::io(path))?;
        }
        // Sessions bring groups of their own, with nothing set.
        if let Some(nice) = p.ext.autogroup_nice
            && autogroup_nice(p.pid).is_some_and(|now| now != nice)
        {
            let path = format!("/proc/{}/autogroup", p.pid);
            std::fs::write(&path, nice.to_string()).map_err(RestoreError::io(path))?;
        }
        if let Some(v) = live.tc.oom_score_adj {
            write("oom_score_adj", v.to_string())?;
        }
        if let Some(v) = p.ext.coredump_filter {
            // It shows hexadecimal digits and takes those of C.
            write("coredump_filter", format!("{v:#x}"))?;
        }
        Ok(())
    }

    /// Children of this process that had ended end again.
    pub fn zombies_of(&mut self, p: &ProcessImage, birth: &Birth) -> Result<(), RestoreError> {
        let zombies = |q: &&ProcessImage| q.live.is_none() && q.ppid == p.pid;
        let mut any = false;
        for z in self.images.processes.iter().filter(zombies) {
            super::threads::end_again(z.pid, z.ext.exit_status, birth)?;
            any = true;
        }
        if any {
            let mut prog = Program::new();
            signals::forget_child_signal(&mut prog);
            Tracee { tid: p.pid }.run(birth.arena, &prog)?;
        }
        Ok(())
    }
}

/// Adds the calls that empty the descriptor table but for the pidfd of ours
/// that the process has as number `at`. It is 0 afterwards.
fn start(p: &mut Program, at: i32) -> OpId {
    let args = [at.into(), 0.into()];
    let pidfd = p.call(libc::SYS_dup2, "keep the pidfd of the restorer", &args);
    let all = u64::from(u32::MAX);
    let args = [1.into(), all.into(), 0.into()];
    p.call(libc::SYS_close_range, "close everything else", &args);
    pidfd
}

fn leader(live: &LiveImage) -> Result<&crate::image::schema::CredsEntry, RestoreError> {
    let t = &live.threads[0];
    t.core.creds.as_ref().ok_or_else(|| RestoreError::Tree {
        pid: t.tid,
        what: "the images hold no credentials".into(),
    })
}

fn set(p: &mut Program, what: &str, option: i32, value: impl Into<i32>) {
    let args = [
        option.into(),
        value.into().into(),
        0.into(),
        0.into(),
        0.into(),
    ];
    p.call(libc::SYS_prctl, what, &args);
}

/// Has the kernel undo things at the process's end, in its IPC namespace: each
/// semaphore is changed and changed back in one call, which never waits.
fn undo(p: &mut Program, sets: &[RcrUndo]) {
    for set in sets {
        for (n, &value) in set.values.iter().enumerate().filter(|(_, v)| **v != 0) {
            // struct sembuf; what is added first cannot have to wait.
            let up = if value > 0 { 0 } else { libc::SEM_UNDO };
            let by = value.unsigned_abs() as i16;
            let one = |by: i16, flags: i32| {
                [
                    (n as u16).to_ne_bytes(),
                    by.to_ne_bytes(),
                    (flags as i16).to_ne_bytes(),
                ]
                .concat()
            };
            let both = [one(by, up), one(-by, libc::SEM_UNDO - up)].concat();
            let both = p.bytes(&both);
            let args = [set.id.into(), both.into(), 2.into()];
            let what = format!("undo semaphore {n} of set {} at the end", set.id);
            p.call(libc::SYS_semop, what, &args);
        }
    }
}

/// `PR_TIMER_CREATE_RESTORE_IDS` exists from Linux 6.15.
fn kernel_gives_timer_ids() -> bool {
    const GET: i32 = 2;
    prctl_get(timers::PR_TIMER_CREATE_RESTORE_IDS, GET).is_ok()
}

/// Features with a large state that any process may use here: our own, as
/// those of the newborn.
fn own_permitted_features() -> u64 {
    permitted_features().unwrap_or(0)
}
