//! Mount and UTS namespaces, as hardened units have them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "namespaces/private-tmp",
        "a private /tmp with files, open and unlinked",
        private_tmp,
    ),
    Case::new(
        "namespaces/protected-system",
        "read-only trees with writable places in them",
        protected_system,
    ),
    Case::new("namespaces/private-dev", "a private /dev", private_dev),
    Case::new(
        "namespaces/hidden-proc",
        "a /proc that hides other users' processes",
        hidden_proc,
    ),
    Case::new(
        "namespaces/hardened",
        "all of it together, as an ordinary user with threads",
        hardened,
    ),
    Case::new("namespaces/two", "two mount namespaces in a tree", two),
    Case::new("namespaces/uts", "host name of its own", uts),
];

/// A forked process with a mount namespace of its own.
/// An ordinary user who gets no privileges back, as services are.
pub(super) fn become_a_service() -> Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (uid, gid) = (Uid::from_raw(33), Gid::from_raw(33));
    setgroups(&[gid])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(nix::sys::prctl::set_no_new_privs()?)
}

fn inside(
    name: &str,
    change: impl FnOnce() -> Result<()>,
    check: impl FnMut(&mut Findings) -> Result<()> + 'static,
) -> Result<Member> {
    Member::start(name, move || {
        separate()?;
        change()?;
        let mut check = check;
        Ok(Box::new(move |f: &mut Findings| check(f)) as Check)
    })
}

/// As systemd does: a namespace that still receives the host's mounts.
fn separate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).context("slave")?;
    Ok(())
}

fn tmpfs(place: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some("tmpfs"), place, Some("tmpfs"), flags, Some(options))
        .with_context(|| format!("tmpfs on {place}"))
}

/// Binds a place onto itself, then takes away what `flags` say.
fn rebind(place: &str, flags: MsFlags) -> Result<()> {
    let none: Option<&str> = None;
    mount(
        Some(place),
        place,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .with_context(|| format!("bind of {place}"))?;
    let all = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    mount(none, place, none, all, none).with_context(|| format!("remount of {place}"))
}

fn is_read_only(place: &str) -> bool {
    let name = Path::new(place).join("rcr-conformance-probe");
    let made = File::create(&name);
    if made.is_ok() {
        let _ = fs::remove_file(name);
    }
    made.is_err_and(|e| e.raw_os_error() == Some(libc::EROFS))
}

/// A process with a private place for temporary files. The runner's own files
/// lie elsewhere: the tmpfs covers `/var/tmp`.
const TEMPORARY: &str = "/var/tmp";

fn fill_temporary() -> Result<()> {
    tmpfs(
        TEMPORARY,
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "mode=1777,size=8m",
    )?;
    fs::create_dir(format!("{TEMPORARY}/dir"))?;
    fs::write(format!("{TEMPORARY}/dir/file"), vec![3; 100_000])?;
    std::os::unix::fs::symlink("dir/file", format!("{TEMPORARY}/link"))?;
    fs::hard_link(format!("{TEMPORARY}/dir/file"), format!("{TEMPORARY}/twin"))?;
    std::os::unix::fs::chown(format!("{TEMPORARY}/dir/file"), Some(33), Some(34))?;
    Ok(())
}

fn check_temporary(f: &mut Findings) -> Result<()> {
    let file = fs::metadata(format!("{TEMPORARY}/dir/file"))?;
    let twin = fs::metadata(format!("{TEMPORARY}/twin"))?;
    f.same("owner", &(33, 34), &(file.uid(), file.gid()));
    f.same("links", &(2, file.ino()), &(file.nlink(), twin.ino()));
    f.that(
        "content by the link",
        fs::read(format!("{TEMPORARY}/link"))? == vec![3; 100_000],
    );
    f.same("mode", &0o1777, &(fs::metadata(TEMPORARY)?.mode() & 0o7777));
    Ok(())
}

fn private_tmp(_: &Stage) -> Result<Check> {
    let member = Member::start("the process with its own files", || {
        separate()?;
        fill_temporary()?;
        let path = format!("{TEMPORARY}/log");
        let mut log = File::options().append(true).create(true).open(&path)?;
        log.write_all(b"before")?;
        let mut gone = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(format!("{TEMPORARY}/gone"))?;
        gone.write_all(b"no name")?;
        fs::remove_file(format!("{TEMPORARY}/gone"))?;
        let mut want = String::from("before");
        Ok(Box::new(move |f: &mut Findings| {
            check_temporary(f)?;
            log.write_all(b" after")?;
            want += " after";
            f.same(
                "the log",
                want.as_str(),
                fs::read_to_string(&path)?.as_str(),
            );
            let mut text = String::new();
            std::io::Seek::rewind(&mut gone)?;
            gone.read_to_string(&mut text)?;
            f.same("the unlinked file", "no name", text.as_str());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        member.check(f)?;
        let outside = Path::new(TEMPORARY).join("dir/file");
        f.that("the host's place is another", !outside.exists());
        Ok(())
    }))
}

fn protected_system(stage: &Stage) -> Result<Check> {
    let writable = stage.path("writable");
    fs::create_dir(&writable)?;
    let theirs = writable.clone();
    let change = move || {
        let place = theirs.to_str().context("path")?;
        rebind(place, MsFlags::empty())?;
        for tree in ["/usr", "/etc"] {
            rebind(tree, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID)?;
        }
        // One that is hidden, as InaccessiblePaths= does.
        tmpfs("/opt", MsFlags::MS_RDONLY, "mode=000,size=4k")
    };
    let member = inside("the protected process", change, move |f| {
        f.that("/usr is read-only", is_read_only("/usr"));
        f.that("/etc is read-only", is_read_only("/etc"));
        f.same("/opt is empty", &0, &fs::read_dir("/opt")?.count());
        fs::write(writable.join("file"), "x")?;
        Ok(())
    })?;
    Ok(Box::new(move |f| {
        member.check(f)?;
        f.that("/usr is writable outside", !is_read_only("/usr"));
        Ok(())
    }))
}

fn make_dev() -> Result<()> {
    tmpfs("/dev", MsFlags::MS_NOSUID, "mode=755,size=4m")?;
    for (name, minor) in [
        ("null", 3),
        ("zero", 5),
        ("full", 7),
        ("random", 8),
        ("urandom", 9),
    ] {
        let path = format!("/dev/{name}");
        mknod(
            path.as_str(),
            SFlag::S_IFCHR,
            Mode::empty(),
            makedev(1, minor),
        )?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    fs::create_dir("/dev/shm")?;
    tmpfs(
        "/dev/shm",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "mode=1777",
    )?;
    std::os::unix::fs::symlink("/proc/self/fd", "/dev/fd")?;
    Ok(())
}

fn check_dev(f: &mut Findings) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir("/dev")?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    let want = ["fd", "full", "null", "random", "shm", "urandom", "zero"];
    f.same(
        "what is in /dev",
        want.map(str::to_owned).as_slice(),
        &names,
    );
    let mut bytes = [7; 8];
    File::open("/dev/zero")?.read_exact(&mut bytes)?;
    f.same("zeros", &[0; 8], &bytes);
    fs::write("/dev/null", "gone")?;
    f.same(
        "a link",
        Path::new("/proc/self/fd"),
        &fs::read_link("/dev/fd")?,
    );
    Ok(())
}

fn private_dev(_: &Stage) -> Result<Check> {
    let member = Member::start("the process with its own devices", || {
        separate()?;
        make_dev()?;
        fs::write("/dev/shm/shared", "in memory")?;
        let null = File::options().write(true).open("/dev/null")?;
        Ok(Box::new(move |f: &mut Findings| {
            check_dev(f)?;
            (&null).write_all(b"x")?;
            f.same(
                "a file in shm",
                "in memory",
                fs::read_to_string("/dev/shm/shared")?.as_str(),
            );
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn mount_proc() -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("hidepid=invisible,subset=pid");
    mount(Some("proc"), "/proc", Some("proc"), flags, options).context("proc")
}

fn hidden_proc(_: &Stage) -> Result<Check> {
    let member = inside("the process with its own /proc", mount_proc, |f| {
        f.that("no meminfo", !Path::new("/proc/meminfo").exists());
        let comm = fs::read_to_string("/proc/self/comm")?;
        f.same("its own name", "program\n", comm.as_str());
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let hidden = |l: &str| l.contains(" - proc ") && l.contains("hidepid=invisible");
        f.that("mount options", mounts.lines().any(hidden));
        Ok(())
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn hardened(stage: &Stage) -> Result<Check> {
    let state = stage.path("state");
    fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(33), Some(33))?;
    let member = Member::start("the hardened process", move || {
        separate()?;
        unshare(CloneFlags::CLONE_NEWUTS)?;
        nix::unistd::sethostname("sheltered")?;
        fill_temporary()?;
        make_dev()?;
        let place = state.to_str().context("path")?;
        rebind(place, MsFlags::MS_NOSUID)?;
        for tree in ["/usr", "/etc", "/root"] {
            rebind(tree, MsFlags::MS_RDONLY)?;
        }
        mount_proc()?;
        std::env::set_current_dir(&state)?;
        become_a_service()?;
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (answered, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let _ = answered.send(is_read_only("/usr"));
            }
        });
        Ok(Box::new(move |f: &mut Findings| {
            check_temporary(f)?;
            check_dev(f)?;
            let name = nix::unistd::gethostname()?;
            f.same("host name", "sheltered", &*name.to_string_lossy());
            ask.send(())?;
            // An ordinary user is told that it may not write, or that nobody may.
            let _ = answer.recv()?;
            fs::write("file", "in the state directory")?;
            let comm = fs::read_to_string("/proc/self/comm")?;
            f.same("its own name", "program\n", comm.as_str());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| member.check(f)))
}

fn two(_: &Stage) -> Result<Check> {
    let mut members = Vec::new();
    for n in 0..2 {
        let change = move || {
            tmpfs(TEMPORARY, MsFlags::empty(), "mode=755")?;
            Ok(fs::write(format!("{TEMPORARY}/number"), n.to_string())?)
        };
        members.push(inside(&format!("process {n}"), change, move |f| {
            let is = fs::read_to_string(format!("{TEMPORARY}/number"))?;
            f.same("its file", n.to_string().as_str(), is.as_str());
            Ok(())
        })?);
    }
    Ok(Box::new(move |f| {
        for m in &members {
            m.check(f)?;
        }
        Ok(())
    }))
}

fn uts(_: &Stage) -> Result<Check> {
    let host = nix::unistd::gethostname()?;
    let member = Member::start("the renamed process", || {
        unshare(CloneFlags::CLONE_NEWUTS)?;
        nix::unistd::sethostname("another-host")?;
        Ok(Box::new(|f: &mut Findings| {
            let name = nix::unistd::gethostname()?;
            f.same("host name", "another-host", &*name.to_string_lossy());
            Ok(())
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        f.same("the host's name", &host, &nix::unistd::gethostname()?);
        member.check(f)
    }))
}
