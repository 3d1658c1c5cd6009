//! Mounts of the host that services stand on and that early boot has not.

use std::{fs, io};

use crate::handover::PseudoMount;

/// Filesystems that a kernel offers without a device.
const PSEUDO: [&str; 13] = [
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "hugetlbfs",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "fusectl",
    "pstore",
    "bpf",
    "efivarfs",
];

/// What every initramfs mounts, and what belongs to one boot alone.
const EXCLUDED: [&str; 7] = [
    "/dev",
    "/run",
    "/proc",
    "/sys",
    "/run/credentials",
    "/run/user",
    "/dev/rcr",
];

/// The pseudo filesystems that PID 1 has mounted, in order.
pub fn pseudo_mounts() -> io::Result<Vec<PseudoMount>> {
    Ok(parse(&fs::read_to_string("/proc/1/mountinfo")?))
}

pub(crate) fn parse(mountinfo: &str) -> Vec<PseudoMount> {
    let mut mounts: Vec<PseudoMount> = Vec::new();
    for line in mountinfo.lines() {
        let Some(mount) = parse_line(line) else {
            continue;
        };
        // A later mount lies on top of an earlier one.
        mounts.retain(|earlier| earlier.mountpoint != mount.mountpoint);
        mounts.push(mount);
    }
    mounts.retain(|mount| PSEUDO.contains(&mount.fstype.as_str()));
    mounts
}

/// One line of proc_pid_mountinfo(5).
fn parse_line(line: &str) -> Option<PseudoMount> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<&str> = left.split(' ').collect();
    let right: Vec<&str> = right.split(' ').collect();
    let (root, mountpoint, options) = (left.get(3)?, left.get(4)?, left.get(5)?);
    let (fstype, source, super_options) = (right.first()?, right.get(1)?, right.get(2)?);
    let mountpoint = unescape(mountpoint);
    let excluded = EXCLUDED.contains(&mountpoint.as_str())
        || mountpoint.starts_with("/run/credentials/")
        || mountpoint.starts_with("/run/user/");
    if *root != "/" || excluded {
        return None;
    }
    let per_mount = options.split(',').filter(|o| *o != "rw");
    let of_super = super_options
        .split(',')
        .filter(|o| !matches!(*o, "rw" | "ro"));
    Some(PseudoMount {
        mountpoint,
        fstype: (*fstype).to_owned(),
        source: unescape(source),
        options: per_mount.chain(of_super).collect::<Vec<_>>().join(","),
    })
}

/// Undoes `\040` and the like.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pseudo_filesystems_are_found() {
        let text = "\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
23 22 0:5 / /dev rw,nosuid shared:2 - devtmpfs udev rw,size=1024k\n\
24 22 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=200k,mode=755\n\
25 22 0:30 / /tmp rw,nosuid,nodev shared:9 - tmpfs tmpfs rw,size=500k,nr_inodes=1048576\n\
26 24 0:31 / /run/lock rw,nosuid shared:9 - tmpfs none rw,size=5120k\n\
27 24 0:31 /sub /mnt/bind rw shared:9 - tmpfs none rw\n\
28 23 0:40 / /dev/hugepages rw,relatime shared:9 - autofs systemd-1 rw,fd=1\n\
29 28 0:41 / /dev/hugepages rw,relatime shared:9 - hugetlbfs hugetlbfs rw,pagesize=2M\n\
30 24 0:42 / /run/credentials/a.service ro,nosuid - tmpfs tmpfs rw\n\
31 22 0:43 / /mnt/a\\040b ro - tmpfs a\\134b rw\n";
        let mounts = parse(text);
        let shown: Vec<_> = mounts
            .iter()
            .map(|m| (m.mountpoint.as_str(), m.options.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                ("/tmp", "nosuid,nodev,size=500k,nr_inodes=1048576"),
                ("/run/lock", "nosuid,size=5120k"),
                ("/dev/hugepages", "relatime,pagesize=2M"),
                ("/mnt/a b", "ro"),
            ]
        );
        assert_eq!(mounts[3].source, "a\\b");
    }

    #[test]
    fn this_machine_is_read() {
        pseudo_mounts().unwrap();
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(text in "\\PC{0,80}") {
            parse(&text);
        }
    }
}
