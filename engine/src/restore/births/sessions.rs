//! Sessions, their terminals, and process groups.

use std::os::fd::AsRawFd;
use std::path::Path;

use super::{Nursery, wait_for_pid};
use crate::remote::Program;
use crate::restore::RestoreError;
use crate::restore::images::ProcessImage;
use crate::restore::worlds::take;

impl Nursery<'_, '_, '_> {
    /// How a session of the dump is called while births go on: one that lives
    /// outside of the tree is replaced by ours.
    pub(super) fn called_here(&self, sid: i32) -> i32 {
        let inside = self.images.has(sid) || self.made.ghosts.contains(&sid);
        match !inside && lives_outside(sid) {
            true => getsid(0).unwrap_or(sid),
            false => sid,
        }
    }

    /// The session with an ended leader that a root of the tree left behind
    /// after it had children in it.
    pub(super) fn former_session(&self, p: &ProcessImage) -> Option<i32> {
        let reaper = p.live.as_ref().and_then(|l| l.tc.child_subreaper);
        if reaper == Some(true) || self.images.pids.is_init(p.pid) {
            // They may as well be orphans.
            return None;
        }
        self.needs(p)
            .find(|&s| !self.images.has(s) && self.called_here(s) == s)
    }

    /// A leader that had ended: something has to hold its session's id while
    /// the members are made.
    pub(super) fn ghost_leader(&mut self, sid: i32, cgroup: &str) -> Result<(), RestoreError> {
        wait_for_pid(sid)?;
        self.spawn(sid, cgroup)?;
        self.made.ghosts.push(sid);
        let mut prog = Program::new();
        prog.call(libc::SYS_setsid, "stand in for a session leader", &[]);
        self.run(sid, &prog)
    }

    pub(super) fn become_leader(&mut self, pid: i32) -> Result<(), RestoreError> {
        let mut prog = Program::new();
        prog.call(libc::SYS_setsid, "become a session leader", &[]);
        self.run(pid, &prog)?;
        self.terminal(pid, |_| Some((libc::TIOCSCTTY as i32, 0)))
    }

    /// What the leader of a session has its terminal do, if it has one:
    /// request and argument, from the foreground process group.
    fn terminal(
        &mut self,
        sid: i32,
        request: impl FnOnce(i32) -> Option<(i32, i32)>,
    ) -> Result<(), RestoreError> {
        let files = &mut *self.memory.files;
        let Some((id, group)) = files.controlling(sid) else {
            return Ok(());
        };
        let Some((request, value)) = request(group) else {
            return Ok(());
        };
        let ours = files.open(id)?.as_raw_fd();
        let mut prog = Program::new();
        let fd = take(&mut prog, self.birth.pidfd, ours);
        let mut args = vec![fd.into(), request.into()];
        match request as u64 {
            libc::TIOCSPGRP => args.push(prog.bytes(&value.to_ne_bytes()).into()),
            _ => args.push(value.into()),
        }
        prog.call(libc::SYS_ioctl, format!("terminal of session {sid}"), &args);
        prog.call(libc::SYS_close, "close the terminal", &[fd.into()]);
        self.run(sid, &prog)
    }

    /// Puts process groups into the foreground of their terminals.
    pub(super) fn foreground(&mut self) -> Result<(), RestoreError> {
        let images = self.images;
        for p in images.processes.iter().filter(|p| p.sid == p.pid) {
            // One that has ended is in nobody's foreground.
            let lives = |g: i32| images.processes.iter().any(|q| q.pgid == g);
            let seen = |g| images.pids.seen(p.pid, g);
            let request = |g| lives(g).then(|| (libc::TIOCSPGRP as i32, seen(g)));
            if p.live.is_some() {
                self.terminal(p.pid, request)?;
            }
        }
        Ok(())
    }

    /// Process groups, their leaders first.
    pub(super) fn groups(&self) -> Result<(), RestoreError> {
        let mut order: Vec<&ProcessImage> = self
            .images
            .processes
            .iter()
            .filter(|p| p.sid != p.pid)
            .collect();
        order.sort_by_key(|p| p.pgid != p.pid);
        for p in order {
            if getpgid(p.pid)? == p.pgid {
                continue;
            }
            // A group outside of the tree lives on without this process.
            if !self.images.has(p.pgid) && !self.made.ghosts.contains(&p.pgid) {
                continue;
            }
            let mut prog = Program::new();
            let group = self.images.pids.seen(p.pid, p.pgid);
            let args = [0.into(), group.into()];
            prog.call(
                libc::SYS_setpgid,
                format!("join process group {}", p.pgid),
                &args,
            );
            self.run(p.pid, &prog)?;
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), RestoreError> {
        for p in &self.images.processes {
            let sid = getsid(p.pid)?;
            let inside = self.images.has(p.sid)
                || self.made.ghosts.contains(&p.sid)
                || !lives_outside(p.sid);
            if inside && sid != p.sid {
                let what = format!("is in session {sid} instead of {}", p.sid);
                return Err(RestoreError::Tree { pid: p.pid, what });
            }
        }
        Ok(())
    }
}

pub(super) fn getsid(pid: i32) -> Result<i32, RestoreError> {
    let sid = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid)));
    Ok(sid
        .map_err(|e| RestoreError::io("getsid")(e.into()))?
        .as_raw())
}

/// Whether a session is none of the tree's. 0 stands for one that the tree's
/// PID namespace does not know.
pub(super) fn lives_outside(sid: i32) -> bool {
    sid == 0 || Path::new(&format!("/proc/{sid}")).exists()
}

fn getpgid(pid: i32) -> Result<i32, RestoreError> {
    let pgid = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid)));
    Ok(pgid
        .map_err(|e| RestoreError::io("getpgid")(e.into()))?
        .as_raw())
}
