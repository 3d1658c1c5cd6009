//! Mappings: what each of them is, and the calls that make it again.

use std::collections::BTreeMap;

use crate::Refusal;
use crate::image::schema::VmaEntry;
use crate::remote::{OpId, Program};

use super::aio;
use super::extra::RcrMm;
use super::heritage::Kept;
use super::maps::Vma;
use super::sysv;

/// Bits of [`VmaEntry::status`].
pub mod status {
    /// Every mapping that is restored.
    pub const REGULAR: u32 = 1 << 0;
    /// The legacy call page, the same everywhere.
    pub const VSYSCALL: u32 = 1 << 2;
    /// The vDSO's text.
    pub const VDSO: u32 = 1 << 3;
    /// The heap.
    pub const HEAP: u32 = 1 << 5;
    /// Private file mapping.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// Shared file mapping.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared anonymous memory.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// An attached System V segment.
    pub const SYSVIPC: u32 = 1 << 10;
    /// The vDSO's data.
    pub const VVAR: u32 = 1 << 12;
    /// Events of a Linux AIO context.
    pub const AIO_RING: u32 = 1 << 13;
    /// Of a descriptor without a path, at a place that only the kernel may choose.
    pub const DESCRIPTOR: u32 = 1 << 20;
    /// No mapping: a guard region inside of one (`MADV_GUARD_INSTALL`).
    pub const GUARD: u32 = 1 << 16;
}

/// `MAP_DROPPABLE` (linux/mman.h, Linux 6.11).
pub const MAP_DROPPABLE: i32 = 0x08;

/// What a mapping is, as far as carrying it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The kernel's own, the same everywhere: nothing to do.
    Vsyscall,
    /// The vDSO's data pages.
    Vvar,
    /// The vDSO's text.
    Vdso,
    /// Private anonymous memory.
    AnonPrivate,
    /// Shared anonymous memory, known by its inode.
    AnonShared,
    /// An attached System V segment, known by its id.
    SysvShm,
    /// A file.
    File,
    /// What a descriptor stands for that has no path.
    Descriptor,
    /// Events of a Linux AIO context.
    AioRing,
}

/// Finds out what a mapping is, or why it cannot be carried.
pub fn classify(v: &Vma) -> Result<Class, (&'static str, &'static str)> {
    let name = v.name.as_slice();
    let refuse = |reason, advice| Err((reason, advice));
    match name {
        b"[vsyscall]" => return Ok(Class::Vsyscall),
        b"[vdso]" => return Ok(Class::Vdso),
        b"[uprobes]" => {
            return refuse("the process is being probed (uprobes)", "remove the probes");
        }
        n if n.starts_with(b"[vvar") => return Ok(Class::Vvar),
        _ => {}
    }
    if v.has(b"ss") {
        return refuse(
            "shadow stacks are not carried yet",
            "start the service without them",
        );
    }
    if v.has(b"um") || v.has(b"uw") || v.has(b"ui") {
        return refuse("the memory is watched by a userfaultfd", "untag the unit");
    }
    if v.shared && v.inode != 0 && name == b"/dev/zero (deleted)" {
        return Ok(Class::AnonShared);
    }
    if v.shared && name.starts_with(b"[anon_shmem:") {
        return Ok(Class::AnonShared);
    }
    if sysv::is_segment(v) {
        return match sysv::objection(v) {
            Some(reason) => refuse(reason, "untag the unit"),
            None => Ok(Class::SysvShm),
        };
    }
    if name == b"/anon_hugepage (deleted)" {
        return Ok(match v.shared {
            true => Class::AnonShared,
            false => Class::AnonPrivate,
        });
    }
    if name.starts_with(aio::NAME) {
        return Ok(Class::AioRing);
    }
    if name.starts_with(b"/secretmem") {
        return refuse(
            "secret memory (memfd_secret) is hidden from everybody else",
            "untag the unit",
        );
    }
    if name == b"anon_inode:[io_uring]" {
        return Ok(Class::Descriptor);
    }
    if name.starts_with(b"anon_inode:") {
        return refuse("a mapped kernel object cannot be carried", "untag the unit");
    }
    if name.starts_with(b"/dev/") && name != b"/dev/zero" && !name.starts_with(b"/dev/shm/") {
        return refuse("device memory cannot be carried", "untag the unit");
    }
    if v.has(b"pf") || v.has(b"io") {
        return refuse("device memory cannot be carried", "untag the unit");
    }
    if v.inode == 0 {
        return Ok(Class::AnonPrivate);
    }
    Ok(Class::File)
}

/// How the file behind a mapping has to be opened to map it again.
pub fn open_flags(v: &Vma) -> i32 {
    // "sh" and "mw": it counts as shared, and may be made writable, which a
    // shared mapping inherits from the descriptor it was made with.
    if v.shared && (v.has(b"mw") || v.has(b"sh")) {
        libc::O_RDWR
    } else {
        libc::O_RDONLY
    }
}

/// What stands in the way in a list of mappings.
pub fn refusals(pid: i32, comm: &str, vmas: &[Vma]) -> Vec<Refusal> {
    let one = |v: &Vma| {
        let keyed = (
            "it has a protection key, and those are not carried yet",
            "untag the unit",
        );
        // Memory that may only be executed has a key of the kernel's choice.
        let of_its_own = v.protection_key != 0 && v.prot != libc::PROT_EXEC;
        let (reason, advice) = match of_its_own {
            true => keyed,
            false => classify(v).err()?,
        };
        Some(Refusal {
            pid,
            comm: comm.to_owned(),
            object: v.describe(),
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        })
    };
    vmas.iter().filter_map(one).collect()
}

/// `VmFlags` letters and the madvise(2) advice that sets them.
const ADVICE: &[(&[u8; 2], i32)] = &[
    (b"sr", libc::MADV_SEQUENTIAL),
    (b"rr", libc::MADV_RANDOM),
    (b"dc", libc::MADV_DONTFORK),
    (b"mg", libc::MADV_MERGEABLE),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"dd", libc::MADV_DONTDUMP),
    (b"wf", libc::MADV_WIPEONFORK),
];

/// Advice that is given before there is content.
const EARLY: [i32; 2] = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE];

/// A mapping's image; `shmid` names its file or shared memory object.
pub fn save(v: &Vma, class: Class, shmid: u64, fdflags: Option<u32>) -> VmaEntry {
    use status::*;
    let status = match class {
        Class::Vsyscall => 0,
        Class::Vvar => REGULAR | VVAR | ANON_PRIVATE,
        Class::Vdso => REGULAR | VDSO | ANON_PRIVATE,
        Class::AnonPrivate if v.is_named("[heap]") => REGULAR | ANON_PRIVATE | HEAP,
        Class::AnonPrivate => REGULAR | ANON_PRIVATE,
        Class::AnonShared => REGULAR | ANON_SHARED,
        Class::SysvShm => REGULAR | SYSVIPC,
        Class::AioRing => REGULAR | AIO_RING,
        Class::Descriptor => REGULAR | FILE_SHARED | DESCRIPTOR,
        Class::File if v.shared => REGULAR | FILE_SHARED,
        Class::File => REGULAR | FILE_PRIVATE,
    };
    let mut flags = if v.shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    if matches!(
        class,
        Class::AnonPrivate | Class::AnonShared | Class::Vdso | Class::Vvar
    ) {
        flags |= libc::MAP_ANONYMOUS;
    }
    for (letters, flag) in [
        (b"gd", libc::MAP_GROWSDOWN),
        (b"nr", libc::MAP_NORESERVE),
        (b"lo", libc::MAP_LOCKED),
    ] {
        if v.has(letters) {
            flags |= flag;
        }
    }
    if v.has(b"ht") && flags & libc::MAP_ANONYMOUS != 0 {
        flags |= hugetlb_flags(v.page_bytes);
    }
    if v.has(b"dp") {
        flags = libc::MAP_ANONYMOUS | MAP_DROPPABLE;
    }
    let madv = ADVICE
        .iter()
        .filter(|(l, _)| v.has(l))
        .fold(0u64, |a, (_, m)| a | 1 << m);
    VmaEntry {
        start: v.start,
        end: v.end,
        pgoff: v.offset,
        shmid,
        prot: v.prot as u32,
        flags: flags as u32,
        status,
        fd: -1,
        madv: (madv != 0).then_some(madv),
        fdflags,
    }
}

/// mmap(2) flags for huge pages of a size.
pub fn hugetlb_flags(page_bytes: u64) -> i32 {
    libc::MAP_HUGETLB | (page_bytes.trailing_zeros() as i32) << libc::MAP_HUGE_SHIFT
}

/// The record of a guard region.
pub fn save_guard(start: u64, end: u64) -> VmaEntry {
    VmaEntry {
        start,
        end,
        status: status::GUARD,
        fd: -1,
        ..VmaEntry::default()
    }
}

/// Whether the mapping's pages are the process's own and have to be saved.
pub fn has_own_pages(e: &VmaEntry) -> bool {
    e.status & (status::ANON_PRIVATE | status::FILE_PRIVATE) != 0
        && !is_special(e)
        && e.flags as i32 & MAP_DROPPABLE != MAP_DROPPABLE
}

/// Whether it is one of the kernel's special mappings.
pub fn is_special(e: &VmaEntry) -> bool {
    e.status & (status::VDSO | status::VVAR) != 0
}

/// Makes the mappings; those for which `has_content` holds are writable for
/// now, and only they: a private mapping that ever was writable counts as
/// committed memory from then on. `files` gives, for the file or shared object
/// behind a mapping, the call that brought its descriptor into the target.
/// `kept` are there already.
pub fn restore(
    p: &mut Program,
    vmas: &[VmaEntry],
    files: &BTreeMap<(bool, u64), OpId>,
    kept: &BTreeMap<u64, Kept>,
    has_content: impl Fn(&VmaEntry) -> bool,
) {
    for e in vmas.iter().filter(|e| !is_special(e)) {
        if e.status & status::SYSVIPC != 0 {
            sysv::attach(p, e.shmid, e.start, e.prot as i32);
            continue;
        }
        if e.status & status::AIO_RING != 0 {
            hold_place(p, e);
            continue;
        }
        if e.status & status::DESCRIPTOR != 0 && !kept.contains_key(&e.start) {
            continue; // See [`super::place`].
        }
        let mut flags = e.flags as i32 & !libc::MAP_LOCKED | libc::MAP_FIXED_NOREPLACE;
        let mut prot = e.prot as i32;
        if has_own_pages(e) && has_content(e) {
            prot |= libc::PROT_WRITE;
        }
        if let Some(kept) = kept.get(&e.start) {
            go_on(p, e, kept, prot);
            continue;
        }
        let file = files.get(&file_key(e));
        if file.is_some() {
            flags &= !libc::MAP_ANONYMOUS;
        }
        p.call(
            libc::SYS_mmap,
            format!("map {:x}-{:x}", e.start, e.end),
            &[
                e.start.into(),
                (e.end - e.start).into(),
                prot.into(),
                flags.into(),
                file.map_or((-1).into(), |&op| op.into()),
                e.pgoff.into(),
            ],
        );
        advise_early(p, e);
    }
}

/// Maps something where an AIO ring is to be moved.
fn hold_place(p: &mut Program, e: &VmaEntry) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let args = [
        e.start.into(),
        (e.end - e.start).into(),
        libc::PROT_NONE.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    p.call(libc::SYS_mmap, "hold an AIO ring's place", &args);
}

/// Adds the advice that decides of which pages content is made.
fn advise_early(p: &mut Program, e: &VmaEntry) {
    for advice in EARLY {
        if e.madv.unwrap_or(0) >> advice & 1 == 1 {
            let args = [e.start.into(), (e.end - e.start).into(), advice.into()];
            p.call(libc::SYS_madvise, "advise on huge pages", &args);
        }
    }
}

/// Makes a mapping that is there what it should be.
fn go_on(p: &mut Program, e: &VmaEntry, kept: &Kept, prot: i32) {
    let at = format!("{:x}-{:x}", e.start, e.end);
    let (start, len) = (e.start, e.end - e.start);
    let have = kept.range.end - kept.range.start;
    if have < len {
        let args = [start.into(), have.into(), len.into(), 0.into()];
        p.call(libc::SYS_mremap, format!("extend {at}"), &args);
    }
    if kept.prot != prot {
        let args = [start.into(), len.into(), prot.into()];
        p.call(libc::SYS_mprotect, format!("protect {at} for now"), &args);
    }
}

/// Names the object behind a mapping: (shared anonymous memory?, id).
pub fn file_key(e: &VmaEntry) -> (bool, u64) {
    (e.status & status::ANON_SHARED != 0, e.shmid)
}

/// Whether a file or shared object stands behind the mapping.
pub fn is_backed(e: &VmaEntry) -> bool {
    e.status & (status::FILE_PRIVATE | status::FILE_SHARED | status::ANON_SHARED) != 0
}

/// When the content is in: final protection, advice, locks.
pub fn restore_final(p: &mut Program, vmas: &[VmaEntry], extra: &RcrMm) {
    let plain = |e: &&VmaEntry| !is_special(e) && e.status & status::AIO_RING == 0;
    for e in vmas.iter().filter(plain) {
        let len = e.end - e.start;
        let at = format!("{:x}-{:x}", e.start, e.end);
        let given = |a: &i32| e.madv.unwrap_or(0) >> a & 1 == 1 && !EARLY.contains(a);
        for advice in (0..64).filter(given) {
            let args = [e.start.into(), len.into(), advice.into()];
            p.call(
                libc::SYS_madvise,
                format!("give advice {advice} on {at}"),
                &args,
            );
        }
        if has_own_pages(e) && e.prot as i32 & libc::PROT_WRITE == 0 {
            let args = [e.start.into(), len.into(), u64::from(e.prot).into()];
            p.call(libc::SYS_mprotect, format!("protect {at}"), &args);
        }
        if e.flags as i32 & libc::MAP_LOCKED != 0 {
            let on_fault = extra.locks_on_fault(e.start);
            let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
            let args = [e.start.into(), len.into(), u64::from(flags).into()];
            p.call(libc::SYS_mlock2, format!("lock {at}"), &args);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(name: &str, inode: u64, shared: bool) -> Vma {
        Vma {
            start: 0x1000,
            end: 0x2000,
            prot: 3,
            shared,
            offset: 0,
            dev: (0, 1),
            inode,
            name: name.as_bytes().to_vec(),
            flags: vec![],
            foreign_segment: None,
            page_bytes: 4096,
            protection_key: 0,
        }
    }

    #[test]
    fn classes() {
        assert_eq!(classify(&vma("[stack]", 0, false)), Ok(Class::AnonPrivate));
        assert_eq!(
            classify(&vma("/dev/zero (deleted)", 7, true)),
            Ok(Class::AnonShared)
        );
        assert_eq!(classify(&vma("/usr/bin/x", 7, false)), Ok(Class::File));
        assert_eq!(classify(&vma("[vvar_vclock]", 0, false)), Ok(Class::Vvar));
    }

    #[test]
    fn an_object_of_the_kernel_is_refused_by_name() {
        let r = &refusals(7, "x", &[vma("anon_inode:[perf_event]", 9, true)])[0];
        assert!(r.to_string().contains("anon_inode:[perf_event]"), "{r}");
    }
}
