//! What the kernel keeps for a process and no call tells: what it would undo of
//! semaphores when the process ends (`SEM_UNDO`, semop(2)), and requests to
//! AIO contexts that wait for something to happen.

use std::sync::OnceLock;

use super::DumpError;
use crate::ext::RcrUndo;
use crate::memory::aio;
use crate::memory::maps::Vma;
use crate::namespace;
use crate::sys::kernel::Window;
use crate::sys::{SysError, SysResult};

/// More structures for one process than any has.
const UNDO_MAX: usize = 10_000;

/// None where the kernel does not describe its types, or lets nobody look.
fn window() -> Option<&'static Window> {
    static WINDOW: OnceLock<Option<Window>> = OnceLock::new();
    WINDOW.get_or_init(probe).as_ref()
}

fn probe() -> Option<Window> {
    let window = Window::open().ok()?;
    // Looking takes a capability and an iterator for tasks.
    window.task(std::process::id() as i32).ok()?;
    Some(window)
}

/// What is undone when the process of that thread ends, and whether that is in
/// an IPC namespace which is not ours.
pub(super) fn undo(voice: i32) -> Result<(Vec<RcrUndo>, bool), DumpError> {
    let (sets, foreign) = namespace::semaphore_sets(voice)?;
    let Some(window) = window().filter(|_| !sets.is_empty()) else {
        return Ok((Vec::new(), foreign));
    };
    let task = window.object("task_struct", window.task(voice)?);
    let list = task.number("sysvsem.undo_list")?;
    let mut all = Vec::new();
    if list == 0 {
        return Ok((all, foreign));
    }
    let list = window.object("sem_undo_list", list);
    let head = list.address("list_proc")?;
    let member = window.object("sem_undo", 0).address("list_proc")?;
    let mut next = list.number("list_proc.next")?;
    while next != head {
        if all.len() > UNDO_MAX {
            return Err(torn("a list of semaphores without end").into());
        }
        let one = window.object("sem_undo", next - member);
        let [after, id] = one.numbers(["list_proc.next", "semid"])?;
        next = after;
        // Removed sets have no number, and nothing to undo.
        let id = id as u32 as i32;
        if let Some(&count) = sets.get(&id) {
            let values = adjustments(window, one.at, count)?;
            if values.iter().any(|&v| v != 0) {
                all.push(RcrUndo { id, values });
            }
        }
    }
    Ok((all, foreign))
}

fn adjustments(window: &Window, at: u64, count: usize) -> SysResult<Vec<i32>> {
    let one = window.object("sem_undo", at);
    // At the structure's end, or where it points to.
    let values = match one.bytes("semadj")?.try_into() {
        Ok(pointer) => u64::from_le_bytes(pointer),
        Err(_) => one.address("semadj")?,
    };
    let bytes = window.copy(&[(values, count * 2)])?.pop();
    let bytes = bytes.ok_or_else(|| torn("no values of semaphores"))?;
    let value = |w: &[u8]| i32::from(i16::from_le_bytes([w[0], w[1]]));
    Ok(bytes.chunks_exact(2).map(value).collect())
}

/// The AIO context of a process, by its address, to which a request waits.
pub(super) fn waiting_request(voice: i32, vmas: &[Vma]) -> Result<Option<u64>, DumpError> {
    if !vmas.iter().any(|v| v.name.starts_with(aio::NAME)) {
        return Ok(None);
    }
    let Some(window) = window() else {
        return Ok(None);
    };
    let task = window.object("task_struct", window.task(voice)?);
    let mm = window.object("mm_struct", task.number("mm")?);
    let table = mm.number("ioctx_table")?;
    if table == 0 {
        return Ok(None);
    }
    let table = window.object("kioctx_table", table);
    let count = table.number("nr")? as usize;
    let contexts = table.address("table")?;
    for bytes in window.copy(&[(contexts, count * 8)])? {
        for context in bytes.chunks_exact(8) {
            let at = u64::from_le_bytes(context.try_into().expect("8 bytes"));
            if at == 0 {
                continue;
            }
            let context = window.object("kioctx", at);
            let [first, id] = context.numbers(["active_reqs.next", "user_id"])?;
            if first != context.address("active_reqs")? {
                return Ok(Some(id));
            }
        }
    }
    Ok(None)
}

fn torn(what: &str) -> SysError {
    SysError::new("BPF iterator", what, nix::errno::Errno::EBADMSG)
}
