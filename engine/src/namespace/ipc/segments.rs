//! Shared memory segments of an IPC namespace, with their content.

use std::collections::BTreeMap;

use super::{as_creator, description, failed, ids, with_id};
use crate::image::schema::IpcShmEntry;
use crate::image::{ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, put_image};
use crate::namespace::NamespaceError;
use crate::sys::shm;

/// Marked for removal when the last process detaches (`SHM_DEST`).
const SHM_DEST: u32 = 0o1000;

type Segments = Vec<(IpcShmEntry, Vec<u8>)>;

fn name(ns_id: u32) -> String {
    format!("ipcns-shm-{ns_id}.img")
}

/// How many bytes each has, where the calling thread is.
pub(super) fn sizes() -> Result<BTreeMap<i32, u64>, NamespaceError> {
    let size = |id: i32| Ok((id, shm::stat(id).map_err(failed)?.shm_segsz as u64));
    ids("shm")?.into_iter().map(size).collect()
}

/// All of them, where the calling thread is.
pub(super) fn list() -> Result<Segments, NamespaceError> {
    let mut all = Vec::new();
    for id in ids("shm")? {
        let s = shm::stat(id).map_err(failed)?;
        let mut attached = shm::Attached::new(id, s.shm_segsz).map_err(failed)?;
        let entry = IpcShmEntry {
            desc: description(&s.shm_perm, id),
            size: s.shm_segsz as u64,
            ..IpcShmEntry::default()
        };
        all.push((entry, attached.bytes().to_vec()));
    }
    Ok(all)
}

/// Writes them: each record is followed by the content, padded to words.
pub(super) fn put(sink: &mut dyn ImageSink, ns_id: u32, all: &Segments) -> Result<(), ImageError> {
    let mut image = ImageWriter::new(Kind::IpcShm);
    for (entry, bytes) in all {
        let padding = vec![0; bytes.len().next_multiple_of(4) - bytes.len()];
        image.record(entry).payload(bytes).payload(&padding);
    }
    put_image(sink, &name(ns_id), &image.finish())
}

/// Reads them.
pub(super) fn get(source: &dyn ImageSource, ns_id: u32) -> Result<Segments, ImageError> {
    let mut all = Vec::new();
    let Some(mut reader) = get_reader(source, Kind::IpcShm, &name(ns_id))? else {
        return Ok(all);
    };
    while let Some(entry) = reader.record::<IpcShmEntry>()? {
        let bytes = reader.payload(entry.size)?.to_vec();
        reader.payload(entry.size.next_multiple_of(4) - entry.size)?;
        all.push((entry, bytes));
    }
    Ok(all)
}

/// Makes them, where the calling thread is.
pub(super) fn make(all: &Segments) -> Result<(), NamespaceError> {
    for (e, bytes) in all {
        let id = e.desc.id as i32;
        let mode = e.desc.mode & 0o777;
        with_id("shm", id, || {
            as_creator(&e.desc, || {
                shm::create(e.desc.key as i32, e.size as usize, mode as i32)
            })
        })?;
        let mut attached = shm::Attached::new(id, bytes.len()).map_err(failed)?;
        attached.bytes().copy_from_slice(bytes);
        shm::set_owner(id, e.desc.uid, e.desc.gid, mode).map_err(failed)?;
    }
    Ok(())
}

/// Ids of those that go with their last user.
pub(super) fn doomed(source: &dyn ImageSource, ns_id: u32) -> Result<Vec<i32>, ImageError> {
    let all = get(source, ns_id)?;
    let doomed = all.iter().filter(|(e, _)| e.desc.mode & SHM_DEST != 0);
    Ok(doomed.map(|(e, _)| e.desc.id as i32).collect())
}

/// Removes segments, which stay as long as they are used.
pub(super) fn remove(ids: &[i32]) -> Result<(), NamespaceError> {
    ids.iter()
        .try_for_each(|&id| shm::remove(id).map_err(failed))
}
