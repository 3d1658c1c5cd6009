//! The address space: ours goes, the dumped one comes.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use super::RestoreError;
use super::births::Birth;
use super::images::{LiveImage, ProcessImage};
use super::process::Step;
use super::worlds::take;
use crate::image::names;
use crate::image::schema::VmaEntry;
use crate::memory::pages::Saved;
use crate::memory::vdso::{self, Vdso};
use crate::memory::vma::{self, status};
use crate::memory::{MemoryError, layout, mm};
use crate::remote::{OpId, Program, Tracee, find_syscall};
use crate::sys::process::{Span, read_memory, write_memory};

const MREMAP_MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: i32 = 0;

impl Step<'_, '_> {
    /// Swaps the address space and fills it. Returns the address of a
    /// `syscall` instruction in it that stays.
    pub(super) fn memory(
        &mut self,
        p: &ProcessImage,
        live: &LiveImage,
        birth: &Birth,
    ) -> Result<u64, RestoreError> {
        let tracee = Tracee { tid: p.pid };
        let old_vdso = image_vdso(live);

        let mut prog = Program::new();
        let pidfd = self.start(&mut prog);
        let mut files: BTreeMap<(bool, u64), OpId> = BTreeMap::new();
        let refs: Vec<_> = live.mm.vmas.iter().collect();
        for e in live.mm.vmas.iter().filter(|e| vma::is_backed(e)) {
            let key = vma::file_key(e);
            if files.contains_key(&key) {
                continue;
            }
            let fd = match e.status & status::ANON_SHARED != 0 {
                true => self.shared.open(e.shmid, self.source, &refs)?,
                false => self.files.open(e.shmid as u32)?.as_raw_fd(),
            };
            files.insert(key, take(&mut prog, pidfd, fd));
        }
        let exe = self.files.open(live.mm.exe_file_id)?.as_raw_fd();
        let exe_op = take(&mut prog, pidfd, exe);

        let span = birth.vdso.span();
        let parked = birth.park..birth.park + (span.end - span.start);
        let mut keep = birth.vdso.parts();
        keep.extend([birth.arena.base..birth.arena.end(), parked]);
        for r in layout::all_but(&keep) {
            let args = [r.start.into(), (r.end - r.start).into()];
            prog.call(libc::SYS_munmap, "unmap what was ours", &args);
        }
        move_vdso(&mut prog, &birth.vdso, birth.park);
        let saved = Saved::load(self.source, &names::pagemap(p.pid))?;
        let has_content = |e: &VmaEntry| !saved.within(e.start, e.end).is_empty();
        vma::restore(&mut prog, &live.mm.vmas, &files, has_content);
        if let Some(v) = &old_vdso {
            let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let (at, len) = (v.text.start, v.text.end - v.text.start);
            let args = [
                at.into(),
                len.into(),
                rw.into(),
                flags.into(),
                (-1).into(),
                0.into(),
            ];
            prog.call(libc::SYS_mmap, "map the old vDSO's place", &args);
        }
        mm::restore(&mut prog, &live.mm, exe_op);
        tracee.run(birth.arena, &prog)?;

        let skip = old_vdso.as_ref().map(|v| v.text.clone());
        saved.write_to(p.pid, skip.as_slice())?;

        let now = at(&birth.vdso, birth.park);
        let stays = self.vdso(p, birth, &saved, old_vdso.as_ref(), now)?;

        let mut prog = Program::new();
        vma::restore_final(&mut prog, &live.mm.vmas);
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
        tracee.run(birth.arena, &prog)?;
        Ok(find_syscall(
            p.pid,
            Some((stays.text.start, stays.text.end)),
        )?)
    }

    /// Makes the vDSO work at its old addresses; returns where the real one is.
    fn vdso(
        &self,
        p: &ProcessImage,
        birth: &Birth,
        saved: &Saved<'_>,
        old: Option<&Vdso>,
        now: Vdso,
    ) -> Result<Vdso, RestoreError> {
        let Some(old) = old else { return Ok(now) };
        let tracee = Tracee { tid: p.pid };
        let mut new_text = vec![0; (now.text.end - now.text.start) as usize];
        read_memory(
            p.pid,
            &[Span {
                start: now.text.start,
                len: new_text.len(),
            }],
            &mut new_text,
        )?;
        let pieces = saved.within(old.text.start, old.text.end);
        let old_text = match pieces.as_slice() {
            [(s, bytes)] if s.start == old.text.start && s.len as u64 == old.text.end - s.start => {
                *bytes
            }
            _ => {
                return Err(MemoryError::Vdso("its text is not whole in the images".into()).into());
            }
        };
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
        let text = vdso::redirect(old_text, &new_text, now.text.start)?;
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
