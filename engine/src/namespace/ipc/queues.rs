//! Message queues of an IPC namespace. Their messages are looked at where they
//! are (`MSG_COPY`), so nothing is taken out.

use super::{as_creator, description, failed, ids, with_id};
use crate::image::schema::{IpcMsg, IpcMsgEntry};
use crate::image::{ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, put_image};
use crate::namespace::NamespaceError;
use crate::sys::sysv::{self, SysvMessage};

type Queues = Vec<(IpcMsgEntry, Vec<SysvMessage>)>;

fn name(ns_id: u32) -> String {
    format!("ipcns-msg-{ns_id}.img")
}

/// All of them, where the calling thread is.
pub(super) fn list() -> Result<Queues, NamespaceError> {
    let mut all = Vec::new();
    for id in ids("msg")? {
        let s = sysv::queue_stat(id).map_err(failed)?;
        let mut messages = Vec::new();
        // No message can be longer than all of them.
        let room = s.__msg_cbytes as usize;
        while let Some(m) = sysv::queue_peek(id, messages.len(), room).map_err(failed)? {
            messages.push(m);
        }
        let entry = IpcMsgEntry {
            desc: description(&s.msg_perm, id),
            qbytes: s.msg_qbytes as u32,
            qnum: messages.len() as u32,
        };
        all.push((entry, messages));
    }
    Ok(all)
}

/// Writes them: each record is followed by its messages, padded to eight bytes.
pub(super) fn put(sink: &mut dyn ImageSink, ns_id: u32, all: &Queues) -> Result<(), ImageError> {
    let mut image = ImageWriter::new(Kind::IpcMsg);
    for (entry, messages) in all {
        image.record(entry);
        for m in messages {
            let head = IpcMsg {
                mtype: m.kind as u64,
                msize: m.text.len() as u32,
            };
            let padding = vec![0; m.text.len().next_multiple_of(8) - m.text.len()];
            image.record(&head).payload(&m.text).payload(&padding);
        }
    }
    put_image(sink, &name(ns_id), &image.finish())
}

/// Reads them.
pub(super) fn get(source: &dyn ImageSource, ns_id: u32) -> Result<Queues, ImageError> {
    let mut all = Vec::new();
    let name = name(ns_id);
    let Some(mut reader) = get_reader(source, Kind::IpcMsg, &name)? else {
        return Ok(all);
    };
    while let Some(entry) = reader.record::<IpcMsgEntry>()? {
        let mut messages = Vec::new();
        for _ in 0..entry.qnum {
            let head: IpcMsg = reader.record()?.ok_or_else(|| ImageError::Content {
                name: name.clone(),
                what: "a message is missing".into(),
            })?;
            let len = u64::from(head.msize);
            let text = reader.payload(len)?.to_vec();
            reader.payload(len.next_multiple_of(8) - len)?;
            messages.push(SysvMessage {
                kind: head.mtype as i64,
                text,
            });
        }
        all.push((entry, messages));
    }
    Ok(all)
}

/// Makes them, where the calling thread is.
pub(super) fn make(all: &Queues) -> Result<(), NamespaceError> {
    for (e, messages) in all {
        let id = e.desc.id as i32;
        let mode = e.desc.mode & 0o777;
        with_id("msg", id, || {
            as_creator(&e.desc, || {
                sysv::queue_create(e.desc.key as i32, mode as i32)
            })
        })?;
        let set = || sysv::queue_set(id, e.desc.uid, e.desc.gid, mode, e.qbytes.into());
        set().map_err(failed)?;
        for m in messages {
            sysv::queue_send(id, m).map_err(failed)?;
        }
    }
    Ok(())
}
