//! IPC namespaces: System V objects and limits.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("ipc/empty", "an IPC namespace with nothing in it", empty),
    Case::new("ipc/limits", "limits of an IPC namespace", limits),
    Case::new(
        "ipc/segments",
        "shared memory of an IPC namespace: attached, unattached, marked for removal",
        segments,
    ),
    Case::new(
        "ipc/queues",
        "message queues of an IPC namespace, with messages of several types",
        queues,
    ),
    Case::new(
        "ipc/semaphores",
        "semaphores of an IPC namespace, by key and private",
        semaphores,
    ),
    Case::new(
        "ipc/shared",
        "one IPC namespace of a parent and its child",
        shared,
    ),
    Case::new(
        "ipc/two",
        "two IPC namespaces with the same keys and ids",
        two,
    ),
];

fn separate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWIPC).context("unshare")
}

fn empty(_: &Stage) -> Result<Check> {
    separate()?;
    Ok(Box::new(|f: &mut Findings| {
        for kind in ["shm", "msg", "sem"] {
            let text = fs::read_to_string(format!("/proc/sysvipc/{kind}"))?;
            f.same(kind, &1, &text.lines().count());
        }
        Ok(())
    }))
}

const LIMITS: [(&str, &str); 5] = [
    ("kernel/sem", "100\t2000\t50\t60"),
    ("kernel/msgmax", "12345"),
    ("kernel/shmmax", "1048576"),
    ("kernel/shm_rmid_forced", "1"),
    ("fs/mqueue/msg_max", "20"),
];

fn limits(_: &Stage) -> Result<Check> {
    separate()?;
    for (name, value) in LIMITS {
        fs::write(format!("/proc/sys/{name}"), value).context(name)?;
    }
    Ok(Box::new(|f: &mut Findings| {
        for (name, value) in LIMITS {
            let now = fs::read_to_string(format!("/proc/sys/{name}"))?;
            f.same(name, value, now.trim());
        }
        Ok(())
    }))
}

/// The words of an object's line in `/proc/sysvipc`.
fn listed(kind: &str, id: i32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/sysvipc/{kind}"))?;
    let id = id.to_string();
    let mut lines = text.lines().skip(1);
    let line = lines.find(|l| l.split_whitespace().nth(1) == Some(&id));
    let line = line.with_context(|| format!("{kind} {id} is gone"))?;
    Ok(line.split_whitespace().map(str::to_owned).collect())
}

/// A new segment, attached and filled; its id and its address.
fn segment(key: i32, bytes: usize, fill: u8) -> Result<(i32, usize)> {
    // SAFETY: a new segment of that size is attached where the kernel wants and filled.
    unsafe {
        let id = libc::shmget(key, bytes, libc::IPC_CREAT | libc::IPC_EXCL | 0o640);
        ensure!(id >= 0, "shmget: {}", std::io::Error::last_os_error());
        let at = libc::shmat(id, std::ptr::null(), 0);
        ensure!(
            at as isize != -1,
            "shmat: {}",
            std::io::Error::last_os_error()
        );
        std::ptr::write_bytes(at.cast::<u8>(), fill, bytes);
        Ok((id, at as usize))
    }
}

fn bytes_at(at: usize, len: usize) -> Vec<u8> {
    // SAFETY: callers pass attached segments of at least that length.
    unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
}

fn segments(_: &Stage) -> Result<Check> {
    separate()?;
    let (id, at) = segment(0x1234, 100_000, 7)?;
    let (loose, loose_at) = segment(0x77, 5000, 9)?;
    let (doomed, doomed_at) = segment(libc::IPC_PRIVATE, 4096, 5)?;
    // SAFETY: `loose` is attached there and no longer used; removing takes no buffer.
    unsafe {
        libc::shmdt(loose_at as *const _);
        libc::shmctl(doomed, libc::IPC_RMID, std::ptr::null_mut());
    }
    Ok(Box::new(move |f: &mut Findings| {
        f.that("content", bytes_at(at, 100_000) == vec![7; 100_000]);
        let removed = bytes_at(doomed_at, 4096);
        f.that("content of the removed", removed == vec![5; 4096]);
        let line = listed("shm", id)?;
        let shown = [0, 2, 3, 6].map(|i| line[i].as_str());
        f.same(
            "key, mode, bytes, users",
            &["4660", "640", "100000", "1"],
            &shown,
        );
        let users = &listed("shm", loose)?[6];
        f.same("users of the unattached", "0", users.as_str());
        let mode = &listed("shm", doomed)?[2];
        f.same("mode of the removed", "1640", mode.as_str());
        // SAFETY: attaches the segment somewhere, reads, detaches.
        unsafe {
            let again = libc::shmat(loose, std::ptr::null(), libc::SHM_RDONLY);
            f.that(
                "the unattached",
                bytes_at(again as usize, 5000) == vec![9; 5000],
            );
            libc::shmdt(again);
        }
        Ok(())
    }))
}

fn send(id: i32, kind: i64, text: &[u8]) -> Result<()> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.extend_from_slice(text);
    // SAFETY: the buffer holds the type and the text.
    let r = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    ensure!(r == 0, "msgsnd: {}", std::io::Error::last_os_error());
    Ok(())
}

fn receive(id: i32, kind: i64) -> Result<Vec<u8>> {
    const ROOM: usize = 9000;
    let mut buffer = vec![0_u8; 8 + ROOM];
    let to = buffer.as_mut_ptr().cast();
    // SAFETY: the buffer has room for the type and `ROOM` bytes.
    let n = unsafe { libc::msgrcv(id, to, ROOM, kind, libc::IPC_NOWAIT) };
    ensure!(n >= 0, "msgrcv: {}", std::io::Error::last_os_error());
    Ok(buffer[8..8 + n as usize].to_vec())
}

fn queues(_: &Stage) -> Result<Check> {
    separate()?;
    // SAFETY: numbers only.
    let id = unsafe { libc::msgget(0x42, libc::IPC_CREAT | 0o600) };
    // SAFETY: numbers only.
    let other = unsafe { libc::msgget(0x43, libc::IPC_CREAT | 0o666) };
    ensure!(id >= 0 && other >= 0, "msgget");
    let fill = move || -> Result<()> {
        send(id, 1, b"first")?;
        send(id, 5, b"")?;
        send(id, 2, &vec![3; 8000])
    };
    fill()?;
    Ok(Box::new(move |f: &mut Findings| {
        let line = listed("msg", id)?;
        f.same(
            "key and how many",
            &["66", "3"],
            &[0, 4].map(|i| line[i].as_str()),
        );
        f.same("in the other", "0", listed("msg", other)?[4].as_str());
        f.that("by type", receive(id, 2)? == vec![3; 8000]);
        f.same("in order", &b"first"[..], &receive(id, 0)?[..]);
        f.same("empty", &b""[..], &receive(id, 0)?[..]);
        fill()
    }))
}

fn semaphores(_: &Stage) -> Result<Check> {
    const GETVAL: i32 = 12;
    const SETVAL: i32 = 16;
    separate()?;
    // SAFETY: numbers only.
    let id = unsafe { libc::semget(0x55, 3, libc::IPC_CREAT | 0o600) };
    // SAFETY: numbers only.
    let private = unsafe { libc::semget(libc::IPC_PRIVATE, 1, 0o666) };
    ensure!(id >= 0 && private >= 0, "semget");
    for (set, n, value) in [(id, 0, 4), (id, 1, 0), (id, 2, 30_000), (private, 0, 1)] {
        // SAFETY: the command takes the value itself.
        let r = unsafe { libc::semctl(set, n, SETVAL, value) };
        ensure!(r == 0, "semctl: {}", std::io::Error::last_os_error());
    }
    Ok(Box::new(move |f: &mut Findings| {
        // SAFETY: the command takes no argument.
        let value = |set, n| unsafe { libc::semctl(set, n, GETVAL) };
        let values = [value(id, 0), value(id, 1), value(id, 2), value(private, 0)];
        f.same("values", &[4, 0, 30_000, 1], &values);
        // SAFETY: numbers only.
        f.same("by key", &id, &unsafe { libc::semget(0x55, 3, 0) });
        f.same("mode", "666", listed("sem", private)?[2].as_str());
        Ok(())
    }))
}

fn shared(_: &Stage) -> Result<Check> {
    separate()?;
    let (_, at) = segment(0x99, 8192, 1)?;
    let child = Member::start("the child", move || {
        Ok(Box::new(move |f: &mut Findings| {
            f.that("what the parent wrote", bytes_at(at, 1)[0] > 1);
            Ok(())
        }) as Check)
    })?;
    let mut n = 1_u8;
    Ok(Box::new(move |f: &mut Findings| {
        f.same("before", &n, &bytes_at(at, 1)[0]);
        n += 1;
        // SAFETY: the first byte of an attached segment.
        unsafe { *(at as *mut u8) = n };
        child.check(f)
    }))
}

fn two(_: &Stage) -> Result<Check> {
    let mut members = Vec::new();
    for n in 1..3 {
        members.push(Member::start(&format!("process {n}"), move || {
            separate()?;
            let (id, at) = segment(0x11, 4096, n)?;
            Ok(Box::new(move |f: &mut Findings| {
                f.same("content", &n, &bytes_at(at, 1)[0]);
                f.same("key", "17", listed("shm", id)?[0].as_str());
                Ok(())
            }) as Check)
        })?);
    }
    Ok(Box::new(move |f: &mut Findings| {
        members.iter().try_for_each(|m| m.check(f))
    }))
}
