//! Processes come to life: wanted pids, parents, sessions and groups.
//!
//! A process is born stopped, with a mapping of ours at an address that is free
//! both in our layout and in those of all processes of the dump.

mod sessions;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::images::{Images, ProcessImage};
use super::memory::Memory;
use super::worlds::Worlds;
use super::{RestoreError, RestoreOptions};
use crate::arch;
use crate::freeze::kill_and_reap;
use crate::memory::layout::find_gap;
use crate::memory::vdso::Vdso;
use crate::memory::{MemoryError, maps};
use crate::remote::{Arena, Halt, Program, Tracee, find_syscall};
use crate::sys::process::{CloneArgs, pidfd_open, spawn_waiting};
use crate::sys::ptrace::{self, Stop};
use crate::task::signals;

use sessions::{getsid, lives_outside};

/// Room for our programs: the largest hold a service's seccomp filters.
const ARENA_BYTES: u64 = 2 << 20;
/// Between our mapping and the parked vDSO.
const SPACING: u64 = 64 << 10;
/// A transient program may sit on a pid for a moment.
const PID_PATIENCE: Duration = Duration::from_secs(3);

/// Everything that was made so far; dropping it kills all of it.
#[derive(Debug, Default)]
pub struct Made {
    pids: Vec<i32>,
    /// Stand-ins for dead session leaders.
    ghosts: Vec<i32>,
    released: bool,
}

impl Made {
    /// Notes a process.
    fn add(&mut self, pid: i32) {
        self.pids.push(pid);
    }

    /// The tree is complete: only the stand-ins go.
    pub fn release(&mut self) {
        self.released = true;
        kill_and_reap(&self.ghosts);
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.released {
            kill_and_reap(&self.pids);
            kill_and_reap(&self.ghosts);
        }
    }
}

/// How a newborn process can be worked with.
#[derive(Debug, Clone)]
pub struct Birth {
    /// Our mapping in it.
    pub arena: Arena,
    /// Where its vDSO is.
    pub vdso: Vdso,
    /// Where its vDSO can go for good.
    pub park: u64,
    /// The process whose restored memory it was born with; `None`: ours.
    pub space: Option<i32>,
    /// The number under which it has a pidfd of ours, from its birth on: where
    /// we cannot be named by an id, there is no other way to us.
    pub pidfd: i32,
}

/// Makes all processes, parents first.
pub fn bear(
    images: &Images,
    options: &RestoreOptions,
    made: &mut Made,
    memory: &mut Memory<'_, '_>,
    worlds: &Worlds,
) -> Result<BTreeMap<i32, Birth>, RestoreError> {
    let me = std::process::id() as i32;
    // Every process is a fork of ours and inherits it.
    let pidfd = pidfd_open(me)?;
    let own = maps::read_ranges(me).map_err(RestoreError::io("own mappings"))?;
    let vdso = Vdso::find(&own).ok_or(MemoryError::Vdso("this process has none".into()))?;
    let mut taken: Vec<Range<u64>> = own.iter().map(|v| v.start..v.end).collect();
    for (_, live) in images.live() {
        taken.extend(live.mm.vmas.iter().map(|e| e.start..e.end));
    }
    let len = ARENA_BYTES + SPACING + (vdso.span().end - vdso.span().start);
    let seed = crate::sys::process::clock_ns(libc::CLOCK_MONOTONIC) as u64;
    let base = find_gap(&taken, len, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16)
        .ok_or(MemoryError::NoRoom(len))?;
    let birth = Birth {
        arena: Arena {
            base,
            len: ARENA_BYTES,
        },
        vdso,
        park: base + ARENA_BYTES + SPACING,
        space: None,
        pidfd: pidfd.as_raw_fd(),
    };

    let mut nursery = Nursery {
        images,
        options,
        made,
        memory,
        birth,
        lifeline: pidfd.as_fd(),
        born: BTreeMap::new(),
        inner_ghosts: Vec::new(),
        kept: RefCell::default(),
    };
    for p in &images.processes {
        nursery.bear(p)?;
        if let Some(live) = &p.live {
            worlds.enter_ipc(p.pid, live, &nursery.birth)?;
            worlds.enter_cgroup(p.pid, live, &nursery.birth)?;
        }
    }
    nursery.groups()?;
    nursery.foreground()?;
    nursery.end_inner_ghosts()?;
    nursery.check()?;
    Ok(nursery.born)
}

struct Nursery<'a, 'm, 'f> {
    images: &'a Images,
    options: &'a RestoreOptions,
    made: &'a mut Made,
    memory: &'a mut Memory<'m, 'f>,
    birth: Birth,
    /// A pidfd of ours.
    lifeline: BorrowedFd<'a>,
    born: BTreeMap<i32, Birth>,
    /// Stand-ins for dead session leaders that are children of the tree:
    /// parent and session.
    inner_ghosts: Vec<(i32, i32)>,
    /// Descriptors that programs take.
    kept: RefCell<Vec<File>>,
}

impl Nursery<'_, '_, '_> {
    fn bear(&mut self, p: &ProcessImage) -> Result<(), RestoreError> {
        if self.born.contains_key(&p.pid) {
            return Ok(());
        }
        wait_for_pid(p.pid)?;
        if self.images.has(p.ppid) {
            self.child(p)?;
        } else if let Some(brother) = self.sharing_brother(p) {
            self.fork(brother, p, libc::CLONE_PARENT as u64)?;
        } else if p.sid == p.pid {
            match self.former_session(p) {
                Some(sid) => {
                    if !self.made.ghosts.contains(&sid) {
                        self.ghost_leader(sid, &p.ext.cgroup)?;
                    }
                    self.fork(sid, p, libc::CLONE_PARENT as u64)?;
                }
                None => self.root(p.pid, &p.ext.cgroup)?,
            }
        } else if self.images.has(p.sid) {
            // A brother of its session's leader.
            self.fork(p.sid, p, libc::CLONE_PARENT as u64)?;
        } else if lives_outside(p.sid) {
            // Its session lives on outside of the tree: it gets ours.
            self.root(p.pid, &p.ext.cgroup)?;
        } else {
            if !self.made.ghosts.contains(&p.sid) {
                self.ghost_leader(p.sid, &p.ext.cgroup)?;
            }
            self.fork(p.sid, p, libc::CLONE_PARENT as u64)?;
        }
        self.move_to_cgroup(p)?;
        let birth = &self.birth;
        self.born.entry(p.pid).or_insert_with(|| birth.clone());
        if p.sid == p.pid {
            // Children from before stay in the session it was in before.
            let before = getsid(p.pid)?;
            let images = self.images;
            for c in images.processes.iter().filter(|c| c.ppid == p.pid) {
                if self.needs(c).any(|s| self.called_here(s) == before) {
                    self.bear(c)?;
                }
            }
            self.become_leader(p.pid)?;
        }
        Ok(())
    }

    /// The sessions a process or its descendants have to be born in.
    fn needs(&self, p: &ProcessImage) -> std::vec::IntoIter<i32> {
        let mut out = Vec::new();
        if p.sid == p.pid {
            let children = self.images.processes.iter();
            for c in children.filter(|c| c.ppid == p.pid) {
                out.extend(self.needs(c).filter(|&s| s != p.pid));
            }
        } else {
            out.push(p.sid);
        }
        out.into_iter()
    }

    /// A brother that has the kernel objects which a process does not have
    /// for itself, where the parent has not.
    fn sharing_brother(&self, p: &ProcessImage) -> Option<i32> {
        let needed = self.shared_with_earlier(p);
        if needed == 0 || self.sharing(p.ppid, p) & needed == needed {
            return None;
        }
        let mut born =
            self.images.processes.iter().filter(|q| {
                q.ppid == p.ppid || (!self.images.has(q.ppid) && !self.images.has(p.ppid))
            });
        born.find(|q| self.born.contains_key(&q.pid) && self.sharing(q.pid, p) & needed == needed)
            .map(|q| q.pid)
    }

    /// `CLONE_*` flags for the objects that are made with an earlier process.
    fn shared_with_earlier(&self, p: &ProcessImage) -> u64 {
        let Some(live) = &p.live else { return 0 };
        let flags = [
            (live.owns.memory, libc::CLONE_VM),
            (live.owns.files, libc::CLONE_FILES),
            (live.owns.fs, libc::CLONE_FS),
            (live.owns.actions, libc::CLONE_SIGHAND),
        ];
        let not_owned = flags.iter().filter(|(owns, _)| !owns);
        not_owned.fold(0, |all, (_, flag)| all | *flag as u64)
    }

    /// `CLONE_*` flags for the objects that two processes share.
    fn sharing(&self, a: i32, b: &ProcessImage) -> u64 {
        let found = self.images.live().find(|(p, _)| p.pid == a);
        let (Some((_, a)), Some(b)) = (found, &b.live) else {
            return 0;
        };
        let flags = [
            (a.ids.vm_id == b.ids.vm_id, libc::CLONE_VM),
            (a.ids.files_id == b.ids.files_id, libc::CLONE_FILES),
            (a.ids.fs_id == b.ids.fs_id, libc::CLONE_FS),
            (a.ids.sighand_id == b.ids.sighand_id, libc::CLONE_SIGHAND),
        ];
        let same = flags.iter().filter(|(same, _)| *same);
        same.fold(0, |all, (_, flag)| all | *flag as u64)
    }

    /// A child of another process of the tree.
    fn child(&mut self, p: &ProcessImage) -> Result<(), RestoreError> {
        if let Some(brother) = self.sharing_brother(p) {
            return self.fork(brother, p, libc::CLONE_PARENT as u64);
        }
        let leader = self.images.processes.iter().find(|q| q.pid == p.sid);
        let inherits = getsid(p.ppid)? == self.called_here(p.sid);
        let brother = leader.is_some_and(|q| q.ppid == p.ppid);
        if p.sid == p.pid || inherits {
            return self.fork(p.ppid, p, 0);
        }
        if brother && self.born.contains_key(&p.sid) {
            return self.fork(p.sid, p, libc::CLONE_PARENT as u64);
        }
        // An orphan that its session's dead leader left to a subreaper.
        let held = self.inner_ghosts.contains(&(p.ppid, p.sid));
        if !held && !self.images.has(p.sid) && !lives_outside(p.sid) {
            self.clone(p.ppid, p.sid, 0, libc::SIGCHLD)?;
            self.become_leader(p.sid)?;
            self.inner_ghosts.push((p.ppid, p.sid));
        } else if !held {
            return self.fork(p.ppid, p, 0);
        }
        self.fork(p.sid, p, libc::CLONE_PARENT as u64)
    }

    /// Stand-ins inside of the tree end, and their parents forget them.
    fn end_inner_ghosts(&mut self) -> Result<(), RestoreError> {
        for (parent, ghost) in std::mem::take(&mut self.inner_ghosts) {
            kill_and_reap(&[ghost]);
            let mut prog = Program::new();
            let ghost_there = self.images.pids.seen(parent, ghost);
            let args = [ghost_there.into(), 0.into(), libc::__WALL.into(), 0.into()];
            prog.call(libc::SYS_wait4, "forget a stand-in", &args);
            signals::forget_child_signal(&mut prog);
            self.run(parent, &prog)?;
            self.made.pids.retain(|&p| p != ghost);
        }
        Ok(())
    }

    fn run(&self, pid: i32, prog: &Program) -> Result<(), RestoreError> {
        Tracee { tid: pid }.run(self.birth.arena, prog)?;
        Ok(())
    }

    /// A process that is no child of another one of the tree.
    fn root(&mut self, pid: i32, cgroup: &str) -> Result<(), RestoreError> {
        self.spawn(pid, cgroup)?;
        self.made.add(pid);
        Ok(())
    }

    fn spawn(&mut self, pid: i32, cgroup: &str) -> Result<(), RestoreError> {
        let dir = self
            .options
            .cgroup_mount
            .as_ref()
            .map(|m| m.join(cgroup.trim_start_matches('/')));
        let dir = dir
            .map(|d| File::open(&d).map_err(RestoreError::io(format!("cgroup {}", d.display()))))
            .transpose()?;
        let fd: Option<RawFd> = dir.as_ref().map(AsRawFd::as_raw_fd);
        // A pid is taken as long as a session or group has it for its name,
        // which ends when the last zombie of it is reaped.
        let end = Instant::now() + PID_PATIENCE;
        let pids = &self.images.pids;
        let ids = pids.set_tid(pid);
        let flags = match pids.is_init(pid) {
            true => libc::CLONE_NEWPID as u64,
            false => 0,
        };
        loop {
            let spawn = || spawn_waiting(&ids, flags, fd, self.options.sibling, self.lifeline);
            let spawned = pids
                .among(spawn)
                .map_err(RestoreError::io("PID namespace"))?;
            match spawned {
                Ok(_) => break,
                Err(e) if e.errno != Errno::EEXIST => return Err(e.into()),
                Err(_) if Instant::now() > end => return Err(taken(pid)),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let attached = self.attach(pid);
        if attached.is_err() {
            kill_and_reap(&[pid]);
        }
        attached
    }

    fn attach(&self, pid: i32) -> Result<(), RestoreError> {
        ptrace::seize(pid, ptrace::O_RAISE)?;
        ptrace::interrupt(pid)?;
        let tracee = Tracee { tid: pid };
        let mut halt = Halt::default();
        loop {
            match ptrace::wait(pid)? {
                Stop::Stopped(_) => break,
                // The one that can be neither blocked nor taken back.
                Stop::Signal(libc::SIGSTOP) => {
                    halt.note(pid);
                    ptrace::cont(pid, 0)?;
                }
                stop => {
                    let what = format!("did not come up: {stop:?}");
                    return Err(RestoreError::Tree { pid, what });
                }
            }
        }
        let text = &self.birth.vdso.text;
        let insn = find_syscall(pid, Some((text.start, text.end)))?;
        tracee.map_arena(insn, Some(self.birth.arena.base), self.birth.arena.len)?;
        // What our libc registered must not be looked at once its memory is gone.
        let rseq = ptrace::rseq_configuration(pid)?;
        let mut prog = Program::new();
        prog.call(
            libc::SYS_set_robust_list,
            "drop the robust list",
            &[0.into(), 24.into()],
        );
        prog.call(
            libc::SYS_set_tid_address,
            "drop clear_child_tid",
            &[0.into()],
        );
        if rseq.pointer != 0 {
            let size = u64::from(rseq.size);
            let sig = u64::from(rseq.signature);
            const UNREGISTER: u64 = 1;
            prog.call(
                libc::SYS_rseq,
                "drop the rseq area",
                &[
                    rseq.pointer.into(),
                    size.into(),
                    UNREGISTER.into(),
                    sig.into(),
                ],
            );
        }
        tracee.run(self.birth.arena, &prog)?;
        Ok(())
    }

    /// A process made by another one of the tree, with whom it shares what
    /// both had in common.
    fn fork(&mut self, from: i32, p: &ProcessImage, flags: u64) -> Result<(), RestoreError> {
        let shared = self.sharing(from, p);
        let missing = self.shared_with_earlier(p) & !shared;
        if missing != 0 {
            let what = format!("shares objects ({missing:#x}) with a process that cannot make it");
            return Err(RestoreError::Tree { pid: p.pid, what });
        }
        // A brother gets the signal of who makes it.
        let signal = match flags {
            0 => p.ext.exit_signal.unwrap_or(libc::SIGCHLD),
            _ => 0,
        };
        self.clone(from, p.pid, flags | shared, signal)
    }

    fn clone(&mut self, from: i32, pid: i32, flags: u64, signal: i32) -> Result<(), RestoreError> {
        let birth = self.born.get(&from).unwrap_or(&self.birth).clone();
        self.memory.before_fork(from, &birth)?;
        let space = self.memory.space_of(from, &birth);
        let vdso = self.memory.vdso_in(space).unwrap_or(&birth.vdso).clone();
        let mut prog = Program::new();
        let pids = &self.images.pids;
        let ids = pids.set_tid(pid);
        let tid = prog.bytes(&ids.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<_>>());
        let exit_signal = signal as u64;
        let deeper = pids.depth(pid) > pids.depth(from);
        let mut args = CloneArgs {
            flags,
            exit_signal,
            set_tid_size: ids.len() as u64,
            ..CloneArgs::default()
        };
        if deeper && pids.is_init(pid) {
            args.flags |= libc::CLONE_NEWPID as u64;
        } else if deeper {
            self.point_children_at(&mut prog, pids.init_of(pid), pid)?;
        }
        let holder = prog.bytes(&args.as_bytes());
        prog.point(holder, 64, tid);
        let len = args.as_bytes().len() as u64;
        prog.call(
            libc::SYS_clone3,
            format!("make process {pid}"),
            &[holder.into(), len.into()],
        );
        if deeper && !pids.is_init(pid) {
            self.point_children_at(&mut prog, Some(from), pid)?;
        }
        let parent = Tracee { tid: from };
        let (_, births) = parent.run_with_births(self.birth.arena, &prog)?;
        for &b in &births {
            self.made.add(b);
        }
        if births != [pid] {
            return Err(RestoreError::Tree {
                pid,
                what: format!("was born as {births:?}"),
            });
        }
        ptrace::set_sigmask(pid, arch::REMOTE_SIGMASK)?;
        let birth = Birth {
            vdso,
            space,
            ..birth
        };
        self.born.insert(pid, birth);
        Ok(())
    }

    /// Adds the calls after which children are born into a process's PID namespace.
    fn point_children_at(
        &self,
        prog: &mut Program,
        whose: Option<i32>,
        child: i32,
    ) -> Result<(), RestoreError> {
        let whose = whose.ok_or_else(|| RestoreError::Tree {
            pid: child,
            what: "the first process of its PID namespace is not in the images".into(),
        })?;
        let ns = super::worlds::pid_ns(whose)?;
        super::worlds::join(
            prog,
            self.birth.pidfd,
            ns.as_raw_fd(),
            libc::CLONE_NEWPID,
            "have children in the PID namespace",
        );
        // Taken from us while the program runs.
        self.kept.borrow_mut().push(ns);
        Ok(())
    }

    fn move_to_cgroup(&self, p: &ProcessImage) -> Result<(), RestoreError> {
        let Some(mount) = &self.options.cgroup_mount else {
            return Ok(());
        };
        if p.live.is_none() {
            return Ok(());
        }
        let file = mount
            .join(p.ext.cgroup.trim_start_matches('/'))
            .join("cgroup.procs");
        std::fs::write(&file, p.pid.to_string())
            .map_err(RestoreError::io(format!("{}", file.display())))
    }
}

fn taken(pid: i32) -> RestoreError {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    let comm = comm.map(|c| c.trim_end().to_owned());
    RestoreError::PidTaken {
        pid,
        comm: comm.unwrap_or("a session or process group".into()),
    }
}

/// Waits for a moment when somebody sits on a pid we need.
fn wait_for_pid(pid: i32) -> Result<(), RestoreError> {
    let end = Instant::now() + PID_PATIENCE;
    let path = format!("/proc/{pid}");
    while Path::new(&path).exists() {
        if Instant::now() > end {
            return Err(taken(pid));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
