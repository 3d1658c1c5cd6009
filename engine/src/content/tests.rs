//! Trees saved and restored.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::{CWD, XattrFlags, setxattr};

use super::*;
use crate::image::{ImageSink, Kind, put_records};
use crate::namespace::mnt::testing::Memory;

fn dir(path: &Path) -> OwnedFd {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    rustix::fs::openat(CWD, path, flags, rustix::fs::Mode::empty()).unwrap()
}

fn saved(path: &Path) -> Memory {
    let mut images = Memory::default();
    save_tree(dir(path).as_fd(), "t", &mut images).unwrap();
    images
}

#[test]
fn every_kind_of_node_comes_back() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let at = |name: &str| from.path().join(name);
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("dir/file"), b"bytes").unwrap();
    fs::hard_link(at("dir/file"), at("dir/same")).unwrap();
    symlink("nowhere/at all", at("link")).unwrap();
    mknod(
        &at("fifo"),
        SFlag::S_IFIFO,
        Mode::from_bits_truncate(0o640),
        0,
    )
    .unwrap();
    mknod(
        &at("null"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )
    .unwrap();
    let _listener = UnixListener::bind(at("socket")).unwrap();
    chown(at("dir/file"), Some(105), Some(106)).unwrap();
    fs::set_permissions(at("dir/file"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(at("dir"), fs::Permissions::from_mode(0o2755)).unwrap();
    setxattr(at("dir/file"), "trusted.rcr", b"value", XattrFlags::empty()).unwrap();

    let images = saved(from.path());
    restore_tree(&images, "t", dir(to.path()).as_fd()).unwrap();
    restore_tree(&images, "t", dir(to.path()).as_fd()).unwrap(); // over itself
    for name in ["dir", "dir/file", "dir/same", "link", "fifo", "null"] {
        let facts = |p: PathBuf| {
            let m = fs::symlink_metadata(p).unwrap();
            let dir_or = |n| if m.is_dir() { 0 } else { n };
            let times = (m.mtime(), m.mtime_nsec());
            (
                m.mode(),
                m.uid(),
                m.gid(),
                m.rdev(),
                dir_or(m.size()),
                dir_or(m.nlink()),
                times,
            )
        };
        assert_eq!(facts(at(name)), facts(to.path().join(name)), "{name}");
    }
    assert_eq!(fs::read(to.path().join("dir/same")).unwrap(), b"bytes");
    assert_eq!(
        fs::read_link(to.path().join("link")).unwrap(),
        Path::new("nowhere/at all")
    );
    assert!(!to.path().join("socket").exists());
    let mut value = [0; 16];
    let n =
        rustix::fs::getxattr(to.path().join("dir/file"), "trusted.rcr", &mut value[..]).unwrap();
    assert_eq!(&value[..n], b"value");
}

#[test]
fn holes_stay_holes() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = fs::File::create(from.path().join("sparse")).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"middle", 32 << 20).unwrap();
    let mut images = Memory::default();
    let stats = save_tree(dir(from.path()).as_fd(), "t", &mut images).unwrap();
    assert!(stats.data_bytes < 1 << 20, "{stats:?}");
    restore_tree(&images, "t", dir(to.path()).as_fd()).unwrap();
    let back = fs::File::open(to.path().join("sparse")).unwrap();
    let meta = back.metadata().unwrap();
    assert_eq!(meta.len(), 64 << 20);
    assert!(meta.blocks() * 512 < 1 << 20);
    let mut bytes = [0; 6];
    back.read_exact_at(&mut bytes, 32 << 20).unwrap();
    assert_eq!(&bytes, b"middle");
}

#[test]
fn chosen_paths_come_back_with_the_way_to_them() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir_all(from.path().join("run/redis/deep")).unwrap();
    fs::write(from.path().join("run/redis/deep/file"), b"x").unwrap();
    fs::write(from.path().join("run/nginx.pid"), b"42\n").unwrap();
    fs::write(from.path().join("run/other"), b"not carried").unwrap();
    fs::set_permissions(
        from.path().join("run/redis"),
        fs::Permissions::from_mode(0o2755),
    )
    .unwrap();
    let paths = [
        "/run/redis",
        "/run/redis/deep",
        "/run/nginx.pid",
        "/run/absent/x",
    ];
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let mut images = Memory::default();
    save_paths(dir(from.path()).as_fd(), &paths, "u", &mut images).unwrap();
    fs::create_dir(to.path().join("run")).unwrap();
    fs::set_permissions(to.path().join("run"), fs::Permissions::from_mode(0o700)).unwrap();
    restore_paths(dir(to.path()).as_fd(), &images, "u").unwrap();
    assert_eq!(
        fs::read(to.path().join("run/redis/deep/file")).unwrap(),
        b"x"
    );
    assert_eq!(fs::read(to.path().join("run/nginx.pid")).unwrap(), b"42\n");
    assert!(!to.path().join("run/other").exists());
    let mode = |p: &str| fs::metadata(to.path().join(p)).unwrap().mode() & 0o7777;
    assert_eq!((mode("run"), mode("run/redis")), (0o700, 0o2755));
    let climbing = [PathBuf::from("/run/../etc")];
    let refused = save_paths(dir(from.path()).as_fd(), &climbing, "v", &mut images);
    assert!(matches!(refused, Err(ContentError::Path { .. })));
}

#[test]
fn a_forged_image_cannot_leave_the_tree() {
    let to = tempfile::tempdir().unwrap();
    let inside = to.path().join("tree");
    fs::create_dir(&inside).unwrap();
    symlink("..", inside.join("out")).unwrap();
    let file = |path: &str| NodeEntry {
        path: path.into(),
        kind: NodeKind::File.into(),
        ..NodeEntry::default()
    };
    let beyond = NodeEntry {
        size: 10,
        extents: vec![ExtentEntry {
            file_offset: 0,
            data_offset: u64::MAX,
            len: 10,
        }],
        ..file("f")
    };
    for node in [
        file("../escaped"),
        file("/escaped"),
        file("out/escaped"),
        beyond,
    ] {
        let mut images = Memory::default();
        let tree = TreeEntry {
            nodes: vec![node],
            data_bytes: 0,
        };
        put_records(&mut images, Kind::RcrContent, "rcr-tree-t.img", &[tree]).unwrap();
        images.put("rcr-tree-t.dat", b"short").unwrap();
        assert!(restore_tree(&images, "t", dir(&inside).as_fd()).is_err());
        assert!(!to.path().join("escaped").exists());
    }
}
