//! What is known only when every file has been seen.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::super::error::{Stop, refuse};
use super::super::examined::Found;
use super::super::identity::Held;
use super::super::{epoll, late, mqueue, nsfd};
use super::{FileError, FileSaver};
use crate::socket::{tcp, unix};
use crate::task::status::Status;

impl FileSaver {
    /// Completes what needs the whole picture: what epoll watches, the other
    /// ends of pipes and sockets, buffered data. Call it once, after the last
    /// file was saved.
    pub fn settle(&mut self) -> Result<(), FileError> {
        let mut refusals = self.save_under_way()?;
        self.settle_late_slots();
        let live = !self.policy.payload;

        let job = self.policy.shell_job;
        let terminals = &mut self.terminals;
        refusals.extend(terminals.settle(&mut self.files, &self.descriptions, !live, job)?);
        if !job {
            self.terminals_elsewhere();
        }
        let descriptions = &self.descriptions;
        let held = |id| descriptions.get(id).map(|h| h.fd.as_fd());
        let (first, allowed) = (self.first, self.policy.stdio_outside);
        let given = |id| {
            let slots = descriptions.get(id).map_or(&[][..], |h| &h.slots);
            allowed && slots.iter().any(|s| Some(s.pid) == first && s.fd <= 2)
        };
        refusals.extend(self.pipes.settle(held, given, !live)?);
        let outside: BTreeSet<u32> = self.pipes.outside().collect();
        for saved in self.files.values_mut() {
            let pipe = saved.entry.pipe.as_ref();
            if pipe.is_some_and(|p| outside.contains(&p.pipe_id)) {
                saved.extra.outside = Some(true);
            }
        }
        for (id, lengths) in self.pipes.packets() {
            if let Some(saved) = self.files.get_mut(&id) {
                saved.extra.packets = lengths.to_vec();
            }
        }
        let rules = unix::Rules {
            unix: self.policy.unix,
            live,
        };
        refusals.extend(unix::settle(
            &mut self.files,
            descriptions,
            &mut self.unix,
            &rules,
        )?);
        tcp::drop_unaccepted(&mut self.files, &self.policy);
        if !live {
            let (stops, streams, held) = tcp::settle(&self.files, descriptions)?;
            refusals.extend(stops);
            (self.streams, self.connections) = (streams, held);
        }
        for saved in self.files.values_mut().filter(|s| s.entry.epfd.is_some()) {
            match epoll::settle(saved, descriptions, live)? {
                Ok(targets) => saved.extra.epoll_targets = targets,
                Err(stop) => refusals.push((saved.entry.id, stop)),
            }
        }
        let holders: Vec<_> = self.holders.values().map(|h| (h.pid, h.voice)).collect();
        let window = self.window.as_ref();
        let pids: Vec<i32> = holders.iter().map(|h| h.0).collect();
        let (files, held) = (&mut self.files, &self.descriptions);
        let rings = self.rings.settle(window, files, held, &holders);
        let mut queues = || mqueue::settle(files, held, window, &pids);
        match rings.and_then(|r| Ok((r, queues()?))) {
            Ok((of_rings, of_queues)) => {
                refusals.extend(of_rings);
                refusals.extend(of_queues);
            }
            // Processes come and go.
            Err(e) if live => tracing::debug!("looking into the kernel: {e}"),
            Err(e) => return Err(e.into()),
        }
        refusals.extend(self.locks.settle(&mut self.files));
        refusals.extend(self.owners_outside());
        refusals.extend(self.watched_nameless());
        refusals.extend(self.pidfd_targets());
        refusals.extend(self.proc_targets());
        for (id, saved) in &mut self.files {
            if let Err(stop) = nsfd::settle(saved, self.pids.iter().copied()) {
                refusals.push((*id, stop));
            }
        }
        for (id, stop) in refusals {
            let Some(found) = self.files.get(&id).map(|s| s.found.clone()) else {
                continue;
            };
            match stop {
                Stop::Refuse {
                    kind,
                    reason,
                    advice,
                } => self.refuse(&found, &kind, reason, advice),
                Stop::Sys(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Whoever was found first holding a file does what only a holder can.
    fn settle_late_slots(&mut self) {
        for (id, saved) in &mut self.files {
            let slot = self.descriptions.get(*id).and_then(|h| h.slots.first());
            if let Some(slot) = slot {
                saved.extra.late_pid = Some(slot.pid);
                saved.extra.late_fd = Some(slot.fd);
            }
        }
    }

    /// Processes of sessions of the tree that a terminal controls which does
    /// not come along.
    fn terminals_elsewhere(&mut self) {
        let tasks: Vec<_> = self.holders.values().map(|h| (h.pid, h.voice)).collect();
        let refused: Vec<u32> = (self.refusals.iter().map(|r| r.pid as u32)).collect();
        for (pid, device) in self.terminals.uncarried(tasks.into_iter(), &self.pids) {
            if refused.contains(&(pid as u32)) {
                continue;
            }
            let found = Found {
                pid,
                comm: self.holders[&pid].comm.clone(),
                object: "controlling terminal".into(),
                inode: (0, 0),
            };
            let reason = format!("the terminal {device} is held by no process of the service");
            let advice = "run the service without a terminal, or untag the unit";
            self.refuse(&found, "terminal", reason, advice.into());
        }
    }

    /// Files whose SIGIO goes to a process that does not come along.
    fn owners_outside(&self) -> Vec<(u32, Stop)> {
        const OF_PROCESS: u32 = 1;
        let mut refusals = Vec::new();
        for saved in self.files.values() {
            let Some((fown, _)) = late::owner_of(&saved.entry, &saved.extra) else {
                continue;
            };
            let inside = fown.pid == 0 || self.pids.contains(&(fown.pid as i32));
            if fown.pid_type == OF_PROCESS && !inside {
                let reason = format!("its signals go to process {} outside the service", fown.pid);
                let stop = refuse::<()>("file with a signal owner", reason, "untag the unit");
                refusals.extend(stop.err().map(|s| (saved.entry.id, s)));
            }
        }
        refusals
    }

    /// Watched inodes that no name leads to have to be among the files.
    fn watched_nameless(&mut self) -> Vec<(u32, Stop)> {
        let mut refusals = Vec::new();
        for (id, nameless) in std::mem::take(&mut self.nameless) {
            for (i, inode) in nameless {
                let carried = |h: &&Held| self.files.contains_key(&h.id);
                let found = self.descriptions.of_inode(inode).find(carried);
                match (found.map(|h| h.id), self.files.get_mut(&id)) {
                    (Some(target), Some(saved)) => {
                        saved.extra.watched[i].file = Some(target);
                    }
                    (None, Some(saved)) => {
                        let reason = format!(
                            "it watches a file without a name (inode {}) that no process of the service holds",
                            inode.1
                        );
                        let kind = format!("{:?}", saved.entry.r#type()).to_lowercase();
                        let stop = refuse::<()>(kind, reason, "restart the service");
                        refusals.extend(stop.err().map(|s| (id, s)));
                    }
                    _ => {}
                }
            }
        }
        refusals
    }

    /// Processes whose files in `/proc` are open have to come along.
    fn proc_targets(&self) -> Vec<(u32, Stop)> {
        let mut refusals = Vec::new();
        for (id, saved) in &self.files {
            let Some(reg) = saved.entry.reg.as_ref() else {
                continue;
            };
            let rest = reg.name.strip_prefix("/proc/");
            let Some(rest) = rest.filter(|_| !self.ghosts.has(*id)) else {
                continue;
            };
            let mut parts = rest.split('/');
            let Some(pid) = parts.next().and_then(|p| p.parse::<i32>().ok()) else {
                continue;
            };
            let thread = parts.next() == Some("task");
            let thread: Option<i32> = parts.next().filter(|_| thread).and_then(|t| t.parse().ok());
            let reason = match thread {
                _ if pid != 1 && !self.pids.contains(&pid) => {
                    format!("{} is of a process outside the service", reg.name)
                }
                Some(tid) if tid != pid => {
                    format!(
                        "{} is of a thread that is not its process's first",
                        reg.name
                    )
                }
                _ => continue,
            };
            let stop = refuse::<()>("file in /proc", reason, "restart the service");
            refusals.extend(stop.err().map(|s| (*id, s)));
        }
        refusals
    }

    /// Processes that pidfds stand for have to come along.
    fn pidfd_targets(&mut self) -> Vec<(u32, Stop)> {
        let mut refusals = Vec::new();
        for saved in self.files.values_mut() {
            let Some(target) = &mut saved.extra.pidfd else {
                continue;
            };
            let Some(pid) = target.pid.filter(|p| !self.pids.contains(p)) else {
                continue;
            };
            let status = Status::read(pid).ok();
            let process: Option<u64> = status.and_then(|s| s.get("Tgid").parse().ok());
            let holders = self.descriptions.get(saved.entry.id).map(|h| &h.slots[..]);
            let holders = holders.unwrap_or_default();
            let own = |p: u64| holders.iter().all(|s| s.pid as u64 == p);
            let reason = match process {
                Some(p) if pid != 0 && own(p) => {
                    target.thread = Some(true);
                    continue;
                }
                Some(p) if self.pids.contains(&(p as i32)) => {
                    format!("it stands for thread {pid} of another process ({p})")
                }
                _ if pid == 0 => "its process is in a namespace that is out of sight".into(),
                _ => format!("it stands for process {pid} outside the service"),
            };
            let stop = refuse::<()>(
                "pidfd",
                reason,
                "tag both services as one, or untag the unit",
            );
            refusals.extend(stop.err().map(|s| (saved.entry.id, s)));
        }
        refusals
    }
}
