//! Preparing the host before systemd exists.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use rcr_systemd::handover::PseudoMount;

use super::host::Host;
use super::{cgroup, mountinfo};
use crate::progress::Made;
use crate::{kmsg, sys};

/// A file system that every system of ours has, as systemd mounts it
/// (`src/shared/mount-setup.c`).
struct ApiMount {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NOSUID_NODEV_NOEXEC: MsFlags = NOSUID_NODEV.union(MsFlags::MS_NOEXEC);

/// What finding out whether there is a store needs.
const BASE: [ApiMount; 4] = [
    ApiMount {
        fstype: "proc",
        target: "/proc",
        flags: NOSUID_NODEV_NOEXEC,
        options: "",
    },
    ApiMount {
        fstype: "sysfs",
        target: "/sys",
        flags: NOSUID_NODEV_NOEXEC,
        options: "",
    },
    ApiMount {
        fstype: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
    },
    ApiMount {
        fstype: "tmpfs",
        target: "/run",
        flags: NOSUID_NODEV,
        options: "mode=0755,size=20%,nr_inodes=800k",
    },
];

/// What restored processes need.
const REST: [ApiMount; 3] = [
    ApiMount {
        fstype: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0620,gid=5,ptmxmode=000",
    },
    ApiMount {
        fstype: "tmpfs",
        target: "/dev/shm",
        flags: NOSUID_NODEV,
        options: "mode=1777",
    },
    ApiMount {
        fstype: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: NOSUID_NODEV_NOEXEC,
        options: "nsdelegate,memory_recursiveprot",
    },
];

/// File systems without which a service would find its files, or put them, on
/// the one beneath. The others are doors to the kernel: systemd opens them in
/// time, and some (bpf) take a second to mount.
const HOLDS_FILES: [&str; 5] = ["tmpfs", "ramfs", "devpts", "mqueue", "hugetlbfs"];

/// What the worker does to the host.
pub trait Ground {
    /// Makes the host fit for restored processes: root writable as their open
    /// files want it, mounts shared as systemd will have them, loopback up.
    fn prepare(&self, pseudo_mounts: &[PseudoMount]) -> anyhow::Result<()>;

    /// Makes a unit's cgroup, empty.
    fn make_cgroup(&self, dir: &Path) -> anyhow::Result<()>;

    /// Kills everything in a unit's cgroup and removes it.
    fn clear_cgroup(&self, dir: &Path) -> anyhow::Result<()>;

    /// Removes a file or directory tree of a unit.
    fn clear_file(&self, path: &Path) -> anyhow::Result<()>;
}

/// Removes all that was made for units, as far as it goes.
pub fn clear(ground: &dyn Ground, made: &[Made]) {
    for Made {
        unit,
        cgroup,
        files,
    } in made
    {
        let cleared = ground.clear_cgroup(cgroup);
        let cleared = cleared.and_then(|()| files.iter().try_for_each(|f| ground.clear_file(f)));
        if let Err(error) = cleared {
            kmsg::warn(&format!("{unit}: {error:#}"));
        }
    }
}

/// Mounts what is needed to find the store.
pub fn mount_base() -> anyhow::Result<()> {
    BASE.iter()
        .try_for_each(|api| api.mount(is_base_mounted(api.target)))
}

impl Ground for Host {
    fn prepare(&self, pseudo_mounts: &[PseudoMount]) -> anyhow::Result<()> {
        remount_root_writable()?;
        let there = mounted()?;
        REST.iter()
            .try_for_each(|api| api.mount(is_in(&there, api.target)))?;
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_SHARED | MsFlags::MS_REC,
            None::<&str>,
        )
        .context("making mounts shared")?;
        let there = mounted()?;
        pseudo_mounts
            .iter()
            .filter(|wanted| HOLDS_FILES.contains(&wanted.fstype.as_str()))
            .filter(|wanted| !is_in(&there, &wanted.mountpoint))
            .try_for_each(mount_pseudo)?;
        // Listening on 127.0.0.1 needs the address to exist.
        sys::loopback_up().context("setting up the loopback interface")?;
        let output = self.output_dir();
        fs::create_dir_all(&output).with_context(|| output.display().to_string())
    }

    fn make_cgroup(&self, dir: &Path) -> anyhow::Result<()> {
        cgroup::create(&self.cgroup_root, dir)
    }

    fn clear_cgroup(&self, dir: &Path) -> anyhow::Result<()> {
        cgroup::kill_and_remove(dir)
    }

    fn clear_file(&self, path: &Path) -> anyhow::Result<()> {
        remove_from_tmpfs(path).with_context(|| format!("removing {}", path.display()))
    }
}

/// Removes what lies on tmpfs, which was empty before we restored it; nothing
/// that lasts on a disk is ever removed, whatever an image says.
fn remove_from_tmpfs(path: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let parent = path.parent().context("no path below a directory")?;
    if statfs(parent)?.filesystem_type() != TMPFS_MAGIC {
        return Ok(());
    }
    match metadata.is_dir() {
        true => fs::remove_dir_all(path)?,
        false => fs::remove_file(path)?,
    }
    Ok(())
}

impl ApiMount {
    fn mount(&self, is_mounted: bool) -> anyhow::Result<()> {
        if is_mounted {
            return Ok(());
        }
        let ApiMount {
            fstype,
            target,
            flags,
            options,
        } = self;
        fs::create_dir_all(target).with_context(|| (*target).to_owned())?;
        mount(
            Some(*fstype),
            *target,
            Some(*fstype),
            *flags,
            Some(*options),
        )
        .with_context(|| format!("mounting {target}"))
    }
}

/// Before /proc is there, mountinfo cannot be asked.
fn is_base_mounted(target: &str) -> bool {
    match target {
        "/proc" => Path::new("/proc/self").exists(),
        "/sys" => Path::new("/sys/kernel").exists(),
        _ => mounted().is_ok_and(|there| is_in(&there, target)),
    }
}

fn is_in(mountpoints: &[Vec<u8>], target: &str) -> bool {
    mountpoints.iter().any(|point| point == target.as_bytes())
}

fn mounted() -> anyhow::Result<Vec<Vec<u8>>> {
    let path = "/proc/self/mountinfo";
    Ok(mountinfo::mountpoints(&fs::read(path).context(path)?))
}

/// Remounts a read-only root with its other flags kept. The root file system
/// was checked in the initramfs.
fn remount_root_writable() -> anyhow::Result<()> {
    let flags = statvfs("/").context("statvfs /")?.flags();
    if !flags.contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let kept = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_SYNCHRONOUS, MsFlags::MS_SYNCHRONOUS),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let kept = kept
        .iter()
        .filter(|(from, _)| flags.contains(*from))
        .map(|(_, to)| *to);
    let flags = MsFlags::MS_REMOUNT.union(kept.collect());
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).context("remounting / writable")
}

/// Mounts one of the manifest's.
fn mount_pseudo(wanted: &PseudoMount) -> anyhow::Result<()> {
    let (flags, data) = split_options(&wanted.options);
    let target = Path::new(&wanted.mountpoint);
    fs::create_dir_all(target).with_context(|| wanted.mountpoint.clone())?;
    mount(
        Some(wanted.source.as_str()),
        target,
        Some(wanted.fstype.as_str()),
        flags,
        Some(data.as_str()),
    )
    .with_context(|| format!("mounting {} at {}", wanted.fstype, wanted.mountpoint))?;
    kmsg::info(&format!(
        "prepare: {} at {}",
        wanted.fstype, wanted.mountpoint
    ));
    Ok(())
}

/// Sorts options as mount(8) takes them into mount(2)'s flags and the rest.
fn split_options(options: &str) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for word in options.split(',').filter(|word| !word.is_empty()) {
        match word {
            "rw" | "defaults" | "suid" | "dev" | "exec" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            word if !data.contains(&word) => data.push(word),
            _ => {}
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_on_tmpfs_are_removed() {
        let on_tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
        let tree = on_tmpfs.path().join("redis");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("pid"), "1").unwrap();
        remove_from_tmpfs(&tree).unwrap();
        assert!(!tree.exists());
        remove_from_tmpfs(&tree).unwrap();
        let lasting = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        remove_from_tmpfs(&lasting).unwrap();
        assert!(lasting.exists());
    }

    #[test]
    fn options_are_flags_or_data() {
        let (flags, data) = split_options("rw,nosuid,nodev,relatime,rw,size=5120k,mode=1777");
        assert_eq!(flags, NOSUID_NODEV | MsFlags::MS_RELATIME);
        assert_eq!(data, "size=5120k,mode=1777");
        assert_eq!(split_options(""), (MsFlags::empty(), String::new()));
    }
}
