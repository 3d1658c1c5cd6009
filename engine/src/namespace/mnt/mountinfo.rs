//! `/proc/PID/mountinfo`, parsed as bytes (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::namespace::sys::attr;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Unique among living mounts.
    pub id: u32,
    /// The mount this one is mounted on (itself, or an unlisted one, for the root).
    pub parent: u32,
    /// Device number of the file system, major and minor.
    pub dev: (u32, u32),
    /// Which directory or file of the file system is the mount's root.
    pub root: PathBuf,
    /// Where it is mounted, relative to the reader's root.
    pub mountpoint: PathBuf,
    /// The mount's own flags, as `MOUNT_ATTR_*`.
    pub attrs: u64,
    /// Flags that this program does not know.
    pub unknown_flags: Vec<String>,
    /// Peer group, if shared.
    pub shared: Option<u32>,
    /// Peer group that it receives from, if slave.
    pub master: Option<u32>,
    /// Nearest peer group above that the reader's root can see.
    pub propagate_from: Option<u32>,
    /// Whether it may not be bound.
    pub unbindable: bool,
    /// Type of the file system, with subtype (`fuse.x`).
    pub fstype: String,
    /// What was mounted.
    pub source: OsString,
    /// Options of the file system itself, `rw` or `ro` first.
    pub options: Vec<OsString>,
}

impl MountInfo {
    /// Whether the file system itself is read-only.
    pub fn super_ro(&self) -> bool {
        self.options.iter().any(|o| o == "ro")
    }
}

/// Parses a whole mountinfo. `Err` is the number of the bad line, from 1.
pub fn parse(text: &[u8]) -> Result<Vec<MountInfo>, usize> {
    text.split(|&b| b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(i, line)| parse_line(line).ok_or(i + 1))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut dev = fields.next()?.splitn(2, |&b| b == b':');
    let dev = (number(dev.next()?)?, number(dev.next()?)?);
    let root = path(fields.next()?);
    let mountpoint = path(fields.next()?);
    let (attrs, unknown_flags) = parse_flags(fields.next()?);
    let mut m = MountInfo {
        id,
        parent,
        dev,
        root,
        mountpoint,
        attrs,
        unknown_flags,
        shared: None,
        master: None,
        propagate_from: None,
        unbindable: false,
        fstype: String::new(),
        source: OsString::new(),
        options: Vec::new(),
    };
    loop {
        let field = fields.next()?;
        if field == b"-" {
            break;
        }
        let mut parts = field.splitn(2, |&b| b == b':');
        let (tag, value) = (parts.next()?, parts.next());
        match tag {
            b"shared" => m.shared = Some(number(value?)?),
            b"master" => m.master = Some(number(value?)?),
            b"propagate_from" => m.propagate_from = Some(number(value?)?),
            b"unbindable" => m.unbindable = true,
            _ => {} // the format reserves further tags, to be ignored
        }
    }
    m.fstype = String::from_utf8(unescape(fields.next()?)).ok()?;
    m.source = OsString::from_vec(unescape(fields.next()?));
    m.options = fields
        .next()?
        .split(|&b| b == b',')
        .map(|o| OsString::from_vec(unescape(o)))
        .collect();
    fields.next().is_none().then_some(m)
}

fn parse_flags(field: &[u8]) -> (u64, Vec<String>) {
    let (mut attrs, mut relatime, mut unknown) = (0, false, Vec::new());
    for flag in field.split(|&b| b == b',') {
        attrs |= match flag {
            b"rw" => 0,
            b"ro" => attr::RDONLY,
            b"nosuid" => attr::NOSUID,
            b"nodev" => attr::NODEV,
            b"noexec" => attr::NOEXEC,
            b"noatime" => attr::NOATIME,
            b"nodiratime" => attr::NODIRATIME,
            b"nosymfollow" => attr::NOSYMFOLLOW,
            b"relatime" => {
                relatime = true;
                0
            }
            other => {
                unknown.push(String::from_utf8_lossy(other).into_owned());
                0
            }
        };
    }
    if !relatime && attrs & attr::NOATIME == 0 {
        attrs |= attr::STRICTATIME;
    }
    (attrs, unknown)
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's `\ooo`; a backslash that starts nothing stands for itself.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|o| {
            b == b'\\'
                && (b'0'..=b'3').contains(&o[0])
                && o.iter().all(|d| (b'0'..=b'7').contains(d))
        });
        if let Some(o) = octal {
            out.push(o.iter().fold(0, |v, d| v << 3 | (d - b'0')));
            rest = &after[3..];
        } else {
            out.push(b);
            rest = after;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_hardened_services_line() {
        let line = b"512 430 0:25 /systemd/inaccessible/dir /run/a\\040b ro,nosuid,nodev,noexec \
            shared:7 master:5 propagate_from:2 future:1 unbindable - tmpfs my\\134src rw,size=4k,mode=755\n";
        let all = parse(line).unwrap();
        let m = &all[0];
        assert_eq!((m.id, m.parent, m.dev), (512, 430, (0, 25)));
        assert_eq!(m.root.as_os_str(), "/systemd/inaccessible/dir");
        assert_eq!(m.mountpoint.as_os_str(), "/run/a b");
        let expected = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC | attr::STRICTATIME;
        assert_eq!(m.attrs, expected);
        assert_eq!(
            (m.shared, m.master, m.propagate_from),
            (Some(7), Some(5), Some(2))
        );
        assert!(m.unbindable);
        assert_eq!(
            (m.fstype.as_str(), m.source.as_bytes()),
            ("tmpfs", &b"my\\src"[..])
        );
        assert_eq!(m.options, ["rw", "size=4k", "mode=755"]);
    }

    #[test]
    fn this_threads_own_file_is_understood() {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        let all = parse(&text).unwrap();
        assert!(all.iter().any(|m| m.mountpoint.as_os_str() == "/"));
        assert!(all.iter().all(|m| m.unknown_flags.is_empty()));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(parse(b"1 2 0:1 / / rw - tmpfs t rw\n1 2 three\n"), Err(2));
    }

    /// What the kernel's show_mountinfo does to paths.
    fn escape(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for &b in bytes {
            if matches!(b, b' ' | b'\t' | b'\n' | b'\\' | b'#') {
                out.extend_from_slice(format!("\\{b:03o}").as_bytes());
            } else {
                out.push(b);
            }
        }
        out
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_named(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&text);
        }

        #[test]
        fn any_path_comes_back(name in proptest::collection::vec(1u8..=255, 1..40)) {
            let mut line = b"1 2 0:1 / ".to_vec();
            line.extend_from_slice(&escape(&name));
            line.extend_from_slice(b" rw,relatime - tmpfs t rw");
            let all = parse(&line).unwrap();
            prop_assert_eq!(all[0].mountpoint.as_os_str().as_bytes(), &name[..]);
        }
    }
}
