//! System V message queues and semaphores (msgctl(2), semctl(2)).

use std::mem::zeroed;

use nix::errno::Errno;

use super::{SysError, SysResult};

/// One message: its type and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SysvMessage {
    /// Its type, above 0.
    pub kind: i64,
    /// Its text.
    pub text: Vec<u8>,
}

/// Most room a message's text can take: the ceiling of `msgmax`.
const TEXT_MAX: usize = i32::MAX as usize - 64;
/// `MSG_COPY`: look at a message by its place and leave it.
const MSG_COPY: i32 = 0o40000;

/// A queue's state (`IPC_STAT`).
pub fn queue_stat(id: i32) -> SysResult<libc::msqid_ds> {
    // SAFETY: plain integers; all-zero is a valid value.
    let mut s: libc::msqid_ds = unsafe { zeroed() };
    // SAFETY: `s` is a live local of the type the command fills.
    match unsafe { libc::msgctl(id, libc::IPC_STAT, &mut s) } {
        r if r < 0 => Err(SysError::last("msgctl(IPC_STAT)", format!("queue {id}"))),
        _ => Ok(s),
    }
}

/// Makes a queue; returns its id.
pub fn queue_create(key: i32, mode: i32) -> SysResult<i32> {
    // SAFETY: numbers only.
    let r = unsafe { libc::msgget(key, libc::IPC_CREAT | libc::IPC_EXCL | mode) };
    match r {
        r if r < 0 => Err(SysError::last("msgget", format!("key {key:#x}"))),
        id => Ok(id),
    }
}

/// Sets a queue's owner, mode and room in bytes (`IPC_SET`).
pub fn queue_set(id: i32, uid: u32, gid: u32, mode: u32, room: u64) -> SysResult<()> {
    let mut s = queue_stat(id)?;
    s.msg_perm.uid = uid;
    s.msg_perm.gid = gid;
    s.msg_perm.mode = mode as _;
    s.msg_qbytes = room;
    // SAFETY: `s` is a live local of the type the command reads.
    match unsafe { libc::msgctl(id, libc::IPC_SET, &mut s) } {
        r if r < 0 => Err(SysError::last("msgctl(IPC_SET)", format!("queue {id}"))),
        _ => Ok(()),
    }
}

/// The message at a place of a queue, which stays there; none behind the last.
pub fn queue_peek(id: i32, place: usize, room: usize) -> SysResult<Option<SysvMessage>> {
    let room = room.min(TEXT_MAX);
    let mut buffer = vec![0_u8; 8 + room];
    // SAFETY: the buffer has room for the type and `room` bytes of text.
    let n = unsafe {
        libc::msgrcv(
            id,
            buffer.as_mut_ptr().cast(),
            room,
            place as i64,
            MSG_COPY | libc::IPC_NOWAIT,
        )
    };
    if n < 0 {
        return match Errno::last() {
            Errno::ENOMSG => Ok(None),
            _ => Err(SysError::last("msgrcv(MSG_COPY)", format!("queue {id}"))),
        };
    }
    let kind = i64::from_ne_bytes(buffer[..8].try_into().expect("8"));
    let text = buffer[8..8 + n as usize].to_vec();
    Ok(Some(SysvMessage { kind, text }))
}

/// Puts a message at the end of a queue.
pub fn queue_send(id: i32, message: &SysvMessage) -> SysResult<()> {
    let mut buffer = message.kind.to_ne_bytes().to_vec();
    buffer.extend_from_slice(&message.text);
    // SAFETY: the buffer holds the type and as many bytes of text as said.
    let r = unsafe {
        libc::msgsnd(
            id,
            buffer.as_ptr().cast(),
            message.text.len(),
            libc::IPC_NOWAIT,
        )
    };
    match r {
        r if r < 0 => Err(SysError::last("msgsnd", format!("queue {id}"))),
        _ => Ok(()),
    }
}

/// A set of semaphores (`IPC_STAT`).
pub fn semaphores_stat(id: i32) -> SysResult<libc::semid_ds> {
    // SAFETY: plain integers; all-zero is a valid value.
    let mut s: libc::semid_ds = unsafe { zeroed() };
    // SAFETY: `s` is a live local of the type the command fills.
    match unsafe { libc::semctl(id, 0, libc::IPC_STAT, &mut s) } {
        r if r < 0 => Err(SysError::last("semctl(IPC_STAT)", format!("set {id}"))),
        _ => Ok(s),
    }
}

/// The values of a set of `count` semaphores.
pub fn semaphores_values(id: i32, count: usize) -> SysResult<Vec<u16>> {
    const GETALL: i32 = 13;
    let mut values = vec![0_u16; count];
    // SAFETY: the array has as many members as the set.
    match unsafe { libc::semctl(id, 0, GETALL, values.as_mut_ptr()) } {
        r if r < 0 => Err(SysError::last("semctl(GETALL)", format!("set {id}"))),
        _ => Ok(values),
    }
}

/// Makes a set with these values; returns its id.
pub fn semaphores_create(key: i32, values: &[u16], mode: i32) -> SysResult<i32> {
    const SETALL: i32 = 17;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode;
    // SAFETY: numbers only.
    let id = unsafe { libc::semget(key, values.len() as i32, flags) };
    if id < 0 {
        return Err(SysError::last("semget", format!("key {key:#x}")));
    }
    // SAFETY: the array has as many members as the set that was just made.
    match unsafe { libc::semctl(id, 0, SETALL, values.as_ptr()) } {
        r if r < 0 => Err(SysError::last("semctl(SETALL)", format!("set {id}"))),
        _ => Ok(id),
    }
}

/// Sets a set's owner and mode (`IPC_SET`).
pub fn semaphores_set(id: i32, uid: u32, gid: u32, mode: u32) -> SysResult<()> {
    let mut s = semaphores_stat(id)?;
    s.sem_perm.uid = uid;
    s.sem_perm.gid = gid;
    s.sem_perm.mode = mode as _;
    // SAFETY: `s` is a live local of the type the command reads.
    match unsafe { libc::semctl(id, 0, libc::IPC_SET, &mut s) } {
        r if r < 0 => Err(SysError::last("semctl(IPC_SET)", format!("set {id}"))),
        _ => Ok(()),
    }
}
