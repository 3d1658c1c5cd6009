//! UTS namespaces: host name and NIS domain name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::Pid;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::NamespaceError;
use super::ids::open_ns;
use super::sys::unshare;
use super::view::on_own_thread;
use crate::image::schema::UtsnsEntry;
use crate::image::{ImageSink, ImageSource, Kind, get_record, names, put_records};

/// A UTS namespace that no task needs to be in.
#[derive(Debug)]
pub struct UtsNamespace {
    ns: OwnedFd,
}

impl UtsNamespace {
    /// For setns(2) with `CLONE_NEWUTS`.
    pub fn ns(&self) -> BorrowedFd<'_> {
        self.ns.as_fd()
    }
}

/// Saves the names of the UTS namespace a task is in, as `utsns-ID.img`.
pub fn save_uts(pid: Pid, ns_id: u32, sink: &mut dyn ImageSink) -> Result<(), NamespaceError> {
    let entry = read_uts(pid)?;
    Ok(put_records(
        sink,
        Kind::Utsns,
        &names::utsns(ns_id),
        &[entry],
    )?)
}

/// The names of the UTS namespace a task is in.
pub fn read_uts(pid: Pid) -> Result<UtsnsEntry, NamespaceError> {
    let ns = open_ns(&format!("/proc/{pid}/ns/uts"))?;
    on_own_thread("UTS namespace", || {
        let kind = LinkNameSpaceType::HostNameAndNISDomainName;
        move_into_link_name_space(ns.as_fd(), Some(kind))
            .map_err(NamespaceError::call("setns", "UTS namespace"))?;
        let names = rustix::system::uname();
        Ok(UtsnsEntry {
            nodename: names.nodename().to_string_lossy().into_owned(),
            domainname: names.domainname().to_string_lossy().into_owned(),
        })
    })
}

/// Makes a UTS namespace, owned by the caller's user namespace, with the saved names.
pub fn restore_uts(source: &dyn ImageSource, ns_id: u32) -> Result<UtsNamespace, NamespaceError> {
    let entry: UtsnsEntry = get_record(source, Kind::Utsns, &names::utsns(ns_id))?;
    on_own_thread("UTS namespace", || {
        let err = |call| NamespaceError::call(call, "UTS namespace");
        unshare(UnshareFlags::NEWUTS).map_err(err("unshare"))?;
        rustix::system::sethostname(entry.nodename.as_bytes()).map_err(err("sethostname"))?;
        rustix::system::setdomainname(entry.domainname.as_bytes()).map_err(err("setdomainname"))?;
        Ok(UtsNamespace {
            ns: open_ns("/proc/thread-self/ns/uts")?,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::mnt::testing::{Memory, parked};

    #[test]
    fn names_come_back() {
        let (tid, _keep) = parked(|| {
            unshare(UnshareFlags::NEWUTS).unwrap();
            rustix::system::sethostname(b"hardened").unwrap();
            rustix::system::setdomainname(b"example.org").unwrap();
        });
        let mut images = Memory::default();
        save_uts(tid, 7, &mut images).unwrap();
        let made = restore_uts(&images, 7).unwrap();
        let (tid, _keep) = parked(move || {
            let kind = LinkNameSpaceType::HostNameAndNISDomainName;
            move_into_link_name_space(made.ns(), Some(kind)).unwrap();
        });
        let names = read_uts(tid).unwrap();
        assert_eq!(
            (names.nodename.as_str(), names.domainname.as_str()),
            ("hardened", "example.org")
        );
    }
}
