//! One process, from newborn to complete.

use std::os::fd::AsRawFd;

use super::RestoreError;
use super::births::Birth;
use super::images::{Images, LiveImage, ProcessImage};
use super::memory::{open_own_pidfd, start};
use super::worlds::{Worlds, join, take};
use crate::file::FileBuilder;
use crate::remote::{OpId, Program, Tracee};
use crate::sys::process::{permitted_features, prctl_get};
use crate::sys::ptrace;
use crate::task::autogroup_nice;
use crate::task::{creds, limits, registers, sched, signals, timers};

const PR_SET_DUMPABLE: i32 = 4;
const PR_SET_CHILD_SUBREAPER: i32 = 36;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_SET_MDWE: i32 = 65;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
/// Where our pidfd sits in a process's table while descriptors are placed: a
/// number no descriptor of the process has.
fn spare_number(live: &LiveImage) -> i32 {
    let taken: std::collections::BTreeSet<u32> = live.fdinfo.iter().map(|e| e.fd).collect();
    // Not 0: there it is opened.
    let free = (1..).find(|n| !taken.contains(n));
    free.map_or(1, |n| n as i32)
}

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
            true => start(&mut prog),
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
            let spare = spare_number(live);
            let args = [pidfd.into(), spare.into(), libc::O_CLOEXEC.into()];
            placed = prog.call(libc::SYS_dup3, "set our pidfd aside", &args);
            prog.call(libc::SYS_close, "close its old number", &[pidfd.into()]);
            self.place(&mut prog, placed, spare, &live.fdinfo)?;
        }
        self.files.late(p.pid, &live.fdinfo, &mut prog)?;
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
        prog.call(libc::SYS_close, "close our pidfd", &[placed.into()]);
        tracee.run(birth.arena, &prog)?;

        self.threads(p, live, birth)?;
        let mut prog = Program::new();
        self.files.last(p.pid, &live.fdinfo, &mut prog);
        if let Some(queue) = &live.tc.signals_s {
            signals::restore_queue(&mut prog, p.pid, None, queue);
        }
        if let Some(t) = &live.tc.timers {
            tracee.run(birth.arena, &std::mem::take(&mut prog))?;
            // Some are to signal a thread, which has to be there.
            let asked = kernel_gives_timer_ids();
            for (tid, program) in timers::restore_posix(p.pid, &t.posix, asked) {
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
            match std::fs::read_to_string(&path) {
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

/// Adds the call that opens a pidfd of this process.
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
