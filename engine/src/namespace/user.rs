//! User namespaces one level below the host's (`PrivateUsers=`).
//!
//! A task enters after everything that needs privileges in the host's user
//! namespace is done: mount and UTS namespaces belong to the host's and can no
//! longer be entered from here.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::Pid;

use super::NamespaceError;
use super::ids::open_ns;
use super::make::Helper;
use super::sys::{ns_owner_uid, spawn_in_new_userns};
use crate::image::schema::{UidGidExtent, UsernsEntry};
use crate::image::{ImageError, ImageSink, ImageSource, Kind, get_record, names, put_records};

/// What a user namespace has beyond its id maps.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RcrUsernsEntry {
    /// Whether setgroups(2) is allowed inside.
    #[prost(bool, tag = "1")]
    pub setgroups_allowed: bool,
    /// The host's uid that made it, and so has all privileges in it.
    #[prost(uint32, tag = "2")]
    pub owner_uid: u32,
}

/// A user namespace that no task needs to be in.
#[derive(Debug)]
pub struct UserNamespace {
    ns: OwnedFd,
}

impl UserNamespace {
    /// For setns(2) with `CLONE_NEWUSER`, by a single-threaded task.
    pub fn ns(&self) -> BorrowedFd<'_> {
        self.ns.as_fd()
    }
}

fn extra_name(ns_id: u32) -> String {
    format!("rcr-userns-{ns_id}.img")
}

/// Saves the user namespace a task is in: `userns-ID.img` and `rcr-userns-ID.img`.
pub fn save_user(pid: Pid, ns_id: u32, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
    let (maps, extra) = read_user(pid)?;
    put_records(sink, Kind::Userns, &names::userns(ns_id), &[maps])?;
    Ok(put_records(
        sink,
        Kind::RcrNamespaces,
        &extra_name(ns_id),
        &[extra],
    )?)
}

/// Id maps and the rest of the user namespace a task is in, seen from the host's.
pub fn read_user(pid: Pid) -> Result<(UsernsEntry, RcrUsernsEntry), NamespaceError> {
    let maps = UsernsEntry {
        uid_map: read_map(pid, "uid_map")?,
        gid_map: read_map(pid, "gid_map")?,
        ..UsernsEntry::default()
    };
    let path = format!("/proc/{pid}/setgroups");
    let setgroups = std::fs::read(&path).map_err(NamespaceError::call("read", &path))?;
    let path = format!("/proc/{pid}/ns/user");
    let owner_uid = ns_owner_uid(open_ns(&path)?)
        .map_err(NamespaceError::call("ioctl NS_GET_OWNER_UID", &path))?;
    let setgroups_allowed = setgroups.trim_ascii_end() != b"deny";
    Ok((
        maps,
        RcrUsernsEntry {
            setgroups_allowed,
            owner_uid,
        },
    ))
}

fn read_map(pid: Pid, file: &str) -> Result<Vec<UidGidExtent>, NamespaceError> {
    let path = format!("/proc/{pid}/{file}");
    let text = std::fs::read_to_string(&path).map_err(NamespaceError::call("read", &path))?;
    parse_map(&text).map_err(|line| NamespaceError::Format {
        path: path.into(),
        line,
    })
}

/// Parses an id map (user_namespaces(7)). `Err` is the number of the bad line, from 1.
pub(crate) fn parse_map(text: &str) -> Result<Vec<UidGidExtent>, usize> {
    let line = |line: &str| {
        let mut n = line.split_ascii_whitespace().map(str::parse);
        let mut next = || n.next()?.ok();
        Some(UidGidExtent {
            first: next()?,
            lower_first: next()?,
            count: next()?,
        })
    };
    text.lines()
        .enumerate()
        .map(|(i, l)| line(l).ok_or(i + 1))
        .collect()
}

/// Gives a new user namespace its id maps, by one of the tasks in it.
///
/// The caller has CAP_SETUID and CAP_SETGID on the host; maps are written once.
pub fn write_maps(
    pid: Pid,
    maps: &UsernsEntry,
    extra: &RcrUsernsEntry,
) -> Result<(), NamespaceError> {
    let write = |file: &str, text: String| {
        let path = format!("/proc/{pid}/{file}");
        let open = std::fs::OpenOptions::new().write(true).open(&path);
        // One write: the kernel takes a map whole.
        open.and_then(|mut f| f.write_all(text.as_bytes()))
            .map_err(NamespaceError::call("write", path))
    };
    if !extra.setgroups_allowed {
        write("setgroups", "deny".into())?;
    }
    let text = |map: &[UidGidExtent]| -> String {
        map.iter()
            .map(|e| format!("{} {} {}\n", e.first, e.lower_first, e.count))
            .collect()
    };
    if !maps.gid_map.is_empty() {
        write("gid_map", text(&maps.gid_map))?;
    }
    if !maps.uid_map.is_empty() {
        write("uid_map", text(&maps.uid_map))?;
    }
    Ok(())
}

/// Makes a user namespace below the caller's with the saved maps.
pub fn build_user(source: &dyn ImageSource, ns_id: u32) -> Result<UserNamespace, NamespaceError> {
    let maps: UsernsEntry = get_record(source, Kind::Userns, &names::userns(ns_id))?;
    let name = extra_name(ns_id);
    let extra: RcrUsernsEntry = get_record(source, Kind::RcrNamespaces, &name)?;
    if extra.owner_uid == u32::MAX {
        return Err(ImageError::Content {
            name,
            what: "owner uid -1".into(),
        }
        .into());
    }
    let child = Helper::start("user namespace", |ready| {
        spawn_in_new_userns(extra.owner_uid, ready)
    })?;
    write_maps(child.0, &maps, &extra)?;
    Ok(UserNamespace {
        ns: open_ns(&format!("/proc/{}/ns/user", child.0))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::mnt::testing::Memory;
    use proptest::prelude::*;

    fn extent(first: u32, lower_first: u32, count: u32) -> UidGidExtent {
        UidGidExtent {
            first,
            lower_first,
            count,
        }
    }

    /// Root and one service user, as systemd maps them for `PrivateUsers=yes`.
    fn like_systemd(sink: &mut Memory, setgroups_allowed: bool, owner_uid: u32) {
        let map = vec![extent(0, 0, 1), extent(105, 105, 1)];
        let maps = UsernsEntry {
            uid_map: map.clone(),
            gid_map: map,
            ..Default::default()
        };
        put_records(sink, Kind::Userns, &names::userns(3), &[maps]).unwrap();
        let extra = RcrUsernsEntry {
            setgroups_allowed,
            owner_uid,
        };
        put_records(sink, Kind::RcrNamespaces, &extra_name(3), &[extra]).unwrap();
    }

    #[test]
    fn maps_come_back_through_a_namespace() {
        for (setgroups, owner) in [(true, 0), (false, 0), (true, 105)] {
            let mut images = Memory::default();
            like_systemd(&mut images, setgroups, owner);
            let made = build_user(&images, 3).unwrap();
            assert_eq!(ns_owner_uid(made.ns()).unwrap(), owner);
            let fd = std::os::fd::AsRawFd::as_raw_fd(&made.ns());
            let seen = std::process::Command::new("nsenter")
                .arg(format!("--user=/proc/{}/fd/{fd}", std::process::id()))
                .args(["--preserve-credentials", "cat"])
                .args([
                    "/proc/self/uid_map",
                    "/proc/self/gid_map",
                    "/proc/self/setgroups",
                ])
                .output()
                .unwrap();
            let seen = String::from_utf8(seen.stdout).unwrap();
            let words: Vec<_> = seen.split_whitespace().collect();
            let map = ["0", "0", "1", "105", "105", "1"];
            let said = if setgroups { "allow" } else { "deny" };
            assert_eq!(words, [&map[..], &map[..], &[said]].concat());
        }
    }

    #[test]
    fn what_is_built_is_what_is_read() {
        let mut images = Memory::default();
        like_systemd(&mut images, false, 0);
        let maps: UsernsEntry = get_record(&images, Kind::Userns, &names::userns(3)).unwrap();
        let extra = RcrUsernsEntry {
            setgroups_allowed: false,
            owner_uid: 0,
        };
        let (read, write) = rustix::pipe::pipe().unwrap();
        let child = Helper(Pid::from_raw(spawn_in_new_userns(0, &write).unwrap()));
        rustix::io::read(&read, &mut [0; 4]).unwrap();
        write_maps(child.0, &maps, &extra).unwrap();
        assert_eq!(read_user(child.0).unwrap(), (maps, extra));
        assert!(
            crate::namespace::check_namespaces(child.0)
                .unwrap()
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_map_or_a_named_line(text in ".{0,80}") {
            let _ = parse_map(&text);
        }
    }

    #[test]
    fn a_map_as_the_kernel_prints_it() {
        let text = "         0          0          1\n       105        105          1\n";
        assert_eq!(
            parse_map(text),
            Ok(vec![extent(0, 0, 1), extent(105, 105, 1)])
        );
        assert_eq!(parse_map("0 0 1\n0 0\n"), Err(2));
    }
}
