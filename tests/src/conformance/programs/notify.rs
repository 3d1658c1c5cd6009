//! inotify and fanotify: watches, marks, what was not read yet.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Result;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::refusals::expect;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "files/inotify",
        "inotify watches, each under its number",
        inotify,
    ),
    Case::new(
        "files/inotify-numbers",
        "inotify watch numbers with gaps",
        numbers,
    ),
    Case::new(
        "files/inotify-queue",
        "inotify events not read yet: reported as lost",
        queue,
    ),
    Case::new(
        "files/inotify-masks",
        "inotify watches for once, on links, without unlinked children",
        masks,
    ),
    Case::new(
        "files/inotify-unlinked",
        "an inotify watch on an open file without a name",
        unlinked,
    ),
    Case::new(
        "files/inotify-shared",
        "an inotify instance of two processes",
        shared,
    ),
    Case::new(
        "files/inotify-kernel",
        "inotify watches in sysfs and on a tmpfs",
        kernel,
    ),
    Case::new(
        "files/fanotify",
        "fanotify marks on a file and a directory, with an ignore mask",
        fanotify,
    ),
    Case::new(
        "files/fanotify-mount",
        "fanotify marks on a mount and a file system",
        fanotify_mount,
    ),
    Case::new(
        "refusals/fanotify-permission",
        "a fanotify group that is asked for permission",
        permission,
    )
    .refused(),
    Case::new(
        "refusals/fanotify-queue",
        "fanotify events that were not read",
        fanotify_queue,
    )
    .refused(),
];

fn make() -> Result<Inotify> {
    Ok(Inotify::init(
        InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC,
    )?)
}

/// What an instance has to tell: watch number, kind, name.
fn events(i: &Inotify) -> Result<Vec<(String, u32, String)>> {
    let all = match i.read_events() {
        Ok(all) => all,
        Err(nix::errno::Errno::EAGAIN) => Vec::new(),
        Err(e) => return Err(e.into()),
    };
    let one = |e: nix::sys::inotify::InotifyEvent| {
        let name = e.name.unwrap_or_default().to_string_lossy().into_owned();
        (number(e.wd), e.mask.bits(), name)
    };
    Ok(all.into_iter().map(one).collect())
}

/// A watch's number, which the type does not give away otherwise.
fn number(wd: WatchDescriptor) -> String {
    format!("{wd:?}")
}

fn inotify(stage: &Stage) -> Result<Check> {
    let (dir, file) = (stage.path("dir"), stage.path("file"));
    fs::create_dir(&dir)?;
    fs::write(&file, "x")?;
    let i = make()?;
    let on_dir = number(i.add_watch(&dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE)?);
    let on_file = number(i.add_watch(&file, AddWatchFlags::IN_MODIFY)?);
    Ok(Box::new(move |f| {
        f.same("events of the journey", &vec![], &events(&i)?);
        fs::write(dir.join("new"), "x")?;
        fs::remove_file(dir.join("new"))?;
        fs::OpenOptions::new()
            .append(true)
            .open(&file)
            .and_then(|mut a| a.write_all(b"y"))?;
        let want = vec![
            (on_dir.clone(), libc::IN_CREATE, "new".to_owned()),
            (on_dir.clone(), libc::IN_DELETE, "new".to_owned()),
            (on_file.clone(), libc::IN_MODIFY, String::new()),
        ];
        f.same("events", &want, &events(&i)?);
        Ok(())
    }))
}

fn numbers(stage: &Stage) -> Result<Check> {
    let i = make()?;
    let mut kept = Vec::new();
    for n in 0..40 {
        let path = stage.path(&format!("f{n}"));
        fs::write(&path, "")?;
        let wd = i.add_watch(&path, AddWatchFlags::IN_MODIFY)?;
        if n % 7 == 3 {
            kept.push((path, wd));
        } else {
            i.rm_watch(wd)?;
        }
    }
    events(&i)?;
    Ok(Box::new(move |f| {
        for (path, wd) in &kept {
            fs::write(path, "new")?;
            let told: Vec<String> = events(&i)?.into_iter().map(|e| e.0).collect();
            f.that(
                format!("watch {wd:?} of {}: {told:?}", path.display()),
                !told.is_empty() && told.iter().all(|n| *n == number(*wd)),
            );
        }
        Ok(())
    }))
}

fn queue(stage: &Stage) -> Result<Check> {
    let stage = stage.clone();
    let i = make()?;
    let wd = number(i.add_watch(&stage.files(), AddWatchFlags::IN_CREATE)?);
    fs::write(stage.path("0"), "")?;
    let mut turn = 0;
    Ok(Box::new(move |f| {
        let told = events(&i)?;
        let lost = told.iter().any(|e| e.1 & libc::IN_Q_OVERFLOW != 0);
        if stage.restored() {
            f.that(format!("told that events are lost: {told:?}"), lost);
            f.same("nothing else", &1, &told.len());
        } else {
            let want = vec![(wd.clone(), libc::IN_CREATE, turn.to_string())];
            f.same("still there", &want, &told);
        }
        turn += 1;
        fs::write(stage.path(&turn.to_string()), "")?;
        let want = vec![(wd.clone(), libc::IN_CREATE, turn.to_string())];
        f.same("new events", &want, &events(&i)?);
        turn += 1;
        fs::write(stage.path(&turn.to_string()), "")?;
        Ok(())
    }))
}

fn masks(stage: &Stage) -> Result<Check> {
    let (dir, once, link) = (stage.path("dir"), stage.path("once"), stage.path("link"));
    fs::create_dir(&dir)?;
    fs::write(&once, "")?;
    std::os::unix::fs::symlink(&once, &link)?;
    let i = make()?;
    let excl = AddWatchFlags::IN_MODIFY | AddWatchFlags::from_bits_retain(libc::IN_EXCL_UNLINK);
    let on_dir = number(i.add_watch(&dir, excl)?);
    let at_link = AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DONT_FOLLOW;
    let on_link = number(i.add_watch(&link, at_link)?);
    let for_once = AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_ONESHOT;
    i.add_watch(&once, for_once)?;
    Ok(Box::new(move |f| {
        f.same("events of the journey", &vec![], &events(&i)?);
        let inside = dir.join("inside");
        let file = File::create(&inside)?;
        fs::remove_file(&inside)?;
        (&file).write_all(b"x")?;
        f.same("a child without a name", &vec![], &events(&i)?);
        fs::write(&inside, "1")?;
        let told = events(&i)?;
        f.that(
            format!("a child with a name: {told:?}"),
            !told.is_empty() && told.iter().all(|e| e.0 == on_dir),
        );
        fs::remove_file(&inside)?;
        touch_link(&link)?;
        let want = vec![(on_link.clone(), libc::IN_ATTRIB, String::new())];
        f.same("the link itself", &want, &events(&i)?);
        // The first change ends the watch, and the end is an event.
        let mode: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&once, mode.clone())?;
        fs::set_permissions(&once, mode)?;
        let told: Vec<u32> = events(&i)?.into_iter().map(|e| e.1).collect();
        f.same("once", &vec![libc::IN_ATTRIB, libc::IN_IGNORED], &told);
        i.add_watch(&once, for_once)?;
        Ok(())
    }))
}

fn touch_link(link: &Path) -> Result<()> {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    let none = nix::fcntl::AT_FDCWD;
    let t = TimeSpec::new(1, 0);
    Ok(utimensat(
        none,
        link,
        &t,
        &t,
        UtimensatFlags::NoFollowSymlink,
    )?)
}

fn unlinked(stage: &Stage) -> Result<Check> {
    let path = stage.path("gone");
    let file = File::create(&path)?;
    let i = make()?;
    let wd = number(i.add_watch(&path, AddWatchFlags::IN_MODIFY)?);
    fs::remove_file(&path)?;
    events(&i)?;
    let mut turn = 0;
    Ok(Box::new(move |f| {
        turn += 1;
        file.set_len(turn)?;
        let want = vec![(wd.clone(), libc::IN_MODIFY, String::new())];
        f.same("a change", &want, &events(&i)?);
        Ok(())
    }))
}

fn shared(stage: &Stage) -> Result<Check> {
    let dir = stage.files();
    let i = make()?;
    let wd = number(i.add_watch(&dir, AddWatchFlags::IN_CREATE)?);
    let theirs = i.as_fd().try_clone_to_owned()?;
    let path = stage.path("sign");
    let sign = path.clone();
    let member = Member::start("the other process", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let _ = fs::remove_file(&sign);
            fs::write(&sign, "")?;
            let mut bytes = [0; 256];
            let n = File::from(theirs.try_clone()?).read(&mut bytes)?;
            f.that("the other process reads it", n > 0);
            fs::remove_file(&sign)?;
            fs::write(&sign, "")?;
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        member.check(f)?;
        let want = vec![(wd.clone(), libc::IN_CREATE, "sign".to_owned())];
        f.same("what the other has left", &want, &events(&i)?);
        Ok(())
    }))
}

fn kernel(stage: &Stage) -> Result<Check> {
    let shm = stage.in_memory();
    fs::create_dir(&shm)?;
    let i = make()?;
    i.add_watch("/sys/kernel", AddWatchFlags::IN_DELETE_SELF)?;
    let wd = number(i.add_watch(&shm, AddWatchFlags::IN_CREATE)?);
    let list = move |fd: i32| -> Result<Vec<String>> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        let mut lines: Vec<String> = text
            .lines()
            .filter(|l| l.starts_with("inotify"))
            .map(str::to_owned)
            .collect();
        lines.sort();
        Ok(lines)
    };
    let was = list(i.as_fd().as_raw_fd())?;
    Ok(Box::new(move |f| {
        f.same("watches", &was, &list(i.as_fd().as_raw_fd())?);
        fs::write(shm.join("new"), "")?;
        let want = vec![(wd.clone(), libc::IN_CREATE, "new".to_owned())];
        f.same("on the tmpfs", &want, &events(&i)?);
        fs::remove_file(shm.join("new"))?;
        Ok(())
    }))
}

/// A group that is told of what happens, or asked.
fn group(class: u32) -> Result<OwnedFd> {
    let flags = class | libc::FAN_NONBLOCK | libc::FAN_CLOEXEC;
    let fd = sys::numbers(
        libc::SYS_fanotify_init,
        &[flags.into(), libc::O_RDONLY.into()],
    )?;
    // SAFETY: the kernel has just returned it; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn mark(g: &OwnedFd, how: u32, what: u64, at: &Path) -> Result<()> {
    let at = CString::new(at.as_os_str().as_bytes())?;
    let (fd, how) = (g.as_raw_fd() as u64, how | libc::FAN_MARK_ADD);
    let here = libc::AT_FDCWD as u64;
    let args = [fd, how.into(), what, here, at.as_ptr() as u64, 0];
    // SAFETY: the path is NUL-terminated and outlives the call.
    unsafe { sys::call(libc::SYS_fanotify_mark, args) }?;
    Ok(())
}

/// What a group has to tell: the kind, and the file's name.
fn told(g: &OwnedFd) -> Result<Vec<(u64, String)>> {
    // struct fanotify_event_metadata: length, version, reserved, length of the
    // metadata, mask, descriptor, pid.
    const BYTES: usize = 24;
    let mut buffer = [0; 100 * BYTES];
    let n = match nix::unistd::read(g, &mut buffer) {
        Ok(n) => n,
        Err(nix::errno::Errno::EAGAIN) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut list = Vec::new();
    for e in buffer[..n].chunks_exact(BYTES) {
        let mask = u64::from_ne_bytes(e[8..16].try_into()?);
        let fd = i32::from_ne_bytes(e[16..20].try_into()?);
        anyhow::ensure!(fd >= 0, "an event without a file");
        // SAFETY: it came with the event, for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        list.push((mask, name.into_owned()));
    }
    Ok(list)
}

fn fanotify(stage: &Stage) -> Result<Check> {
    let (dir, file) = (stage.path("dir"), stage.path("file"));
    fs::create_dir(&dir)?;
    fs::write(dir.join("child"), "x")?;
    fs::write(dir.join("boring"), "x")?;
    fs::write(&file, "x")?;
    let g = group(libc::FAN_CLASS_NOTIF)?;
    mark(&g, 0, libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD, &dir)?;
    mark(&g, 0, libc::FAN_MODIFY, &file)?;
    let ignore = libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
    mark(&g, ignore, libc::FAN_OPEN, &dir.join("boring"))?;
    Ok(Box::new(move |f| {
        f.same("events of the journey", &vec![], &told(&g)?);
        File::open(dir.join("boring"))?;
        File::open(dir.join("child"))?;
        fs::write(&file, "yy")?;
        let open = (libc::FAN_OPEN, "child".to_owned());
        let all = told(&g)?;
        f.same("a child is opened", &Some(&open), &all.first());
        let modified = |e: &&(u64, String)| e.0 & libc::FAN_MODIFY != 0;
        f.same(
            "and the file changed",
            &1,
            &all[1..].iter().filter(modified).count(),
        );
        f.same("and nothing else", &2, &all.len());
        Ok(())
    }))
}

fn fanotify_mount(stage: &Stage) -> Result<Check> {
    let place = stage.path("mount");
    fs::create_dir(&place)?;
    let size = Some("size=1m");
    nix::mount::mount(
        Some("conformance"),
        &place,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        size,
    )?;
    fs::write(place.join("one"), "x")?;
    let (on_mount, on_fs) = (group(libc::FAN_CLASS_NOTIF)?, group(libc::FAN_CLASS_NOTIF)?);
    mark(&on_mount, libc::FAN_MARK_MOUNT, libc::FAN_OPEN, &place)?;
    mark(&on_fs, libc::FAN_MARK_FILESYSTEM, libc::FAN_MODIFY, &place)?;
    Ok(Box::new(move |f| {
        f.same("events of the journey", &vec![], &told(&on_mount)?);
        fs::OpenOptions::new()
            .write(true)
            .open(place.join("one"))
            .and_then(|mut w| w.write_all(b"y"))?;
        let one = |kind: u64| vec![(kind, "one".to_owned())];
        f.same("on the mount", &one(libc::FAN_OPEN), &told(&on_mount)?);
        f.same("on the file system", &one(libc::FAN_MODIFY), &told(&on_fs)?);
        Ok(())
    }))
}

fn permission(stage: &Stage) -> Result<Check> {
    let file = stage.path("guarded");
    fs::write(&file, "x")?;
    let g = group(libc::FAN_CLASS_CONTENT)?;
    mark(&g, 0, libc::FAN_OPEN_PERM, &file)?;
    expect(stage, &g, "fanotify")?;
    Ok(Box::new(move |f| {
        f.same("nobody asked", &0, &told(&g)?.len());
        Ok(())
    }))
}

fn fanotify_queue(stage: &Stage) -> Result<Check> {
    let file = stage.path("file");
    fs::write(&file, "x")?;
    let g = group(libc::FAN_CLASS_NOTIF)?;
    mark(&g, 0, libc::FAN_OPEN, &file)?;
    File::open(&file)?;
    stage.expect_dump_refusal(&[
        format!("program (pid {})", std::process::id()),
        "fanotify".into(),
    ])?;
    Ok(Box::new(move |f| {
        let want = vec![(libc::FAN_OPEN, "file".to_owned())];
        f.same("still there", &want, &told(&g)?);
        Ok(())
    }))
}
