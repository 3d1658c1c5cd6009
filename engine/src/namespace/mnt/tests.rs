//! A service's namespace saved on one pretended host and built on another.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use rustix::thread::UnshareFlags;

use super::compare::normalised;
use super::testing::{Memory, parked};
use super::{HostEnv, MountPolicy, build_mounts, check_mounts, save_mounts};
use crate::namespace::sys::unshare;
use crate::namespace::view::{MountView, on_own_thread};

const NONE: Option<&str> = None;
const HARD: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

fn tmpfs(at: &str, flags: MsFlags, options: &str) {
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options)).unwrap();
}

fn bind(from: &str, to: &str) {
    mount(
        Some(from),
        to,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .unwrap();
}

fn remount(at: &str, flags: MsFlags) {
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(NONE, at, NONE, flags, NONE).unwrap();
}

fn propagate(at: &str, how: MsFlags) {
    mount(NONE, at, NONE, how | MsFlags::MS_REC, NONE).unwrap();
}

/// What is there before systemd: a private `/run`, everything shared.
fn early_boot() {
    unshare(UnshareFlags::NEWNS).unwrap();
    propagate("/", MsFlags::MS_PRIVATE);
    propagate("/", MsFlags::MS_SHARED);
    tmpfs(
        "/run",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "size=10%,mode=755",
    );
}

/// What systemd adds.
fn full_boot() {
    early_boot();
    tmpfs(
        "/tmp",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "size=50%,nr_inodes=1m,mode=1777",
    );
    for dir in [
        "/run/lock",
        "/run/mqueue",
        "/run/unit",
        "/run/credentials/other.service",
    ] {
        fs::create_dir_all(dir).unwrap();
    }
    tmpfs("/run/lock", HARD, "size=5120k");
    tmpfs("/run/credentials/other.service", HARD, "mode=700");
    mount(Some("mqueue"), "/run/mqueue", Some("mqueue"), HARD, NONE).unwrap();
    fs::create_dir_all("/run/systemd/inaccessible/dir").unwrap();
    fs::set_permissions(
        "/run/systemd/inaccessible/dir",
        fs::Permissions::from_mode(0o0),
    )
    .unwrap();
    let none = Mode::empty();
    mknod("/run/systemd/inaccessible/reg", SFlag::S_IFREG, none, 0).unwrap();
    mknod(
        "/run/systemd/inaccessible/chr",
        SFlag::S_IFCHR,
        none,
        makedev(0, 0),
    )
    .unwrap();
    mknod("/run/systemd/inaccessible/sock", SFlag::S_IFSOCK, none, 0).unwrap();
}

fn private_tmp(boot: &str) -> String {
    format!("/tmp/systemd-private-{boot}-unit.service-aBcDeF/tmp")
}

/// What systemd does for a hardened unit.
fn hardened() {
    let private = private_tmp(&HostEnv::current().unwrap().boot_id);
    fs::create_dir_all(&private).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(format!("{private}/scratch"), b"kept across the boot").unwrap();
    unshare(UnshareFlags::NEWNS).unwrap();
    propagate("/", MsFlags::MS_SLAVE);
    // TemporaryFileSystem=, BindPaths=
    tmpfs("/run/unit", MsFlags::MS_NOSUID, "mode=755");
    fs::create_dir("/run/unit/state").unwrap();
    fs::write("/run/unit/state/file", b"in a file system of its own").unwrap();
    bind("/run/unit/state", "/run/unit/state");
    remount("/run/unit", MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
    // PrivateTmp=
    bind(&private, "/tmp");
    // PrivateDevices=
    tmpfs(
        "/run/lock",
        MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME,
        "mode=755,size=4096k",
    );
    mknod(
        "/run/lock/null",
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )
    .unwrap();
    symlink("/run/systemd/journal/dev-log", "/run/lock/log").unwrap();
    fs::create_dir("/run/lock/mqueue").unwrap();
    bind("/run/mqueue", "/run/lock/mqueue");
    remount(
        "/run/lock",
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
    );
    // ProtectProc=, ProtectKernelTunables=
    mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        HARD,
        Some("hidepid=invisible,subset=pid"),
    )
    .unwrap();
    // ProtectHome=, InaccessiblePaths=
    bind("/run/systemd/inaccessible/dir", "/root");
    bind("/run/systemd/inaccessible/reg", "/etc/hostname");
    remount(
        "/etc/hostname",
        MsFlags::MS_RDONLY | HARD | MsFlags::MS_NOATIME,
    );
}

/// Saves `tid`'s namespace as seen from this thread.
fn saved(tid: Pid) -> Memory {
    let mut images = Memory::default();
    let refused = save_mounts(
        tid,
        1,
        &MountPolicy::default(),
        &Default::default(),
        &mut images,
    )
    .unwrap();
    assert_eq!(refused, []);
    images
}

/// Runs on a pretended host and hands back what it found.
fn on_host<T: Send>(boot: fn(), work: impl FnOnce() -> T + Send) -> T {
    on_own_thread("test", || {
        boot();
        Ok(work())
    })
    .unwrap()
}

fn assert_same(before: &[String], after: &[String]) {
    for (b, a) in before.iter().zip(after) {
        assert_eq!(b, a);
    }
    assert_eq!(before.len(), after.len(), "{before:#?}\n{after:#?}");
}

/// `left_out` comes later in the boot, or is mounted twice on this machine.
fn roundtrip(service: fn(), left_out: &[&str], seen: impl FnOnce(&Path) + Send) {
    let old_boot = HostEnv::current().unwrap().boot_id;
    let (images, before) = on_host(full_boot, || {
        let (tid, _keep) = parked(service);
        assert_eq!(
            check_mounts(tid, &MountPolicy::default(), &Default::default()).unwrap(),
            []
        );
        let mut mounts = MountView::of(tid).unwrap().mounts;
        mounts.retain(|m| !left_out.iter().any(|o| m.mountpoint.starts_with(o)));
        (saved(tid), mounts)
    });
    let new = HostEnv {
        boot_id: "0123456789abcdef".repeat(2),
        ..HostEnv::current().unwrap()
    };
    on_host(early_boot, || {
        let made = build_mounts(&images, 1, &new, &super::Beside::default()).unwrap();
        let ns = made.ns().try_clone_to_owned().unwrap();
        let mut after = MountView::at(ns).unwrap().mounts;
        after.retain(|m| !left_out.iter().any(|o| m.mountpoint.starts_with(o)));
        let (b, a) = (
            normalised(&before, &old_boot),
            normalised(&after, &new.boot_id),
        );
        assert_same(&b, &a);
        let root = format!(
            "/proc/thread-self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&made.root())
        );
        seen(Path::new(&root));
        let _ = made.root().as_fd();
    });
}

#[test]
fn a_hardened_namespace_comes_back_over_an_early_boot() {
    roundtrip(hardened, &["/run/credentials", "/dev"], |root| {
        let read = |p: &str| fs::read(root.join(p)).unwrap();
        assert_eq!(read("tmp/scratch"), b"kept across the boot");
        assert_eq!(read("run/unit/state/file"), b"in a file system of its own");
        assert_eq!(
            fs::read_link(root.join("run/lock/log")).unwrap(),
            Path::new("/run/systemd/journal/dev-log")
        );
        assert!(fs::write(root.join("run/unit/x"), b"").is_err());
        assert!(fs::write(root.join("run/lock/null"), b"into nothing").is_ok());
    });
}

/// Shared mounts with peers and slaves inside the namespace.
fn grouped() {
    unshare(UnshareFlags::NEWNS).unwrap();
    propagate("/", MsFlags::MS_SLAVE);
    tmpfs("/run/unit", MsFlags::empty(), "mode=755");
    for dir in ["/run/unit/a", "/run/unit/a/b"] {
        fs::create_dir(dir).unwrap();
    }
    propagate("/", MsFlags::MS_SHARED);
    bind("/run/unit/a", "/run/lock"); // a narrower peer of /run/unit
    bind("/run/unit", "/tmp");
    propagate("/tmp", MsFlags::MS_SLAVE);
    mount(Some("proc"), "/run/mqueue", Some("proc"), HARD, NONE).unwrap();
    propagate("/run/mqueue", MsFlags::MS_UNBINDABLE);
}

#[test]
fn peer_groups_and_slaves_within_the_namespace_come_back() {
    roundtrip(grouped, &["/run/credentials", "/dev"], |root| {
        // What is mounted in one peer appears in the others, and in the slave.
        assert!(root.join("tmp/a/b").exists() && root.join("run/lock/b").exists());
    });
}

/// A namespace that was never cut off from the host.
fn peers_of_the_host() {
    unshare(UnshareFlags::NEWNS).unwrap();
    tmpfs("/run/unit", MsFlags::empty(), "mode=755");
}

#[test]
fn peers_of_the_host_come_back_as_such() {
    let left_out = [
        "/run/credentials",
        "/run/lock",
        "/run/mqueue",
        "/tmp",
        "/run/unit",
        "/dev",
    ];
    roundtrip(peers_of_the_host, &left_out, |_| {});
}
