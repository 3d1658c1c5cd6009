//! Semaphores of an IPC namespace.

use std::collections::BTreeMap;

use super::{as_creator, description, failed, ids, with_id};
use crate::image::schema::IpcSemEntry;
use crate::image::{ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, put_image};
use crate::namespace::NamespaceError;
use crate::sys::sysv;

type Sets = Vec<(IpcSemEntry, Vec<u16>)>;

fn name(ns_id: u32) -> String {
    format!("ipcns-sem-{ns_id}.img")
}

/// How many semaphores each set has, where the calling thread is.
pub(super) fn sizes() -> Result<BTreeMap<i32, usize>, NamespaceError> {
    let mut all = BTreeMap::new();
    for id in ids("sem")? {
        // One that was removed just now has none.
        if let Ok(s) = sysv::semaphores_stat(id) {
            all.insert(id, s.sem_nsems as usize);
        }
    }
    Ok(all)
}

/// All of them, where the calling thread is.
pub(super) fn list() -> Result<Sets, NamespaceError> {
    let mut all = Vec::new();
    for id in ids("sem")? {
        let s = sysv::semaphores_stat(id).map_err(failed)?;
        let count = s.sem_nsems as usize;
        let values = sysv::semaphores_values(id, count).map_err(failed)?;
        let entry = IpcSemEntry {
            desc: description(&s.sem_perm, id),
            nsems: count as u32,
        };
        all.push((entry, values));
    }
    Ok(all)
}

/// Writes them: each record is followed by the values, padded to eight bytes.
pub(super) fn put(sink: &mut dyn ImageSink, ns_id: u32, all: &Sets) -> Result<(), ImageError> {
    let mut image = ImageWriter::new(Kind::IpcSem);
    for (entry, values) in all {
        let mut bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        image.record(entry).payload(&bytes);
    }
    put_image(sink, &name(ns_id), &image.finish())
}

/// Reads them.
pub(super) fn get(source: &dyn ImageSource, ns_id: u32) -> Result<Sets, ImageError> {
    let mut all = Vec::new();
    let Some(mut reader) = get_reader(source, Kind::IpcSem, &name(ns_id))? else {
        return Ok(all);
    };
    while let Some(entry) = reader.record::<IpcSemEntry>()? {
        let len = u64::from(entry.nsems) * 2;
        let bytes = reader.payload(len.next_multiple_of(8))?;
        let words = bytes[..len as usize].chunks_exact(2);
        let values = words.map(|w| u16::from_ne_bytes([w[0], w[1]])).collect();
        all.push((entry, values));
    }
    Ok(all)
}

/// Makes them, where the calling thread is.
pub(super) fn make(all: &Sets) -> Result<(), NamespaceError> {
    for (e, values) in all {
        let mode = e.desc.mode & 0o777;
        with_id("sem", e.desc.id as i32, || {
            as_creator(&e.desc, || {
                sysv::semaphores_create(e.desc.key as i32, values, mode as i32)
            })
        })?;
        let (id, d) = (e.desc.id as i32, &e.desc);
        sysv::semaphores_set(id, d.uid, d.gid, mode).map_err(failed)?;
    }
    Ok(())
}
