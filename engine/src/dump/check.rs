//! Preflight: what would be refused, found without stopping anything.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::Pid;

use super::hidden;
use super::{DumpError, DumpOptions};
use crate::content;
use crate::file::{FilePolicy, FileSaver, TaskFiles};
use crate::freeze;
use crate::memory::maps::{self, Vma};
use crate::memory::pages;
use crate::memory::shmem::Objects;
use crate::memory::vma::{self, Class};
use crate::namespace::{self, NetSource, NsIds, NsKind};
use crate::sys::process::{core_cookie, pidfd_open, pidfd_open_thread};
use crate::sys::text;
use crate::task::creds::same_ids;
use crate::task::status::Status;
use crate::tree::{Process, Tree};
use crate::{OutsidePeer, Refusal};

/// What a look at a running tree finds.
#[derive(Debug, Clone, Default)]
pub struct Checked {
    /// What stands in the way of a checkpoint.
    pub refusals: Vec<Refusal>,
    /// Connections out of the tree that do not, and what becomes of them.
    pub peers: Vec<OutsidePeer>,
}

/// Everything that stands in the way of a checkpoint of the tree as it is now.
pub fn check(tree: &Tree, options: &DumpOptions) -> Result<Vec<Refusal>, DumpError> {
    Ok(examine(tree, options)?.refusals)
}

/// [`check`], and what becomes of connections that lead out of the tree.
pub fn examine(tree: &Tree, options: &DumpOptions) -> Result<Checked, DumpError> {
    let _namespaces = NsIds::remember();
    let host = NsIds::own()?;
    let mut out = Vec::new();
    let mut files = FileSaver::new(FilePolicy {
        payload: false,
        ..options.files
    })?;
    let mut nets = Nets::default();
    let processes = tree
        .scan()
        .map_err(DumpError::io("reading the process table"))?;
    // One that ends meanwhile is in none.
    let living = processes.iter().filter(|p| !p.is_zombie());
    let of = |p: &Process| NsIds::of(Pid::from_raw(p.voice())).ok();
    let pid_namespaces = living
        .filter_map(|p| Some((of(p)?.get(NsKind::Pid), p.pid)))
        .collect();
    let mut cgroups = BTreeSet::from([host.get(NsKind::Cgroup)]);
    for p in processes {
        files.note_process(p.pid);
        if p.is_zombie() {
            continue;
        }
        match one(&p, &host, &pid_namespaces, options, &mut files, &mut nets) {
            Ok(refusals) => out.extend(refusals),
            // A process that ends meanwhile is nothing to complain about.
            Err(_) if has_ended(&p) => continue,
            Err(e) => return Err(e),
        }
        let pid = Pid::from_raw(p.voice());
        // The first one that is in it makes it again.
        if NsIds::of(pid).is_ok_and(|ids| cgroups.insert(ids.get(NsKind::Cgroup))) {
            match namespace::check_cgroup(pid) {
                Ok(refusal) => out.extend(refusal),
                Err(_) if has_ended(&p) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    files.settle()?;
    out.extend(nets.refusals(&files, options)?);
    out.extend(files.refusals().iter().cloned());
    Ok(Checked {
        refusals: out,
        peers: files.outside_peers(),
    })
}

/// How often mappings are looked at that seem to be in the making.
const LOOKS_MAX: usize = 20;

/// Whether a process that was there has ended, or given its id away.
fn has_ended(p: &Process) -> bool {
    let now = Process::read(p.pid).ok().flatten();
    now.is_none_or(|now| now.is_zombie() || now.tids.len() < p.tids.len() || now.comm != p.comm)
}

/// What stands in the way in one process of a running tree.
fn one(
    p: &Process,
    host: &NsIds,
    pid_namespaces: &BTreeMap<u64, i32>,
    options: &DumpOptions,
    files: &mut FileSaver,
    nets: &mut Nets,
) -> Result<Vec<Refusal>, DumpError> {
    let mut vmas = maps::read(p.voice()).map_err(DumpError::io("mappings"))?;
    // execve(2) makes them one after the other, and who ends has none.
    for _ in 0..LOOKS_MAX {
        if vmas.iter().any(|v| v.is_named("[vdso]")) {
            break;
        }
        if has_ended(p) {
            return Ok(Vec::new());
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        vmas = maps::read(p.voice()).map_err(DumpError::io("mappings"))?;
    }
    options.leave_out_tracking(p.pid, &mut vmas);
    let mut out = process(p, &vmas)?;
    out.extend(freeze::refusals(p));
    let pid = Pid::from_raw(p.voice());
    out.extend(namespace::check_namespaces(pid)?);
    nets.note(pid, host)?;
    if !NsIds::of(pid)?.same(host, NsKind::Mnt) {
        out.extend(namespace::check_mounts(
            pid,
            &options.mounts,
            pid_namespaces,
        )?);
    }
    let pidfd = match p.leader_is_dead() {
        true => pidfd_open_thread(p.voice())?,
        false => pidfd_open(p.pid)?,
    };
    let task = TaskFiles {
        pid: p.pid,
        voice: p.voice(),
        pidfd: pidfd.as_fd(),
        comm: &p.comm,
        mnt_ns: p.pid as u32,
    };
    files.save_fds(&task)?;
    mapped_files(files, &task, &vmas)?;
    Ok(out)
}

/// Network namespaces of running processes, by inode number.
#[derive(Default)]
struct Nets(BTreeMap<u64, (OwnedFd, i32, String)>);

impl Nets {
    fn note(&mut self, pid: Pid, host: &NsIds) -> Result<(), DumpError> {
        let inode = NsIds::of(pid)?.get(NsKind::Net);
        if inode != host.get(NsKind::Net) && !self.0.contains_key(&inode) {
            let ns = namespace::open_net(pid)?;
            let of = (ns, pid.as_raw(), namespace::comm(pid));
            self.0.insert(inode, of);
        }
        Ok(())
    }

    fn refusals(
        mut self,
        files: &FileSaver,
        options: &DumpOptions,
    ) -> Result<Vec<Refusal>, DumpError> {
        for (inode, ns, pid, comm) in files.net_namespaces() {
            let ns = ns.try_clone_to_owned().map_err(DumpError::io("dup"))?;
            self.0.entry(inode).or_insert((ns, pid, comm));
        }
        let sources = self.0.into_iter().zip(1..);
        let sources: Vec<NetSource> = sources
            .map(|((inode, (ns, pid, comm)), id)| NetSource {
                id,
                ns,
                owner: 0,
                empty: options.empty_net,
                external: options.external_nets.get(&inode).cloned(),
                pid,
                comm,
            })
            .collect();
        Ok(namespace::check_nets(&sources)?)
    }
}

fn mapped_files(
    files: &mut FileSaver,
    task: &TaskFiles<'_>,
    vmas: &[Vma],
) -> Result<(), DumpError> {
    use std::os::unix::fs::OpenOptionsExt;
    for v in vmas
        .iter()
        .filter(|v| vma::classify(v) == Ok(Class::Descriptor))
    {
        files.mapped(task, v.file_inode(), &v.describe());
    }
    for v in vmas.iter().filter(|v| vma::classify(v) == Ok(Class::File)) {
        let link = format!("/proc/{}/map_files/{:x}-{:x}", task.voice, v.start, v.end);
        let open = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&link);
        // Unmapped meanwhile: no matter.
        let Ok(file) = open else { continue };
        files.save_path_fd(task, file.as_fd(), vma::open_flags(v) as u32, &v.describe())?;
    }
    Ok(())
}

/// What stands in the way in one process, its files and namespaces aside.
pub(super) fn process(p: &Process, vmas: &[Vma]) -> Result<Vec<Refusal>, DumpError> {
    let mut out = vma::refusals(p.pid, &p.comm, vmas);
    let mut refuse = |object: &str, reason: String, advice: &str| {
        out.push(Refusal {
            pid: p.pid,
            comm: p.comm.clone(),
            object: object.to_owned(),
            reason,
            advice: advice.to_owned(),
        });
    };
    match hidden::undo(p.voice()) {
        Ok((undo, false)) => {
            for set in undo {
                refuse(
                    "semaphores",
                    format!(
                        "what it did to set {} of the host is undone when it ends (SEM_UNDO)",
                        set.id
                    ),
                    "give the service an IPC namespace of its own (PrivateIPC=yes), or untag it",
                );
            }
        }
        Ok((_, true)) => {}
        Err(_) if has_ended(p) => {}
        Err(e) => return Err(e),
    }
    match hidden::waiting_request(p.voice(), vmas) {
        Ok(None) => {}
        Ok(Some(id)) => refuse(
            "AIO context",
            format!("a request to the one at {id:#x} waits for a file to be ready"),
            "untag the unit",
        ),
        Err(_) if has_ended(p) => {}
        Err(e) => return Err(e),
    }
    // The attribute is absent or unreadable where no security module has one.
    let label = text::read_string(format!("/proc/{}/attr/current", p.pid)).unwrap_or_default();
    let label = label.trim_end_matches(['\0', '\n']);
    if !label.is_empty() && label != "unconfined" && !label.ends_with("(unconfined)") {
        refuse(
            "security label",
            format!("it runs confined as \"{label}\", which is not carried yet"),
            "untag the unit or run it unconfined",
        );
    }
    if vmas.iter().all(|v| !v.is_named("[vdso]")) {
        refuse(
            "address space",
            "it has no vDSO".into(),
            "boot without vdso=0",
        );
    }
    for &tid in &p.tids {
        // It may have ended meanwhile.
        let Ok(status) = Status::read_thread(p.pid, tid) else {
            continue;
        };
        if status.get("x86_Thread_features").contains("shstk") {
            refuse(
                "shadow stack",
                format!("thread {tid} has one, which is not carried"),
                "run it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
            );
        }
        if core_cookie(tid).is_ok_and(|c| c != 0) {
            refuse(
                "core scheduling",
                format!("thread {tid} has a cookie, which is not carried"),
                "untag the unit",
            );
        }
    }
    for tid in threads_with_other_ids(p)? {
        refuse(
            "credentials",
            format!("thread {tid} has other ids than its process in a private user namespace"),
            "untag the unit or run it without PrivateUsers=",
        );
    }
    for &tid in p.tids.iter().filter(|&&t| t != p.pid) {
        let state = text::read_string(format!("/proc/{}/task/{tid}/stat", p.pid));
        if state.is_ok_and(|s| s.rsplit(')').next().is_some_and(|r| r.starts_with(" Z"))) {
            refuse(
                "dead thread",
                format!("thread {tid} has ended but is still there"),
                "try again",
            );
        }
    }
    Ok(out)
}

/// Threads whose ids differ from the leader's where that cannot be made again:
/// in a user namespace of its own a process gets its threads after its ids.
fn threads_with_other_ids(p: &Process) -> Result<Vec<i32>, DumpError> {
    let ids = NsIds::of(Pid::from_raw(p.voice()))?;
    if ids.same(&NsIds::own()?, NsKind::User) {
        return Ok(Vec::new());
    }
    let creds = |tid: i32| Status::read(tid).and_then(|s| s.creds(0));
    let leader = creds(p.voice()).map_err(DumpError::io(format!("status of {}", p.pid)))?;
    // A thread that ends meanwhile is no reason to refuse.
    let differs = |&tid: &i32| creds(tid).is_ok_and(|c| !same_ids(&leader, &c));
    Ok(p.tids.iter().copied().filter(differs).collect())
}

/// About how many bytes a dump of the tree takes now, pages included.
pub fn estimate_bytes(tree: &Tree, options: &DumpOptions) -> Result<u64, DumpError> {
    /// Images of a process beside its pages: a few hundred KiB at most.
    const PER_PROCESS: u64 = 1 << 20;
    let host = NsIds::own()?;
    let mut sum = 0;
    let mut shared = Objects::default();
    for p in tree
        .scan()
        .map_err(DumpError::io("reading the process table"))?
    {
        let Ok(vmas) = maps::read_ranges(p.voice()) else {
            continue;
        };
        let mut entries = Vec::new();
        for v in &vmas {
            match vma::classify(v) {
                Ok(Class::SysvShm) if v.foreign_segment.is_some() => {}
                Ok(Class::AnonShared | Class::SysvShm) => drop(shared.note(p.voice(), v)?),
                Ok(class) => entries.push(vma::save(v, class, 0, None)),
                Err(_) => {}
            }
        }
        // It may have ended meanwhile.
        let Ok(pages) = pages::find(p.voice(), &entries) else {
            continue;
        };
        sum += PER_PROCESS + pages.bytes() as u64;
        let pid = Pid::from_raw(p.voice());
        if !NsIds::of(pid)?.same(&host, NsKind::Mnt) {
            sum += namespace::estimate_mounts(pid, &options.mounts)?;
        }
    }
    let root = std::fs::File::open("/").map_err(DumpError::io("open /"))?;
    sum += content::estimate_paths(root.as_fd(), &options.carry)?;
    Ok(sum + shared.bytes()? as u64)
}
