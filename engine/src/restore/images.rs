//! All images of a dump, read and checked before anything is made.

use crate::clock;
use crate::ext::{self, RcrInventory, RcrTask, RcrThread};
use crate::image::schema::{
    CoreEntry, FdinfoEntry, FsEntry, InventoryEntry, MmEntry, PstreeEntry, SeccompEntry,
    TaskCoreEntry, TaskKobjIdsEntry, ThreadCoreEntry, ThreadInfoX86, VmaEntry,
};
use crate::image::{ImageError, ImageSource, Kind, get_record, get_records, names};

use crate::memory::vma;
use crate::namespace::pid::{self, Places, RcrPids};

use super::{RestoreError, foreign};

/// A thread to be made.
#[derive(Debug)]
pub struct ThreadImage {
    /// As we number it.
    pub tid: i32,
    pub info: ThreadInfoX86,
    pub core: ThreadCoreEntry,
    pub ext: RcrThread,
}

/// What a living process has beside its threads.
#[derive(Debug)]
pub struct LiveImage {
    pub tc: TaskCoreEntry,
    pub ids: TaskKobjIdsEntry,
    pub mm: MmEntry,
    /// Guard regions in its mappings.
    pub guards: Vec<VmaEntry>,
    pub fs: FsEntry,
    pub fdinfo: Vec<FdinfoEntry>,
    pub threads: Vec<ThreadImage>,
    /// Which kernel objects are made with this process; the others are those
    /// of an earlier one.
    pub owns: Owns,
}

/// Kernel objects that processes may share.
#[derive(Debug, Clone, Copy)]
pub struct Owns {
    pub memory: bool,
    pub files: bool,
    pub fs: bool,
    pub actions: bool,
}

/// A process to be made.
#[derive(Debug)]
pub struct ProcessImage {
    /// As the images number it.
    pub id: i32,
    /// As we number it, like all that follow.
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub ext: RcrTask,
    /// `None` for a zombie.
    pub live: Option<LiveImage>,
}

impl ProcessImage {
    /// Whether a thread is to go on; an ended leader is not.
    pub fn lives(&self, tid: i32) -> bool {
        tid != self.pid || self.ext.dead_leader.is_none()
    }
}

/// A whole dump.
#[derive(Debug)]
pub struct Images {
    /// Parents before children.
    pub processes: Vec<ProcessImage>,
    /// Whether somebody else's program made it.
    pub foreign: bool,
    pub inventory: RcrInventory,
    pub host_ids: TaskKobjIdsEntry,
    pub seccomp: SeccompEntry,
    /// Who has which ids.
    pub pids: Places,
}

impl Images {
    /// Reads and checks.
    pub fn load(source: &dyn ImageSource) -> Result<Self, RestoreError> {
        let inventory: InventoryEntry = get_record(source, Kind::Inventory, names::INVENTORY)?;
        if inventory.img_version != 2 {
            return Err(content(
                names::INVENTORY,
                format!(
                    "image version {} is not read, only 2",
                    inventory.img_version
                ),
            ));
        }
        let foreign = foreign::is_foreign(source)?;
        let own: RcrInventory = match foreign {
            true => foreign::inventory(source)?,
            false => get_record(source, Kind::RcrTasks, ext::INVENTORY)?,
        };
        if own.version != ext::VERSION {
            return Err(content(
                ext::INVENTORY,
                format!("version {} is not read, only {}", own.version, ext::VERSION),
            ));
        }
        let seccomp: SeccompEntry = match foreign {
            true => get_records(source, Kind::Seccomp, names::SECCOMP)?
                .pop()
                .unwrap_or_default(),
            false => get_record(source, Kind::Seccomp, names::SECCOMP)?,
        };
        let tree: Vec<PstreeEntry> = get_records(source, Kind::Pstree, names::PSTREE)?;
        let pids = places(source, &tree, &own)?;
        let loader = Loader {
            source,
            foreign,
            seccomp: &seccomp,
            pids: &pids,
        };
        let mut processes: Vec<ProcessImage> = Vec::new();
        for e in tree {
            let p = loader.process(&e, &processes)?;
            if p.pid <= 1 || processes.iter().any(|q| q.pid == p.pid) {
                return Err(content(
                    names::PSTREE,
                    format!("bad or double pid {}", p.pid),
                ));
            }
            processes.push(p);
        }
        if processes.iter().all(|p| p.live.is_none()) {
            return Err(content(names::PSTREE, "no living process".into()));
        }
        let threads = processes
            .iter()
            .filter_map(|p| p.live.as_ref())
            .flat_map(|l| &l.threads);
        for t in threads {
            let known = |&i: &u32| (i as usize) < seccomp.seccomp_filters.len();
            if !t.ext.seccomp_chain.iter().all(known) {
                let what = format!("thread {} names a filter that is not there", t.tid);
                return Err(content(names::SECCOMP, what));
            }
        }
        Ok(Self {
            processes,
            foreign,
            inventory: own,
            host_ids: inventory.root_ids.unwrap_or_default(),
            seccomp,
            pids,
        })
    }

    /// The processes that live.
    pub fn live(&self) -> impl Iterator<Item = (&ProcessImage, &LiveImage)> {
        self.processes
            .iter()
            .filter_map(|p| Some((p, p.live.as_ref()?)))
    }

    /// The process whose address space a process lives in.
    pub fn memory_of(&self, live: &LiveImage) -> Option<i32> {
        let mut all = self.live();
        let owner = all.find(|(_, l)| l.ids.vm_id == live.ids.vm_id);
        owner.map(|(p, _)| p.pid)
    }

    /// Whether a pid is one of the dump's processes.
    pub fn has(&self, pid: i32) -> bool {
        self.processes.iter().any(|p| p.pid == pid)
    }

    /// What the restored processes' time namespace must add to the clocks.
    pub fn offsets(&self) -> std::io::Result<clock::Offsets> {
        let boot_id = crate::dump::boot_id()?;
        Ok(clock::wanted(
            &self.inventory,
            &boot_id,
            clock::Clocks::now(),
        ))
    }
}

fn content(name: &str, what: String) -> RestoreError {
    ImageError::Content {
        name: name.to_owned(),
        what,
    }
    .into()
}

/// Where every task goes.
fn places(
    source: &dyn ImageSource,
    tree: &[PstreeEntry],
    own: &RcrInventory,
) -> Result<Places, RestoreError> {
    let image: Vec<RcrPids> = get_records(source, Kind::RcrNamespaces, pid::IMAGE)?;
    let all: Vec<i32> = tree.iter().map(|e| e.pid as i32).collect();
    let same_boot = crate::dump::boot_id().is_ok_and(|b| b == own.boot_id);
    Places::plan(image.into_iter().next(), &all, same_boot).map_err(RestoreError::io("process ids"))
}

/// Reads one process after the other.
struct Loader<'a> {
    source: &'a dyn ImageSource,
    foreign: bool,
    seccomp: &'a SeccompEntry,
    pids: &'a Places,
}

impl Loader<'_> {
    fn process(
        &self,
        e: &PstreeEntry,
        earlier: &[ProcessImage],
    ) -> Result<ProcessImage, RestoreError> {
        let number =
            |v: u32| i32::try_from(v).map_err(|_| content(names::PSTREE, format!("pid {v}")));
        let id = number(e.pid)?;
        let core: CoreEntry = get_record(self.source, Kind::Core, &names::core(id))?;
        let ext: RcrTask = match (self.foreign, &core.tc) {
            (true, Some(tc)) => foreign::task(tc),
            (true, None) => {
                return Err(content(&names::core(id), "has no process state".into()));
            }
            _ => get_record(self.source, Kind::RcrTasks, &ext::task_image(id))?,
        };
        let live = match ext.zombie {
            true => None,
            false => Some(self.live(e, id, core, earlier)?),
        };
        let here = |v: u32| number(v).map(|v| self.pids.here(v));
        let (ppid, pgid, sid) = (here(e.ppid)?, here(e.pgid)?, here(e.sid)?);
        Ok(ProcessImage {
            id,
            pid: self.pids.here(id),
            ppid,
            pgid,
            sid,
            ext,
            live,
        })
    }

    fn live(
        &self,
        e: &PstreeEntry,
        pid: i32,
        core: CoreEntry,
        earlier: &[ProcessImage],
    ) -> Result<LiveImage, RestoreError> {
        let source = self.source;
        let lacks = |tid, what: &str| content(&names::core(tid), format!("has no {what}"));
        let mut core = Some(core);
        let mut tc = None;
        let mut threads = Vec::new();
        for &tid in &e.threads {
            let tid =
                i32::try_from(tid).map_err(|_| content(names::PSTREE, format!("thread {tid}")))?;
            let mut c = match core.take() {
                Some(c) if tid == pid => c,
                _ => get_record(source, Kind::Core, &names::core(tid))?,
            };
            if tid == pid {
                tc = c.tc.take();
            }
            let ext: RcrThread = match self.foreign {
                true => foreign::thread(tid, &c, self.seccomp)?,
                false => get_record(source, Kind::RcrTasks, &ext::thread_image(tid))?,
            };
            let core = c.thread_core.ok_or_else(|| lacks(tid, "thread state"))?;
            // Without them the thread would keep the restorer's privileges.
            if core.creds.is_none() {
                return Err(lacks(tid, "credentials"));
            }
            threads.push(ThreadImage {
                tid: self.pids.here(tid),
                info: c.thread_info.ok_or_else(|| lacks(tid, "registers"))?,
                core,
                ext,
            });
        }
        if e.threads.first() != Some(&e.pid) {
            return Err(content(
                names::PSTREE,
                format!("process {pid} does not list its leader first"),
            ));
        }
        let ids: TaskKobjIdsEntry = get_record(source, Kind::Ids, &names::ids(pid))?;
        let fdinfo = get_records(source, Kind::Fdinfo, &names::fdinfo(ids.files_id))?;
        let sharer = |id: fn(&TaskKobjIdsEntry) -> u32| {
            earlier
                .iter()
                .filter_map(|p| p.live.as_ref())
                .find(|l| id(&l.ids) == id(&ids))
        };
        let memory = sharer(|i| i.vm_id);
        let owns = Owns {
            memory: memory.is_none(),
            files: sharer(|i| i.files_id).is_none(),
            fs: sharer(|i| i.fs_id).is_none(),
            actions: sharer(|i| i.sighand_id).is_none(),
        };
        let mut mm: MmEntry = match memory {
            Some(l) => l.mm.clone(),
            None => get_record(source, Kind::Mm, &names::mm(pid))?,
        };
        // The same everywhere, and not ours to make.
        mm.vmas.retain(|e| e.status & vma::status::VSYSCALL == 0);
        let guard = |e: &VmaEntry| e.status & vma::status::GUARD != 0;
        let guards = mm.vmas.iter().copied().filter(guard).collect();
        mm.vmas.retain(|e| !guard(e));
        Ok(LiveImage {
            tc: tc.ok_or_else(|| lacks(pid, "process state"))?,
            mm,
            guards,
            owns,
            fs: get_record(source, Kind::Fs, &names::fs(pid))?,
            ids,
            fdinfo,
            threads,
        })
    }
}
