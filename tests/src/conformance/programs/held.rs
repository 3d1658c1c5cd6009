//! What the kernel keeps for a process and tells nobody: what it undoes of
//! semaphores, who made a System V object, requests that wait.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, Pid};

use crate::conformance::sys::{call, numbers};
use crate::conformance::{Case, Check, Findings, Stage, Unavailable};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "ipc/undo",
        "what is undone of semaphores when a process ends (SEM_UNDO)",
        undo,
    ),
    Case::new(
        "ipc/undo-host",
        "what is undone of the host's semaphores when a process ends",
        undo_host,
    )
    .refused(),
    Case::new(
        "ipc/creators",
        "System V objects that another user made than who owns them",
        creators,
    ),
    Case::new(
        "aio/waiting",
        "an AIO request that waits for a pipe to be readable",
        waiting,
    )
    .refused(),
];

fn separate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWIPC).context("unshare")
}

/// A set of three semaphores, each at 10.
fn set() -> Result<i64> {
    let id = numbers(libc::SYS_semget, &[0, 3, 0o1600])?;
    for n in 0..3 {
        change(id, n, 10, 0)?;
    }
    Ok(id)
}

fn change(id: i64, n: u16, by: i16, flags: i32) -> Result<()> {
    let one = libc::sembuf {
        sem_num: n,
        sem_op: by,
        sem_flg: flags as i16,
    };
    // SAFETY: one operation, alive across the call.
    unsafe {
        call(
            libc::SYS_semop,
            [id as u64, &raw const one as u64, 1, 0, 0, 0],
        )
    }?;
    Ok(())
}

fn values(id: i64) -> Result<Vec<i64>> {
    const GETVAL: i64 = 12;
    let one = |n| Ok(numbers(libc::SYS_semctl, &[id, n, GETVAL])?);
    (0..3).map(one).collect()
}

/// A process that has changed semaphores and ends when the pipe is closed.
fn changer(id: i64) -> Result<(Pid, std::io::PipeWriter)> {
    let (mut ready, done) = std::io::pipe()?;
    let (mut wait, go) = std::io::pipe()?;
    // SAFETY: there is one thread, so no lock is held that the child would miss.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => {
            drop(go);
            let mut changed = || -> Result<()> {
                change(id, 0, -4, libc::SEM_UNDO)?;
                change(id, 2, 3, libc::SEM_UNDO)?;
                (&done).write_all(b"x")?;
                wait.read_to_end(&mut Vec::new())?;
                Ok(())
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(changed().is_err())) }
        }
        ForkResult::Parent { child } => {
            ready.read_exact(&mut [0])?;
            Ok((child, go))
        }
    }
}

fn undo(_: &Stage) -> Result<Check> {
    separate()?;
    let id = set()?;
    let mut one = Some(changer(id)?);
    Ok(Box::new(move |f: &mut Findings| {
        f.same("while it lives", &vec![6, 10, 13], &values(id)?);
        let (child, go) = one.take().context("no child")?;
        drop(go);
        nix::sys::wait::waitpid(child, None)?;
        f.same("when it has ended", &vec![10, 10, 10], &values(id)?);
        one = Some(changer(id)?);
        Ok(())
    }))
}

fn undo_host(stage: &Stage) -> Result<Check> {
    const IPC_RMID: i64 = 0;
    let id = set()?;
    change(id, 1, -1, libc::SEM_UNDO)?;
    stage.expect_refusal(&[
        format!("(pid {})", std::process::id()),
        format!("set {id} of the host"),
    ])?;
    Ok(Box::new(move |f: &mut Findings| {
        f.same("values", &vec![10, 9, 10], &values(id)?);
        numbers(libc::SYS_semctl, &[id, 0, IPC_RMID])?;
        Ok(())
    }))
}

fn creators(_: &Stage) -> Result<Check> {
    separate()?;
    numbers(libc::SYS_setresgid, &[-1, 71, -1])?;
    numbers(libc::SYS_setresuid, &[-1, 70, -1])?;
    let sem = numbers(libc::SYS_semget, &[0x51, 2, 0o1640])?;
    numbers(libc::SYS_shmget, &[0x52, 4096, 0o1640])?;
    numbers(libc::SYS_msgget, &[0x53, 0o1640])?;
    numbers(libc::SYS_setresuid, &[-1, 0, -1])?;
    numbers(libc::SYS_setresgid, &[-1, 0, -1])?;
    // SAFETY: all-zero is a valid value.
    let mut s: libc::semid_ds = unsafe { std::mem::zeroed() };
    (s.sem_perm.uid, s.sem_perm.gid, s.sem_perm.mode) = (5, 6, 0o644);
    // SAFETY: a live local of the type that the command reads.
    let r = unsafe { libc::semctl(sem as i32, 0, libc::IPC_SET, &raw mut s) };
    ensure!(r == 0, "IPC_SET: {}", std::io::Error::last_os_error());
    // Without the columns of times and last users.
    let look = || -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (kind, columns) in [("sem", 4..8), ("shm", 7..11), ("msg", 7..11)] {
            let text = fs::read_to_string(format!("/proc/sysvipc/{kind}"))?;
            let line = text.lines().nth(1).context(kind)?;
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let ids = words.get(columns).context("columns")?;
            all.push(ids.join(" "));
        }
        Ok(all)
    };
    let was = look()?;
    ensure!(
        was == ["5 6 70 71", "70 71 70 71", "70 71 70 71"],
        "{was:?}"
    );
    Ok(Box::new(move |f: &mut Findings| {
        f.same("owners and creators", &was, &look()?);
        Ok(())
    }))
}

fn waiting(stage: &Stage) -> Result<Check> {
    const POLL: u64 = 5;
    let mut id = 0_u64;
    // SAFETY: the id is a live local.
    unsafe { call(libc::SYS_io_setup, [4, &raw mut id as u64, 0, 0, 0, 0]) }?;
    let (reader, mut writer) = std::io::pipe()?;
    let mut iocb = [0_u64; 8];
    iocb[0] = 77;
    iocb[2] = POLL | (reader.as_raw_fd() as u64) << 32;
    iocb[3] = libc::POLLIN as u64;
    let list = [iocb.as_ptr() as u64];
    // SAFETY: the request and its list are live.
    unsafe { call(libc::SYS_io_submit, [id, 1, list.as_ptr() as u64, 0, 0, 0]) }?;
    if !std::path::Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(Unavailable::because(
            "the kernel does not describe its types",
        ));
    }
    stage.expect_refusal(&[
        format!("(pid {})", std::process::id()),
        format!("{id:#x}"),
        "a request".into(),
    ])?;
    Ok(Box::new(move |f: &mut Findings| {
        let _ = &reader;
        writer.write_all(b"x")?;
        let mut event = [0_u64; 4];
        // SAFETY: room for one event.
        let n = unsafe {
            call(
                libc::SYS_io_getevents,
                [id, 1, 1, event.as_mut_ptr() as u64, 0, 0],
            )
        }?;
        f.same("events", &1, &n);
        f.same("which", &77, &event[0]);
        Ok(())
    }))
}
