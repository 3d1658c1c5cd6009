//! Credentials: ids, groups, capabilities, user namespaces.

use std::fs;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new("creds/ids", "all ids and supplementary groups", ids),
    Case::new("creds/user", "an ordinary user without capabilities", user),
    Case::new(
        "creds/capabilities",
        "capability sets, ambient ones, securebits",
        capabilities,
    ),
    Case::new("creds/no-new-privs", "no_new_privs", no_new_privs),
    Case::new("creds/threads", "threads with ids of their own", threads),
    Case::new(
        "creds/dumpable",
        "processes that are not dumpable",
        dumpable,
    ),
    Case::new(
        "creds/user-namespace",
        "a user namespace with several threads",
        user_namespace,
    ),
    Case::new(
        "creds/user-namespace-user",
        "an ordinary user in a user namespace",
        user_namespace_user,
    ),
    Case::new(
        "creds/user-namespace-threads",
        "threads with ids of their own in a user namespace",
        user_namespace_threads,
    )
    .not_yet(),
];

/// What a process knows of its ids.
fn known() -> Result<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    let (u, g) = (getresuid()?, getresgid()?);
    Ok((
        [u.real, u.effective, u.saved].map(Uid::as_raw).to_vec(),
        [g.real, g.effective, g.saved].map(Gid::as_raw).to_vec(),
        nix::unistd::getgroups()?
            .into_iter()
            .map(Gid::as_raw)
            .collect(),
    ))
}

/// A forked process that changes for good, and looks the same afterwards.
fn changed(
    change: impl FnOnce() -> Result<()>,
    mut check: impl FnMut(&mut Findings) -> Result<()> + 'static,
) -> Result<Check> {
    let member = Member::start("the changed process", move || {
        change()?;
        let was = known()?;
        Ok(Box::new(move |f: &mut Findings| {
            f.same("uids, gids, groups", &was, &known()?);
            check(f)
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn uids(real: u32, effective: u32, saved: u32) -> Result<()> {
    let id = Uid::from_raw;
    Ok(setresuid(id(real), id(effective), id(saved))?)
}

fn gids(real: u32, effective: u32, saved: u32) -> Result<()> {
    let id = Gid::from_raw;
    Ok(setresgid(id(real), id(effective), id(saved))?)
}

fn ids(_: &Stage) -> Result<Check> {
    changed(
        || {
            setgroups(&[4, 27, 1000, 65_534].map(Gid::from_raw))?;
            gids(1000, 1001, 1002)?;
            uids(2000, 2001, 0)?;
            sys::numbers(libc::SYS_setfsuid, &[2000])?;
            Ok(())
        },
        |f| {
            // The way back to root was kept.
            uids(2000, 0, 0)?;
            uids(2000, 2001, 0)?;
            let fs = sys::numbers(libc::SYS_setfsuid, &[2000])?;
            f.same("file system uid", &2001, &fs);
            Ok(())
        },
    )
}

fn user(stage: &Stage) -> Result<Check> {
    let theirs = stage.path("theirs");
    fs::create_dir(&theirs)?;
    std::os::unix::fs::chown(&theirs, Some(1234), Some(1234))?;
    // So that the way there can be walked.
    changed(
        || {
            setgroups(&[])?;
            gids(1234, 1234, 1234)?;
            uids(1234, 1234, 1234)
        },
        |f| {
            let refused = uids(0, 0, 0).is_err();
            f.that("it may not become root", refused);
            let shadow = fs::read("/etc/shadow").map(drop).map_err(|e| e.kind());
            f.same(
                "a secret",
                &Err(std::io::ErrorKind::PermissionDenied),
                &shadow,
            );
            Ok(())
        },
    )
}

const CAP_CHOWN: i64 = 0;
const CAP_KILL: i64 = 5;
const CAP_NET_BIND_SERVICE: i64 = 10;
const CAP_SYS_CHROOT: i64 = 18;

/// Effective, permitted, inheritable sets by capset(2), version 3.
fn capset(effective: u64, permitted: u64, inheritable: u64) -> Result<()> {
    let header = [0x2008_0522_u32, 0];
    let sets = [effective, permitted, inheritable];
    let mut data = [0_u32; 6];
    for (i, s) in sets.into_iter().enumerate() {
        data[i] = s as u32;
        data[i + 3] = (s >> 32) as u32;
    }
    let args = [header.as_ptr() as u64, data.as_ptr() as u64, 0, 0, 0, 0];
    // SAFETY: header and data have the sizes of version 3.
    unsafe { sys::call(libc::SYS_capset, args) }?;
    Ok(())
}

fn capabilities(_: &Stage) -> Result<Check> {
    const PR_SET_SECUREBITS: i32 = 28;
    const PR_CAPBSET_DROP: i32 = 24;
    const PR_CAP_AMBIENT: i32 = 47;
    const RAISE: i64 = 2;
    const IS_SET: i64 = 1;
    // KEEP_CAPS is off, NOROOT with its lock, NO_SETUID_FIXUP.
    const BITS: i64 = 1 | 1 << 1 | 1 << 2;
    let status = || -> Result<Vec<String>> {
        let text = fs::read_to_string("/proc/self/status")?;
        let caps = text.lines().filter(|l| l.starts_with("Cap"));
        Ok(caps.map(str::to_owned).collect())
    };
    let bit = |c: i64| 1_u64 << c;
    let mut was = Vec::new();
    changed(
        move || {
            for cap in [21, 22, 39] {
                sys::prctl(PR_CAPBSET_DROP, &[cap, 0, 0, 0])?;
            }
            sys::prctl(PR_SET_SECUREBITS, &[BITS, 0, 0, 0])?;
            gids(33, 33, 33)?;
            uids(33, 33, 33)?;
            let bound = bit(CAP_NET_BIND_SERVICE);
            let permitted = bound | bit(CAP_KILL) | bit(CAP_SYS_CHROOT);
            capset(bound | bit(CAP_KILL), permitted, bound | bit(CAP_CHOWN))?;
            sys::prctl(PR_CAP_AMBIENT, &[RAISE, CAP_NET_BIND_SERVICE, 0, 0])?;
            Ok(())
        },
        move |f| {
            if was.is_empty() {
                was = status()?;
            }
            f.same("capabilities", &was, &status()?);
            f.same("securebits", &BITS, &sys::prctl(27, &[0, 0, 0, 0])?);
            let ambient = sys::prctl(PR_CAP_AMBIENT, &[IS_SET, CAP_NET_BIND_SERVICE, 0, 0])?;
            f.same("ambient", &1, &ambient);
            let low = std::net::TcpListener::bind("127.0.0.1:83").map(drop);
            f.same("a low port", &Ok(()), &low.map_err(|e| e.kind()));
            let refused = nix::unistd::chown("/tmp", Some(Uid::from_raw(33)), None);
            f.same("chown", &Err(nix::errno::Errno::EPERM), &refused);
            Ok(())
        },
    )
}

fn no_new_privs(_: &Stage) -> Result<Check> {
    nix::sys::prctl::set_no_new_privs()?;
    Ok(Box::new(move |f| {
        f.same("no_new_privs", &true, &nix::sys::prctl::get_no_new_privs()?);
        Ok(())
    }))
}

fn threads(_: &Stage) -> Result<Check> {
    let mut workers = Vec::new();
    for n in 0..3_i64 {
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        thread::spawn(move || {
            // Not libc's, which would change all threads.
            let uid = 3000 + n;
            let _ = sys::numbers(libc::SYS_setresgid, &[uid, uid, uid]);
            let _ = sys::numbers(libc::SYS_setresuid, &[uid, uid, 0]);
            loop {
                let ids = known().map_err(|e| e.to_string());
                if answered.send(ids).is_err() || asked.recv().is_err() {
                    return;
                }
            }
        });
        let was = answer.recv()?;
        ensure!(
            was.as_ref().is_ok_and(|w| w.0[0] == 3000 + n as u32),
            "{was:?}"
        );
        workers.push((ask, answer, was));
    }
    let own = known()?;
    Ok(Box::new(move |f| {
        f.same("the first thread", &own, &known()?);
        for (ask, answer, was) in &workers {
            ask.send(())?;
            f.same("a thread", was, &answer.recv()?);
        }
        Ok(())
    }))
}

fn dumpable(_: &Stage) -> Result<Check> {
    let member = Member::start("an undumpable process", || {
        nix::sys::prctl::set_dumpable(false)?;
        Ok(Box::new(|f: &mut Findings| {
            f.same("dumpable", &0, &sys::prctl(3, &[0, 0, 0, 0])?);
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        f.same("dumpable", &1, &sys::prctl(3, &[0, 0, 0, 0])?);
        member.check(f)
    }))
}

/// Enters a new user namespace with these maps, which a child writes.
fn enter_user_namespace(uid_map: &str, gid_map: &str) -> Result<()> {
    let me = std::process::id();
    let (mut told, tell) = std::io::pipe()?;
    // SAFETY: the child reads, writes two files and leaves.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            drop(tell);
            let ready = std::io::Read::read(&mut told, &mut [0]).is_ok();
            let done = ready
                && fs::write(format!("/proc/{me}/uid_map"), uid_map).is_ok()
                && fs::write(format!("/proc/{me}/gid_map"), gid_map).is_ok();
            // SAFETY: leaves at once.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            unshare(CloneFlags::CLONE_NEWUSER).context("unshare")?;
            drop(tell);
            let status = nix::sys::wait::waitpid(child, None)?;
            let fine = nix::sys::wait::WaitStatus::Exited(child, 0);
            ensure!(status == fine, "maps: {status:?}");
            Ok(())
        }
    }
}

fn user_namespace(_: &Stage) -> Result<Check> {
    // As systemd maps for PrivateUsers=: root, the service's user, nobody.
    let member = Member::start("the process in a user namespace", || {
        enter_user_namespace(
            "0 0 1\n33 33 1\n65534 65534 1",
            "0 0 1\n33 33 1\n65534 65534 1",
        )?;
        let mut workers = Vec::new();
        for _ in 0..3 {
            let (ask, asked) = mpsc::channel::<()>();
            let (answered, answer) = mpsc::channel();
            thread::spawn(move || {
                while answered
                    .send((sys::gettid(), known().map_err(|e| e.to_string())))
                    .is_ok()
                {
                    if asked.recv().is_err() {
                        return;
                    }
                }
            });
            let was = answer.recv()?;
            workers.push((ask, answer, was));
        }
        let maps = || -> Result<[String; 2]> {
            Ok([
                fs::read_to_string("/proc/self/uid_map")?,
                fs::read_to_string("/proc/self/gid_map")?,
            ])
        };
        let (was, was_mapped) = (known()?, maps()?);
        Ok(Box::new(move |f: &mut Findings| {
            f.same("ids", &was, &known()?);
            f.same("maps", &was_mapped, &maps()?);
            for (ask, answer, was) in &workers {
                ask.send(())?;
                f.same("a thread", was, &answer.recv()?);
            }
            let refused = nix::unistd::sethostname("of-the-host");
            f.that("capabilities end at the namespace", refused.is_err());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn user_namespace_user(_: &Stage) -> Result<Check> {
    changed(
        || {
            enter_user_namespace(
                "0 0 1\n33 33 1\n65534 65534 1",
                "0 0 1\n33 33 1\n65534 65534 1",
            )?;
            setgroups(&[Gid::from_raw(33)])?;
            gids(33, 33, 33)?;
            uids(33, 33, 33)?;
            Ok(nix::sys::prctl::set_no_new_privs()?)
        },
        |f| {
            f.that("it may not become root", uids(0, 0, 0).is_err());
            Ok(())
        },
    )
}

fn user_namespace_threads(stage: &Stage) -> Result<Check> {
    let words = sys::Map::forever(4096)?;
    let member = Member::start("the process in a user namespace", move || {
        let map = "0 0 1\n33 33 1";
        enter_user_namespace(map, map)?;
        let (ask, asked) = mpsc::channel::<()>();
        let (answered, answer) = mpsc::channel();
        thread::spawn(move || {
            // The call itself: libc's would change all threads.
            let done = sys::numbers(libc::SYS_setresuid, &[33, 33, 33]);
            let done = done.map_err(|e| e.to_string());
            let mine = || getresuid().map(|ids| ids.effective.as_raw());
            while answered.send((done.clone(), sys::gettid(), mine())).is_ok() {
                if asked.recv().is_err() {
                    return;
                }
            }
        });
        let was = answer.recv()?;
        ensure!(was.0.is_ok() && was.2 == Ok(33), "{was:?}");
        let tid = was.1 as u64;
        words
            .word(0)
            .store(tid, std::sync::atomic::Ordering::SeqCst);
        Ok(Box::new(move |f: &mut Findings| {
            ask.send(())?;
            f.same("the thread", &was, &answer.recv()?);
            Ok(())
        }) as Check)
    })?;
    let tid = words.word(0).load(std::sync::atomic::Ordering::SeqCst);
    stage.expect_refusal(&[
        format!("pid {}", member.pid),
        "credentials".into(),
        format!("thread {tid} has other ids"),
    ])?;
    Ok(Box::new(move |f| member.check(f)))
}
