//! The address space: ours goes, the dumped one comes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::RestoreError;
use super::births::Birth;
use super::images::{Images, LiveImage, ProcessImage};
use super::lazy::Lazy;
use super::worlds::take;
use crate::file::FileBuilder;
use crate::image::schema::VmaEntry;
use crate::image::{ImageSource, names};
use crate::memory::extra::{self, RcrMm};
use crate::memory::heritage::{self, Kept};
use crate::memory::pages::{self, Piece, Saved};
use crate::memory::shmem::Rebuilt;
use crate::memory::vdso::{self, Vdso};
use crate::memory::vma::{self, status};
use crate::memory::{MemoryError, aio, layout, mm, place};
use crate::remote::{OpId, Program, Tracee, find_syscall};
use crate::sys::process::{Span, read_memory, write_memory};

const MREMAP_MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: i32 = 0;

/// Makes the memory of all processes.
///
/// Usually after all of them are born. But where a process has pages in common
/// with others that are forked from it, its memory is filled before that, and
/// they keep what is theirs as well.
pub struct Memory<'a, 'f> {
    pub source: &'a dyn ImageSource,
    pub images: &'a Images,
    pub files: &'a mut FileBuilder<'f>,
    pub shared: Rebuilt,
    /// Some pages are common to several processes.
    any_common: bool,
    /// Processes for which it is decided whether they are filled early.
    considered: BTreeSet<i32>,
    built: BTreeMap<i32, Built<'a>>,
    /// Who brings what may come later.
    pub pager: Option<Lazy>,
}

/// Memory that stands and is filled; protections and advice are not final.
struct Built<'a> {
    /// What it was filled with.
    content: Vec<Piece<'a>>,
    /// Its own content where it was filled with that of its heirs.
    overwritten: Vec<Piece<'a>>,
    /// Where the kernel's vDSO is now.
    vdso: Vdso,
}

/// Refuses images that do not have all pages.
pub fn all_here(source: &dyn ImageSource, images: &Images) -> Result<(), RestoreError> {
    for (p, _) in images.live().filter(|(_, l)| l.owns.memory) {
        if !pages::far(source, &names::pagemap(p.id))?.is_empty() {
            return Err(RestoreError::Tree {
                pid: p.id,
                what: "its pages are still where it was dumped (a lazy dump), and nobody is \
                       there who brings them"
                    .into(),
            });
        }
    }
    Ok(())
}

impl<'a, 'f> Memory<'a, 'f> {
    /// Nothing is made yet.
    pub fn new(
        source: &'a dyn ImageSource,
        images: &'a Images,
        files: &'a mut FileBuilder<'f>,
    ) -> Self {
        let names = source.names();
        let common = |p: &ProcessImage| names.contains(&heritage::image(p.id));
        Self {
            source,
            images,
            files,
            shared: Rebuilt::default(),
            any_common: images.processes.iter().any(common),
            considered: BTreeSet::new(),
            built: BTreeMap::new(),
            pager: None,
        }
    }

    /// What is not filled yet may come while the processes run, where a mapping
    /// has `at_least` so many bytes of content.
    pub fn come_later(
        &mut self,
        at_least: u64,
        pager: Option<&UnixStream>,
    ) -> Result<(), RestoreError> {
        if let Some(stream) = pager {
            self.pager = Some(Lazy::connected(stream, at_least)?);
            return Ok(());
        }
        let mut content = BTreeMap::new();
        for (p, _) in self.images.live().filter(|(_, l)| l.owns.memory) {
            if !self.built.contains_key(&p.pid) {
                let pieces = self.pieces(p.pid)?;
                content.insert(p.id, Saved { pieces });
            }
        }
        self.pager = Some(Lazy::start(content, at_least)?);
        Ok(())
    }

    /// To be called before a process is forked from another: fills that one's
    /// memory if others are to have parts of it.
    pub fn before_fork(&mut self, from: i32, birth: &Birth) -> Result<(), RestoreError> {
        let Some((p, live)) = self.memory_of(from).filter(|_| self.any_common) else {
            return Ok(());
        };
        if !self.considered.insert(p.pid) {
            return Ok(());
        }
        let mut heirs = Vec::new();
        let shares = |pid: i32| self.memory_of(pid).is_some_and(|(q, _)| q.pid == p.pid);
        for (q, _) in self.images.live().filter(|(_, l)| l.owns.memory) {
            // Its children, and brothers that join its session.
            if shares(q.ppid) || q.pid != p.pid && q.sid == p.pid && q.ppid == p.ppid {
                heirs.push((q.pid, self.pieces(q.pid)?));
            }
        }
        let own = self.pieces(p.pid)?;
        let lists: Vec<(i32, &[Piece<'_>])> = heirs.iter().map(|(q, l)| (*q, &l[..])).collect();
        let fill = heritage::before_births(&own, &lists);
        let mut common = false;
        for (_, pieces) in &heirs {
            heritage::side_by_side(&fill, pieces, |x, y| {
                common |= x.zip(y).is_some_and(|(x, y)| x.owner == y.owner);
            });
        }
        match common {
            true => self.build(p, live, birth, own, fill),
            false => Ok(()),
        }
    }

    /// The process whose filled memory `from` has, and so its children: itself
    /// or the one it was forked from.
    pub fn space_of(&self, from: i32, birth: &Birth) -> Option<i32> {
        match self.memory_of(from) {
            Some((p, _)) if self.built.contains_key(&p.pid) => Some(p.pid),
            _ => birth.space,
        }
    }

    /// The process that owns the memory of another: itself but for `CLONE_VM`.
    fn memory_of(&self, pid: i32) -> Option<(&'a ProcessImage, &'a LiveImage)> {
        let images = self.images;
        let (p, live) = images.live().find(|(p, _)| p.pid == pid)?;
        if live.owns.memory {
            return Some((p, live));
        }
        let vm = live.ids.vm_id;
        images
            .live()
            .find(|(_, l)| l.owns.memory && l.ids.vm_id == vm)
    }

    /// Where the vDSO is in a process that was forked with `space`.
    pub fn vdso_in(&self, space: Option<i32>) -> Option<&Vdso> {
        Some(&self.built.get(&space?)?.vdso)
    }

    /// Makes a process's memory final. Returns the address of a `syscall`
    /// instruction in it that stays.
    pub fn complete(
        &mut self,
        p: &ProcessImage,
        live: &LiveImage,
        birth: &Birth,
    ) -> Result<u64, RestoreError> {
        if !self.built.contains_key(&p.pid) {
            let own = self.pieces(p.pid)?;
            self.build(p, live, birth, own.clone(), own)?;
        }
        let built = &self.built[&p.pid];
        let tracee = Tracee { tid: p.pid };
        pages::write(p.pid, &built.overwritten)?;
        for ring in aio::rings(&live.mm.vmas) {
            let saved = Saved {
                pieces: self.pieces(p.pid)?,
            };
            let content: Vec<_> = saved.within(ring.start, ring.end).collect();
            aio::restore(tracee, birth.arena, ring, &content)?;
        }
        let extra = RcrMm::load(self.source, p.id)?;
        let mut prog = Program::new();
        let guards = live.guards.iter().map(|g| (g.start, g.end));
        extra::install_guards(&mut prog, guards);
        vma::restore_final(&mut prog, &live.mm.vmas, &extra);
        for n in &p.ext.vma_names {
            let name = prog.cstr(&n.name);
            // Names are for people; a kernel without them runs the program as well.
            prog.try_call(
                libc::SYS_prctl,
                "name a mapping",
                &[
                    PR_SET_VMA.into(),
                    PR_SET_VMA_ANON_NAME.into(),
                    n.start.into(),
                    (n.end - n.start).into(),
                    name.into(),
                ],
            );
        }
        extra.restore(&mut prog);
        tracee.run(birth.arena, &prog)?;
        let text = &built.vdso.text;
        Ok(find_syscall(p.pid, Some((text.start, text.end)))?)
    }

    /// The saved pages of a process with their owners.
    fn pieces(&self, pid: i32) -> Result<Vec<Piece<'a>>, RestoreError> {
        Ok(heritage::pages(self.source, self.images.pids.id(pid))?)
    }

    /// Swaps the address space and fills it with `fill`; `own` is what is to
    /// be there in the end.
    fn build(
        &mut self,
        p: &ProcessImage,
        live: &LiveImage,
        birth: &Birth,
        own: Vec<Piece<'a>>,
        fill: Vec<Piece<'a>>,
    ) -> Result<(), RestoreError> {
        let tracee = Tracee { tid: p.pid };
        let old_vdso = image_vdso(live);
        let vdso_text = old_vdso.as_ref().map(|v| v.text.clone());
        let special = special(&live.mm.vmas);
        let fill = without(fill, &special);

        let (kept, inherited, same_exe) = self.inherited(live, birth, &fill);
        let ranges: Vec<_> = kept.values().map(|k| k.range.clone()).collect();
        let changes = heritage::changes(inherited, &fill, &ranges);

        let mut prog = Program::new();
        let pidfd = start(&mut prog, birth.pidfd);
        let files = self.backing(live, &mut prog, pidfd)?;
        // Whoever was forked with it has it already.
        let exe = match same_exe {
            true => None,
            false => {
                let exe = self.files.open(live.mm.exe_file_id)?.as_raw_fd();
                Some(take(&mut prog, pidfd, exe))
            }
        };
        let span = birth.vdso.span();
        let parked = birth.park..birth.park + (span.end - span.start);
        let mut keep = birth.vdso.parts();
        keep.extend([birth.arena.base..birth.arena.end(), parked]);
        keep.extend(ranges);
        for r in layout::all_but(&keep) {
            let args = [r.start.into(), (r.end - r.start).into()];
            prog.call(libc::SYS_munmap, "unmap what was ours", &args);
        }
        mm::restore(&mut prog, &live.mm, exe);
        if span.start != birth.park {
            move_vdso(&mut prog, &birth.vdso, birth.park);
        }
        let saved = Saved { pieces: fill };
        let has_content = |e: &VmaEntry| saved.any_within(e.start, e.end);
        vma::restore(&mut prog, &live.mm.vmas, &files, &kept, has_content);
        for r in &changes.drop {
            let advice = libc::MADV_DONTNEED;
            let args = [r.start.into(), (r.end - r.start).into(), advice.into()];
            prog.call(libc::SYS_madvise, "drop inherited pages", &args);
        }
        if let Some(text) = &vdso_text {
            map_text(&mut prog, text);
        }
        let (now, later) = match &self.pager {
            Some(pager) => {
                let far = pages::far(self.source, &names::pagemap(p.id))?;
                pager.split(&live.mm.vmas, &kept, changes.write, &far)
            }
            None => (changes.write, Vec::new()),
        };
        let pager = self.pager.as_mut().filter(|_| !later.is_empty());
        let asked = pager.map(|pager| {
            let asked = pager.ask(&mut prog, pidfd, later);
            (pager, asked)
        });
        let out = tracee.run(birth.arena, &prog)?;
        let placed = |e: &&VmaEntry| e.status & status::DESCRIPTOR != 0;
        for e in live.mm.vmas.iter().filter(placed) {
            if let (false, Some(fd)) = (kept.contains_key(&e.start), files.get(&vma::file_key(e))) {
                place::restore(tracee, birth.arena, e, out.result(*fd) as i32)?;
            }
        }
        if let Some((pager, asked)) = asked {
            let fd = out.result(asked.op()) as i32;
            pager.hand_over(tracee, birth.arena, p.id, fd, &asked)?;
        }
        pages::write(p.pid, &now)?;

        let now = at(&birth.vdso, birth.park);
        let text = vdso_text.map(|t| {
            let all = Saved {
                pieces: own.clone(),
            };
            all.within(t.start, t.end).collect::<Vec<_>>()
        });
        let vdso = vdso_back(p, birth, &text.unwrap_or_default(), old_vdso.as_ref(), now)?;
        let mut overwritten = Vec::new();
        let own = without(own, &special);
        heritage::side_by_side(&own, &saved.pieces, |mine, there| {
            if let (Some(mine), Some(there)) = (mine, there)
                && mine.owner != there.owner
            {
                overwritten.push(mine);
            }
        });
        let built = Built {
            content: saved.pieces,
            overwritten,
            vdso,
        };
        self.built.insert(p.pid, built);
        Ok(())
    }

    /// What a process goes on with that it was born with: mappings, what they
    /// hold, and whether its executable is the right one.
    fn inherited(
        &self,
        live: &LiveImage,
        birth: &Birth,
        fill: &[Piece<'_>],
    ) -> (BTreeMap<u64, Kept>, &[Piece<'a>], bool) {
        let of = |space: i32| {
            let (_, from) = self.images.live().find(|(p, _)| p.pid == space)?;
            Some((from, self.built.get(&space)?))
        };
        let Some((from, built)) = birth.space.and_then(of) else {
            return (BTreeMap::new(), &[], false);
        };
        let same_exe = from.mm.exe_file_id == live.mm.exe_file_id;
        let (theirs, content) = (&from.mm.vmas, built.content.as_slice());
        let kept = heritage::keep(theirs, content, &live.mm.vmas, fill, same_exe);
        (kept, content, same_exe)
    }

    /// Adds the calls that take the files and shared objects behind mappings.
    fn backing(
        &mut self,
        live: &LiveImage,
        prog: &mut Program,
        pidfd: OpId,
    ) -> Result<BTreeMap<(bool, u64), OpId>, RestoreError> {
        let mut files: BTreeMap<(bool, u64), OpId> = BTreeMap::new();
        for e in live.mm.vmas.iter().filter(|e| vma::is_backed(e)) {
            let key = vma::file_key(e);
            if files.contains_key(&key) {
                continue;
            }
            let all = self.images.live().flat_map(|(_, l)| &l.mm.vmas);
            let fd = match e.status & status::ANON_SHARED != 0 {
                true => self.shared.open(e.shmid, self.source, all)?,
                false => self.files.open(e.shmid as u32)?.as_raw_fd(),
            };
            files.insert(key, take(prog, pidfd, fd));
        }
        Ok(files)
    }
}

/// Adds the calls that empty the descriptor table but for the pidfd of ours
/// that the process has as number `at` and will need once more. Gives another one.
fn start(p: &mut Program, at: i32) -> OpId {
    let (below, above) = (at - 1, at + 1);
    let all = u64::from(u32::MAX);
    let mut close = |from: i32, to: u64| {
        let args = [from.into(), to.into(), 0.into()];
        p.call(libc::SYS_close_range, "close everything else", &args);
    };
    if below >= 0 {
        close(0, below as u64);
    }
    close(above, all);
    p.call(libc::SYS_dup, "use the pidfd of the restorer", &[at.into()])
}

/// Adds the call that opens a pidfd of ours.
pub fn open_own_pidfd(p: &mut Program) -> OpId {
    let me = std::process::id() as i32;
    p.call(
        libc::SYS_pidfd_open,
        "open a pidfd of the restorer",
        &[me.into(), 0.into()],
    )
}

/// Where content is not simply written back.
fn special(vmas: &[VmaEntry]) -> Vec<Range<u64>> {
    let bits = status::VDSO | status::AIO_RING;
    let special = vmas.iter().filter(|e| e.status & bits != 0);
    special.map(|e| e.start..e.end).collect()
}

/// All but what lies in `holes`.
fn without<'a>(mut pieces: Vec<Piece<'a>>, holes: &[Range<u64>]) -> Vec<Piece<'a>> {
    for hole in holes {
        let parts = |p: &Piece<'a>| [p.clip(0, hole.start), p.clip(hole.end, u64::MAX)];
        pieces = pieces.iter().flat_map(parts).flatten().collect();
    }
    pieces
}

/// Maps the place of the old vDSO's text, writable for now.
fn map_text(prog: &mut Program, text: &Range<u64>) {
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let args = [
        text.start.into(),
        (text.end - text.start).into(),
        rw.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    prog.call(libc::SYS_mmap, "map the old vDSO's place", &args);
}

/// Makes the vDSO work at its old addresses; returns where the real one is.
fn vdso_back(
    p: &ProcessImage,
    birth: &Birth,
    text: &[Piece<'_>],
    old: Option<&Vdso>,
    now: Vdso,
) -> Result<Vdso, RestoreError> {
    let Some(old) = old else { return Ok(now) };
    let tracee = Tracee { tid: p.pid };
    let mut new_text = vec![0; (now.text.end - now.text.start) as usize];
    let span = Span {
        start: now.text.start,
        len: new_text.len(),
    };
    read_memory(p.pid, &[span], &mut new_text)?;
    let old_text = text.iter().flat_map(|p| p.bytes).copied();
    let old_text: Vec<u8> = old_text.collect();
    if old_text.len() as u64 != old.text.end - old.text.start {
        return Err(MemoryError::Vdso("its text is not whole in the images".into()).into());
    }
    let mut prog = Program::new();
    if old_text == new_text && old.same_shape(&now) {
        // The same kernel: it goes back to where it was.
        let len = old.text.end - old.text.start;
        let args = [old.text.start.into(), len.into()];
        prog.call(libc::SYS_munmap, "make room for the vDSO", &args);
        move_vdso(&mut prog, &now, old.span().start);
        tracee.run(birth.arena, &prog)?;
        return Ok(old.clone());
    }
    let text = vdso::redirect(&old_text, &new_text, now.text.start)?;
    write_memory(
        p.pid,
        &[Span {
            start: old.text.start,
            len: text.len(),
        }],
        &text,
    )?;
    let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let args = [old.text.start.into(), (text.len() as u64).into(), rx.into()];
    prog.call(libc::SYS_mprotect, "make the old vDSO executable", &args);
    tracee.run(birth.arena, &prog)?;
    Ok(now)
}

/// The vDSO that the images show.
fn image_vdso(live: &LiveImage) -> Option<Vdso> {
    let of = |bit: u32| live.mm.vmas.iter().filter(move |e| e.status & bit != 0);
    let text = of(status::VDSO).next()?;
    Some(Vdso {
        text: text.start..text.end,
        vvar: of(status::VVAR).map(|e| e.start..e.end).collect(),
    })
}

/// The same vDSO with its first byte at `base`.
fn at(v: &Vdso, base: u64) -> Vdso {
    let from = v.span().start;
    let shift = |r: &std::ops::Range<u64>| r.start - from + base..r.end - from + base;
    Vdso {
        text: shift(&v.text),
        vvar: v.vvar.iter().map(shift).collect(),
    }
}

fn move_vdso(p: &mut Program, v: &Vdso, base: u64) {
    let from = v.span().start;
    for r in v.parts() {
        let len = r.end - r.start;
        p.call(
            libc::SYS_mremap,
            "move the vDSO",
            &[
                r.start.into(),
                len.into(),
                len.into(),
                MREMAP_MOVE.into(),
                (r.start - from + base).into(),
            ],
        );
    }
}
