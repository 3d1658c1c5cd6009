//! System V shared memory (shmget(2)): segments with their ids.
//!
//! Content is saved like that of other shared objects. Where the segment still
//! exists at the restore (the same kernel runs on), it is used as it is.

use std::collections::BTreeMap;
use std::io;

use nix::errno::Errno;

use super::MemoryError;
use super::hugetlb;
use super::maps::Vma;
use super::pages::Saved;
use crate::image::schema::{IpcDescEntry, IpcShmEntry};
use crate::image::{ImageSink, ImageSource, Kind, get_records, names, put_records};
use crate::namespace::as_creator;
use crate::remote::Program;
use crate::sys::shm;

/// Name of the list of segments.
const IMAGE: &str = "rcr-sysv-shm.img";
/// Marked for removal when the last process detaches (`SHM_DEST`).
const SHM_DEST: u32 = 0o1000;
const SHM_RDONLY: i32 = 0o10000;
const SHM_EXEC: i32 = 0o100000;
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// Whether a mapping is an attached segment.
pub fn is_segment(v: &Vma) -> bool {
    v.shared && v.dev.0 == 0 && v.name.starts_with(b"/SYSV")
}

/// Looks up the segments of a process that lives in another IPC namespace.
pub fn measure(pid: i32, vmas: &mut [Vma]) -> io::Result<()> {
    if !vmas.iter().any(is_segment) {
        return Ok(());
    }
    let sizes = crate::namespace::foreign_segments(pid).map_err(io::Error::other)?;
    if let Some(sizes) = sizes {
        for v in vmas.iter_mut().filter(|v| is_segment(v)) {
            v.foreign_segment = Some(sizes.get(&(v.inode as i32)).copied().unwrap_or(0));
        }
    }
    Ok(())
}

/// Why a segment's mapping cannot be made again, if so: attaching gives the
/// whole segment or nothing.
pub fn objection(v: &Vma) -> Option<&'static str> {
    let bytes = match v.foreign_segment {
        Some(_) if v.has(b"ht") => {
            return Some("it has huge pages in an IPC namespace of its own");
        }
        Some(bytes) => bytes,
        None => match shm::stat(v.inode as i32) {
            Ok(stat) => stat.shm_segsz as u64,
            Err(_) => return Some("the segment cannot be looked at"),
        },
    };
    let whole = v.offset == 0 && v.bytes() == bytes.next_multiple_of(v.page_bytes);
    (!whole).then_some("only a part of the segment is attached, or with mixed protection")
}

/// The segments met while mappings are saved.
#[derive(Debug, Default)]
pub struct Segments(BTreeMap<i32, IpcShmEntry>);

impl Segments {
    /// Notes the segment behind a mapping.
    pub fn note(&mut self, v: &Vma) -> Result<(), MemoryError> {
        let id = v.inode as i32;
        let s = shm::stat(id)?;
        let desc = IpcDescEntry {
            key: s.shm_perm.__key as u32,
            uid: s.shm_perm.uid,
            gid: s.shm_perm.gid,
            cuid: s.shm_perm.cuid,
            cgid: s.shm_perm.cgid,
            mode: s.shm_perm.mode.into(),
            id: id as u32,
        };
        let size = s.shm_segsz as u64;
        self.0.insert(
            id,
            IpcShmEntry {
                desc,
                size,
                hugetlb_flag: v.has(b"ht").then(|| hugetlb::size_bits(v.page_bytes)),
                ..IpcShmEntry::default()
            },
        );
        Ok(())
    }

    /// Writes the list.
    pub fn save(&self, sink: &mut dyn ImageSink) -> Result<(), MemoryError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let all: Vec<_> = self.0.values().cloned().collect();
        Ok(put_records(sink, Kind::IpcShm, IMAGE, &all)?)
    }
}

/// Makes the saved segments exist.
pub fn restore(source: &dyn ImageSource) -> Result<(), MemoryError> {
    let all: Vec<IpcShmEntry> = get_records(source, Kind::IpcShm, IMAGE)?;
    for e in &all {
        let id = e.desc.id as i32;
        match shm::stat(id) {
            Ok(s) if s.shm_segsz as u64 == e.size && s.shm_perm.__key as u32 == e.desc.key => {}
            Ok(_) => {
                let taken = io::Error::from(Errno::EEXIST);
                return Err(MemoryError::io(format!("shared memory segment {id}"))(
                    taken,
                ));
            }
            Err(_) => make(e, &Saved::load(source, &names::pagemap_shmem(id as u64))?)?,
        }
    }
    Ok(())
}

fn make(e: &IpcShmEntry, content: &Saved<'_>) -> Result<(), MemoryError> {
    let id = e.desc.id as i32;
    let what = || format!("shared memory segment {id}");
    std::fs::write(NEXT_ID, id.to_string()).map_err(MemoryError::io(NEXT_ID))?;
    let huge = e.hugetlb_flag;
    let huge = huge.map_or(0, |bits| bits as i32 | libc::SHM_HUGETLB);
    let got = as_creator(&e.desc, || {
        let mode = e.desc.mode as i32 & 0o777 | huge;
        shm::create(e.desc.key as i32, e.size as usize, mode)
    })?;
    if got != id {
        shm::remove(got)?;
        return Err(MemoryError::io(what())(io::Error::from(Errno::EEXIST)));
    }
    let mut attached = shm::Attached::new(id, e.size as usize)?;
    for p in &content.pieces {
        let start = p.start as usize;
        let end = (start + p.bytes.len()).min(attached.bytes().len());
        let Some(room) = attached.bytes().get_mut(start..end) else {
            continue;
        };
        room.copy_from_slice(&p.bytes[..room.len()]);
    }
    shm::set_owner(id, e.desc.uid, e.desc.gid, e.desc.mode & 0o777)?;
    Ok(())
}

/// Removes the segments that are to go with their last user; to be called when
/// all of them are attached.
pub fn settle(source: &dyn ImageSource) -> Result<(), MemoryError> {
    let all: Vec<IpcShmEntry> = get_records(source, Kind::IpcShm, IMAGE)?;
    for e in all.iter().filter(|e| e.desc.mode & SHM_DEST != 0) {
        shm::remove(e.desc.id as i32)?;
    }
    Ok(())
}

/// Adds the call that attaches a segment at its place.
pub fn attach(p: &mut Program, id: u64, start: u64, prot: i32) {
    let mut flags = 0;
    if prot & libc::PROT_WRITE == 0 {
        flags |= SHM_RDONLY;
    }
    if prot & libc::PROT_EXEC != 0 {
        flags |= SHM_EXEC;
    }
    let args = [id.into(), start.into(), flags.into()];
    p.call(
        libc::SYS_shmat,
        format!("attach shared memory segment {id}"),
        &args,
    );
}
