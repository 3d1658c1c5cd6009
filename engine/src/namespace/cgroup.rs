//! Cgroup namespaces. What one shows as `/` is the cgroup that its maker was in
//! at that moment, so it is made again by a process that is there.

use std::os::fd::AsFd;

use nix::unistd::Pid;
use rustix::thread::LinkNameSpaceType;

use super::ids::{NsKind, comm, open_cgroup, owner_of};
use super::view::within;
use super::{NamespaceError, NsIds};
use crate::Refusal;

/// What stands in the way of carrying the cgroup namespace of a task, the first
/// one of its tree that is in it. Reads alone.
pub fn check_cgroup(pid: Pid) -> Result<Option<Refusal>, NamespaceError> {
    let host = NsIds::own()?;
    if NsIds::of(pid)?.same(&host, NsKind::Cgroup) {
        return Ok(None);
    }
    let refusal = |reason: String| Refusal {
        pid: pid.as_raw(),
        comm: comm(pid),
        object: "cgroup namespace".into(),
        reason,
        advice: "untag the unit or run it without a cgroup namespace".into(),
    };
    let ns = open_cgroup(pid)?;
    if owner_of(&ns)? != Some(host.get(NsKind::User)) {
        let reason = "it is owned by a user namespace other than the host's";
        return Ok(Some(refusal(reason.into())));
    }
    let path = format!("/proc/{pid}/cgroup");
    let inside = Some(ns.as_fd());
    let text = within(inside, LinkNameSpaceType::ControlGroup, || {
        std::fs::read_to_string(&path).map_err(NamespaceError::call("read", &path))
    })?;
    Ok(displaced(&text).map(|line| {
        refusal(format!(
            "the process is not in the cgroup that it shows as / ({line})"
        ))
    }))
}

/// The first hierarchy in which a task is not in its namespace's root
/// (cgroups(7), `/proc/PID/cgroup`).
fn displaced(text: &str) -> Option<&str> {
    let path = |line: &str| line.splitn(3, ':').nth(2).map(str::to_owned);
    text.lines().find(|line| path(line).as_deref() != Some("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_not_in_the_root_is_found() {
        assert_eq!(displaced("1:cpu,cpuacct:/\n0::/\n"), None);
        assert_eq!(displaced("1:cpu:/\n0::/a:b\n"), Some("0::/a:b"));
        assert_eq!(displaced("0::/../x\n"), Some("0::/../x"));
        assert_eq!(displaced("nonsense"), Some("nonsense"));
    }

    #[test]
    fn one_of_its_own_is_carried() {
        use nix::sched::{CloneFlags, unshare};
        let (tid, _keep) = crate::namespace::mnt::testing::parked(|| {
            unshare(CloneFlags::CLONE_NEWCGROUP).unwrap();
        });
        assert!(
            !NsIds::of(tid)
                .unwrap()
                .same(&NsIds::own().unwrap(), NsKind::Cgroup)
        );
        assert_eq!(check_cgroup(tid).unwrap(), None);
    }
}
