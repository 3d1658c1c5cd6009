//! One process: its threads, files, mappings and pages.

use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::Pid;

use super::hidden;
use super::settled::{Settled, Workshop};
use super::thread::dead_leader;
use super::{Dump, DumpError, DumpOptions, MappedFile, Ready};
use crate::clock::Offsets;
use crate::ext::{self, RcrTask, RcrTime, VmaName};
use crate::file::{FileSaver, TaskFiles};
use crate::freeze::FrozenProcess;
use crate::image::schema::{
    CoreEntry, FsEntry, March, MmEntry, TaskCoreEntry, TaskKobjIdsEntry, TaskTimersEntry, VmaEntry,
};
use crate::image::{Kind, names, put_records};
use crate::memory::extra::{self, RcrMm};
use crate::memory::heritage::SharedPages;
use crate::memory::maps::Vma;
use crate::memory::pages::Left;
use crate::memory::vdso::Vdso;
use crate::memory::vma::{self, Class};
use crate::memory::{aio, heritage, mm, pages, policy};
use crate::namespace::{NsIds, NsKind};
use crate::predump::{self, ranges};
use crate::remote::{OpId, Program};
use crate::sys::SysResult;
use crate::sys::process::{Span, pidfd_open, pidfd_open_thread};
use crate::sys::text;
use crate::task::status::Status;
use crate::task::{autogroup_nice, limits, signals, timers};
use crate::tree::Process;

/// Room for our programs in a process being dumped.
const ARENA_BYTES: u64 = 256 << 10;

const PR_GET_DUMPABLE: i32 = 3;
const PR_GET_CHILD_SUBREAPER: i32 = 37;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_GET_MDWE: i32 = 66;
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;

/// `task_state` values of the common schema.
pub const ALIVE: u32 = 1;
/// See [`ALIVE`].
pub const STOPPED: u32 = 3;
/// See [`ALIVE`]: has ended and waits to be reaped.
pub const DEAD: u32 = 2;

impl Dump<'_> {
    pub(super) fn process(
        &mut self,
        p: &FrozenProcess,
        ready: Ready,
        options: &DumpOptions,
    ) -> Result<(), DumpError> {
        let pid = p.info.pid;
        let voice = p.info.voice();
        if p.info.is_zombie() {
            return self.zombie(p);
        }
        let io = |what: &str| DumpError::io(format!("{what} of {} (pid {pid})", p.info.comm));
        let vdso = Vdso::find(&ready.vmas);
        let mut ids = self
            .namespaces
            .save(voice, options, &self.numbering, self.sink)?;
        let id = self.numbering.id(pid);
        self.sharing
            .number(pid, &mut ids, |pid| self.numbering.id(pid));
        put_records(
            self.sink,
            Kind::Ids,
            &names::ids(id),
            std::slice::from_ref(&ids),
        )?;

        let mnt_ns = self.namespaces.foreign_mounts(&ids);
        self.files(p, mnt_ns)?;
        let (mm_entry, names_of_vmas) = match self.sharing.owns_memory(pid) {
            true => self.memory(p, mnt_ns, &ready, options.pages_once)?,
            false => (None, Vec::new()),
        };
        let extra = RcrMm::of(&ready.vmas);
        let own = self.threads(p, ready.threads, vdso.as_ref(), (mm_entry, extra), ids)?;

        let cgroup = text::read_string(format!("/proc/{voice}/cgroup")).map_err(io("cgroup"))?;
        let cgroup = cgroup
            .lines()
            .find_map(|l| l.strip_prefix("0::"))
            .unwrap_or("/")
            .to_owned();
        let filter = text::read_string(format!("/proc/{voice}/coredump_filter"))
            .map_err(io("coredump_filter"))?;
        let (time, time_for_children) = self.times(voice).map_err(io("time namespace"))?;
        let task = RcrTask {
            stop_signal: p.stop_signal,
            exit_status: 0,
            zombie: false,
            cgroup,
            coredump_filter: u32::from_str_radix(filter.trim(), 16).ok(),
            vma_names: names_of_vmas,
            autogroup_nice: autogroup_nice(voice),
            time,
            time_for_children,
            exit_signal: Some(p.info.exit_signal),
            dead_leader: p.info.leader_is_dead().then_some(p.info.exit_code),
            pid_ns_of_children: self.numbering.of_children(voice)?,
            undo: hidden::undo(voice)?.0,
            ..own
        };
        Ok(put_records(
            self.sink,
            Kind::RcrTasks,
            &ext::task_image(id),
            &[task],
        )?)
    }

    /// The time namespaces of a process and of its future children, where they
    /// are not the first process's.
    fn times(&self, voice: i32) -> std::io::Result<(Option<RcrTime>, Option<RcrTime>)> {
        let ids = NsIds::of(Pid::from_raw(voice)).map_err(std::io::Error::other)?;
        let (ours, of_children) = (ids.get(NsKind::Time), ids.get(NsKind::TimeForChildren));
        if ours == self.time_ns && of_children == ours {
            return Ok((None, None));
        }
        let own = Offsets::of(voice)?;
        let next = Offsets::for_children_of(voice)?;
        let time = (own != self.offsets).then(|| own.relative_to(self.offsets));
        let for_children = (next != own).then(|| next.relative_to(self.offsets));
        Ok((time, for_children))
    }

    fn zombie(&mut self, p: &FrozenProcess) -> Result<(), DumpError> {
        let id = self.numbering.id(p.info.pid);
        let core = CoreEntry {
            mtype: March::X8664 as i32,
            tc: Some(TaskCoreEntry {
                task_state: DEAD,
                exit_code: p.info.exit_code as u32,
                comm: p.info.comm.clone(),
                ..TaskCoreEntry::default()
            }),
            ..CoreEntry::default()
        };
        put_records(self.sink, Kind::Core, &names::core(id), &[core])?;
        let ext = RcrTask {
            zombie: true,
            exit_status: p.info.exit_code,
            ..RcrTask::default()
        };
        Ok(put_records(
            self.sink,
            Kind::RcrTasks,
            &ext::task_image(id),
            &[ext],
        )?)
    }

    /// Mappings and pages.
    fn memory(
        &mut self,
        p: &FrozenProcess,
        mnt_ns: u32,
        ready: &Ready,
        pages_once: bool,
    ) -> Result<(Option<MmEntry>, Vec<VmaName>), DumpError> {
        let (mut mm_entry, names_of_vmas) = self.mappings(p, mnt_ns, &ready.vmas)?;
        let runs = &ready.runs;
        let guard = |s: &Span| vma::save_guard(s.start, s.start + s.len as u64);
        mm_entry.vmas.extend(runs.guards.iter().map(guard));
        let pages_id = self.next_pages_id;
        self.next_pages_id += 1;
        let apart: Vec<_> = match pages_once {
            // They are with whoever was looked at first.
            true => ready.common.iter().map(SharedPages::range).collect(),
            false => Vec::new(),
        };
        let id = self.numbering.id(p.info.pid);
        let older = match self.parent {
            Some(parent) => {
                let kept = ranges::both(&predump::keep(parent, &p.info, id)?, &runs.ranges());
                ranges::without(&kept, &apart)
            }
            None => Vec::new(),
        };
        self.stats.parent_bytes += ranges::bytes(&older);
        let kept = ranges::join(&older, &apart);
        let fresh = runs.without(&kept).without(&ready.far);
        self.stats.page_bytes += fresh.bytes() as u64;
        let name = names::pagemap(id);
        let left = Left {
            kept: &kept,
            far: &ready.far,
        };
        pages::save(p.info.voice(), &name, &fresh, left, pages_id, self.sink)?;
        if !ready.common.is_empty() {
            let name = heritage::image(id);
            let mut common = ready.common.clone();
            for c in &mut common {
                c.owner = self.numbering.id(c.owner);
                c.with_owner = pages_once;
            }
            put_records(self.sink, Kind::RcrTasks, &name, &common)?;
        }
        Ok((Some(mm_entry), names_of_vmas))
    }

    fn files(&mut self, p: &FrozenProcess, mnt_ns: u32) -> Result<(), DumpError> {
        let (pid, voice) = (p.info.pid, p.info.voice());
        let pidfd = open_voice(&p.info)?;
        let task = TaskFiles {
            pid,
            voice,
            pidfd: pidfd.as_fd(),
            comm: &p.info.comm,
            mnt_ns,
        };
        let id = self.numbering.id(pid);
        if self.sharing.owns_files(pid) {
            let fdinfo = self.files.save_fds(&task)?;
            FileSaver::put_table(self.sink, id as u32, &fdinfo)?;
            self.tables.push((pid, fdinfo));
        }
        let dir = libc::O_PATH | libc::O_DIRECTORY;
        let link = |name: &str| format!("/proc/{voice}/{name}");
        let cwd_id = self.path(&task, &link("cwd"), dir, "working directory")?;
        let root_id = self.path(&task, &link("root"), dir, "root directory")?;
        let status = Status::read(voice).map_err(DumpError::io(format!("status of {pid}")))?;
        let fs = FsEntry {
            cwd_id,
            root_id,
            umask: Some(status.umask()),
        };
        Ok(put_records(self.sink, Kind::Fs, &names::fs(id), &[fs])?)
    }

    /// Saves the file that a link in `/proc` leads to, to be opened with
    /// `flags`. 0 stands for one that was refused, which ends the dump later.
    fn path(
        &mut self,
        task: &TaskFiles<'_>,
        link: &str,
        flags: i32,
        what: &str,
    ) -> Result<u32, DumpError> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(link)
            .map_err(DumpError::io(link))?;
        Ok(self
            .files
            .save_path_fd(task, file.as_fd(), flags as u32, what)?
            .unwrap_or(0))
    }

    fn mappings(
        &mut self,
        p: &FrozenProcess,
        mnt_ns: u32,
        vmas: &[Vma],
    ) -> Result<(MmEntry, Vec<VmaName>), DumpError> {
        let pid = p.info.voice();
        let pidfd = open_voice(&p.info)?;
        let task = TaskFiles {
            pid: p.info.pid,
            voice: pid,
            pidfd: pidfd.as_fd(),
            comm: &p.info.comm,
            mnt_ns,
        };
        let mut entry = mm::save(pid)?;
        entry.exe_file_id = self.path(
            &task,
            &format!("/proc/{pid}/exe"),
            libc::O_RDONLY,
            "executable",
        )?;
        let mut named = Vec::new();
        for v in vmas {
            let Ok(class) = vma::classify(v) else {
                continue;
            };
            if class == Class::Vsyscall {
                continue;
            }
            let mut fdflags = None;
            let id = match class {
                Class::AnonShared => self.shared.note(pid, v)?,
                // It is saved with its namespace.
                Class::SysvShm if v.foreign_segment.is_some() => v.inode,
                Class::SysvShm => {
                    self.segments.note(v)?;
                    self.shared.note(pid, v)?
                }
                Class::Descriptor => {
                    let id = self.files.mapped(&task, v.file_inode(), &v.describe());
                    u64::from(id.unwrap_or(0))
                }
                Class::File => {
                    let flags = vma::open_flags(v);
                    fdflags = Some(flags as u32);
                    let key = MappedFile {
                        file: (v.dev, v.inode),
                        name: v.name.clone(),
                        flags,
                        mnt_ns,
                    };
                    let known = self.mapped.get(&key).copied();
                    let id = match known {
                        Some(id) => id,
                        None => {
                            let link = format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end);
                            let id = self.path(&task, &link, flags, &v.describe())?;
                            self.mapped.insert(key, id);
                            id
                        }
                    };
                    u64::from(id)
                }
                _ => 0,
            };
            if let Some(name) = v.name.strip_prefix(b"[anon:")
                && let Some(name) = name.strip_suffix(b"]")
            {
                named.push(VmaName {
                    start: v.start,
                    end: v.end,
                    name: name.to_vec(),
                });
            }
            let saved: VmaEntry = vma::save(v, class, id, fdflags);
            entry.vmas.push(saved);
        }
        entry.aios = aio::save(&entry.vmas);
        Ok((entry, named))
    }

    /// Runs our programs in the process and saves its threads. Returns what it
    /// has forbidden itself (`PR_GET_MDWE`).
    fn threads(
        &mut self,
        p: &FrozenProcess,
        settled: Vec<Settled>,
        vdso: Option<&Vdso>,
        (mut mm_entry, mut extra): (Option<MmEntry>, RcrMm),
        ids: TaskKobjIdsEntry,
    ) -> Result<RcrTask, DumpError> {
        let pid = p.info.pid;
        let leader = &settled[0];
        let unlocked = locked_kib(p.info.voice())?;
        let workshop = Workshop::open(leader, vdso, ARENA_BYTES)?;
        if locked_kib(p.info.voice())? != unlocked {
            extra.lock_future = match workshop.is_populated()? {
                true => libc::MCL_FUTURE,
                false => libc::MCL_FUTURE | libc::MCL_ONFAULT,
            };
        }
        let (tc, own) = self.process_state(p, &workshop, &mut mm_entry, &mut extra)?;
        if let Some(mm_entry) = mm_entry {
            policies(&workshop, &mm_entry.vmas, &mut extra)?;
            let id = self.numbering.id(pid);
            put_records(self.sink, Kind::Mm, &names::mm(id), &[mm_entry])?;
            extra.save(id, self.sink)?;
        }
        let mut tc = Some((tc, ids));
        for t in &settled {
            let (mut core, ext) = self.thread(t, &workshop)?;
            if let Some((tc, ids)) = tc.take() {
                let leading = TaskCoreEntry {
                    blk_sigset: t.saved.sigmask(),
                    ..tc
                };
                match t.tid == pid {
                    true => (core.tc, core.ids) = (Some(leading), Some(ids)),
                    false => {
                        let (mut core, ext) = dead_leader(pid, &core, &ext)?;
                        (core.tc, core.ids) = (Some(leading), Some(ids));
                        self.put_thread(pid, core, ext)?;
                    }
                }
            }
            self.put_thread(t.tid, core, ext)?;
        }
        Ok(own)
    }

    /// With the threads to be signalled as the images number them.
    fn timers(&self, mut timers: TaskTimersEntry) -> TaskTimersEntry {
        for t in &mut timers.posix {
            t.notify_thread_id = t.notify_thread_id.map(|tid| self.numbering.id(tid));
        }
        timers
    }

    /// Asks the process itself for what only it can tell.
    fn process_state(
        &mut self,
        p: &FrozenProcess,
        workshop: &Workshop<'_>,
        mm_entry: &mut Option<MmEntry>,
        extra: &mut RcrMm,
    ) -> Result<(TaskCoreEntry, RcrTask), DumpError> {
        let pid = p.info.voice();
        let io = |what: &str| DumpError::io(format!("{what} of {} (pid {pid})", p.info.comm));
        let mut prog = Program::new();
        let actions = signals::query_actions(&mut prog);
        let timer_query = timers::query(pid, &mut prog).map_err(io("timers"))?;
        let brk = prog.call(libc::SYS_brk, "read the heap's end", &[0.into()]);
        let get = |prog: &mut Program, what: &str, option: i32| -> OpId {
            let args = [option.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            prog.call(libc::SYS_prctl, what, &args)
        };
        let dumpable = get(&mut prog, "read dumpable", PR_GET_DUMPABLE);
        let thp = get(&mut prog, "read THP disable", PR_GET_THP_DISABLE);
        let subreaper = prog.zeroed(8);
        prog.call(
            libc::SYS_prctl,
            "read child subreaper",
            &[
                PR_GET_CHILD_SUBREAPER.into(),
                subreaper.into(),
                0.into(),
                0.into(),
                0.into(),
            ],
        );
        // Linux 6.3; before, registrations cannot be known and libc makes none.
        let membarrier = prog.try_call(
            libc::SYS_membarrier,
            "read membarrier registrations",
            &[MEMBARRIER_CMD_GET_REGISTRATIONS.into(), 0.into(), 0.into()],
        );
        let permitted = prog.zeroed(8);
        // Linux 5.16.
        prog.try_call(
            libc::SYS_arch_prctl,
            "read permitted features",
            &[ARCH_GET_XCOMP_PERM.into(), permitted.into()],
        );
        // Linux 6.15.
        let timer_ids = prog.try_call(
            libc::SYS_prctl,
            "read whether it chooses timer ids",
            &[
                PR_TIMER_CREATE_RESTORE_IDS.into(),
                2.into(),
                0.into(),
                0.into(),
                0.into(),
            ],
        );
        // Linux 6.3.
        let mdwe = prog.try_call(
            libc::SYS_prctl,
            "read MDWE",
            &[PR_GET_MDWE.into(), 0.into(), 0.into(), 0.into(), 0.into()],
        );
        let ksm = extra::query(&mut prog);
        let out = workshop.run(&prog)?;

        extra.merge_all = extra::answer(&out, ksm);
        if let Some(mm_entry) = mm_entry {
            mm_entry.mm_brk = out.result(brk) as u64;
            mm_entry.dumpable = Some(out.result(dumpable) as i32);
            mm_entry.thp_disabled = Some(out.result(thp) != 0);
        }
        let personality =
            text::read_string(format!("/proc/{pid}/personality")).map_err(io("personality"))?;
        let oom =
            text::read_string(format!("/proc/{pid}/oom_score_adj")).map_err(io("oom_score_adj"))?;
        let tc = TaskCoreEntry {
            task_state: if p.stop_signal != 0 { STOPPED } else { ALIVE },
            stop_signo: (p.stop_signal != 0).then_some(p.stop_signal as u32),
            personality: u32::from_str_radix(personality.trim(), 16).unwrap_or(0),
            flags: p.info.flags,
            comm: p.info.comm.clone(),
            timers: Some(self.timers(timers::answers(&out, &timer_query))),
            rlimits: Some(limits::save(pid).map_err(io("limits"))?),
            cg_set: Some(1),
            signals_s: Some(signals::save_queue(pid, true)?),
            oom_score_adj: oom.trim().parse().ok(),
            sigactions: signals::parse_actions(&out, &actions),
            child_subreaper: Some(out.data(subreaper)[0] != 0),
            membarrier_registration_mask: u32::try_from(out.result(membarrier)).ok(),
            ..TaskCoreEntry::default()
        };
        let word = out.data(permitted).try_into().expect("8 bytes");
        let own = RcrTask {
            mdwe: u32::try_from(out.result(mdwe)).unwrap_or(0),
            xstate_permitted: u64::from_le_bytes(word),
            timer_ids: out.result(timer_ids) == 1,
            thp_disabled: u32::try_from(out.result(thp)).unwrap_or(0),
            ..RcrTask::default()
        };
        Ok((tc, own))
    }
}

/// Asks for the memory policies of all mappings.
fn policies(
    workshop: &Workshop<'_>,
    vmas: &[VmaEntry],
    extra: &mut RcrMm,
) -> Result<(), DumpError> {
    /// So many questions fit.
    const BATCH: usize = 800;
    let plain = |e: &&VmaEntry| !vma::is_special(e) && e.status & vma::status::GUARD == 0;
    let plain: Vec<&VmaEntry> = vmas.iter().filter(plain).collect();
    for batch in plain.chunks(BATCH) {
        let mut prog = Program::new();
        let asked = batch
            .iter()
            .map(|e| policy::query_mapping(&mut prog, e.start));
        let asked: Vec<_> = asked.collect();
        let out = workshop.run(&prog)?;
        for (e, asked) in batch.iter().zip(asked) {
            if let Some(policy) = policy::answer(&out, asked) {
                extra.note_policy(e.start, e.end, policy);
            }
        }
    }
    Ok(())
}

/// Memory of a process that is locked into RAM.
fn locked_kib(pid: i32) -> Result<u64, DumpError> {
    let status = Status::read(pid).map_err(DumpError::io(format!("status of {pid}")))?;
    Ok(status.locked_kib())
}

/// A pidfd through which the process's descriptors can be had.
pub(crate) fn open_voice(p: &Process) -> SysResult<OwnedFd> {
    match p.leader_is_dead() {
        true => pidfd_open_thread(p.voice()),
        false => pidfd_open(p.pid),
    }
}
