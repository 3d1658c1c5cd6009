//! Making file systems from their recorded type, source and options
//! (fsopen(2), fsconfig(2), fsmount(2)).

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
};

use crate::namespace::NamespaceError;

/// What to mount.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipe<'a> {
    pub fstype: &'a str,
    pub source: &'a OsStr,
    pub options: &'a [Vec<u8>],
    /// Where it is seen, for messages.
    pub seen: &'a Path,
}

/// Options that a kernel shows or knows only sometimes, and that change nothing
/// of what a service can see: without them where they are not known.
const NEGLIGIBLE: [&[u8]; 6] = [
    b"inode64",
    b"inode32",
    b"noswap",
    b"huge",
    b"seclabel",
    b"memory_hugetlb_accounting",
];

impl Recipe<'_> {
    /// A new mount of it, not attached anywhere; writable even if to be read-only,
    /// see [`Recipe::seal`].
    pub(super) fn mount(&self) -> Result<OwnedFd, NamespaceError> {
        let err = |call| NamespaceError::call(call, self.seen);
        let fs = fsopen(self.fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(err("fsopen"))?;
        fsconfig_set_string(&fs, "source", self.source).map_err(|e| self.bad(&fs, b"source", e))?;
        for option in self.options {
            if matches!(&option[..], b"rw" | b"ro") {
                continue;
            }
            match self.set(&fs, option) {
                Err(e) if NEGLIGIBLE.contains(&key(option)) => {
                    let option = String::from_utf8_lossy(option);
                    tracing::debug!(path = %self.seen.display(), %option, error = %e, "option left out");
                }
                other => other.map_err(|e| self.bad(&fs, option, e))?,
            }
        }
        fsconfig_create(&fs).map_err(|e| self.bad(&fs, b"(all)", e))?;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(err("fsmount"))
    }

    /// What fsconfig(2) is to set, for who mounts it elsewhere.
    pub(super) fn settings(&self) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let source = Some(self.source.as_bytes().to_vec());
        let mut all = vec![(b"source".to_vec(), source)];
        let wanted = self.options.iter().filter(|o| &o[..] != b"rw");
        all.extend(wanted.map(|option| {
            let at = option.iter().position(|&b| b == b'=');
            (key(option).to_vec(), at.map(|at| option[at + 1..].to_vec()))
        }));
        all
    }

    /// Makes the file system read-only if it is to be.
    pub(super) fn seal(&self, mount: &OwnedFd) -> Result<(), NamespaceError> {
        if !self.options.iter().any(|o| o == b"ro") {
            return Ok(());
        }
        let err = |call| NamespaceError::call(call, self.seen);
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
        let fs = fspick(mount, "", flags).map_err(err("fspick"))?;
        fsconfig_set_flag(&fs, "ro").map_err(|e| self.bad(&fs, b"ro", e))?;
        fsconfig_reconfigure(&fs).map_err(|e| self.bad(&fs, b"ro", e))
    }

    fn set(&self, fs: &OwnedFd, option: &[u8]) -> Result<(), Errno> {
        match option.iter().position(|&b| b == b'=') {
            Some(at) => fsconfig_set_string(fs, key(option), &option[at + 1..]),
            None => fsconfig_set_flag(fs, option),
        }
    }

    fn bad(&self, fs: &OwnedFd, option: &[u8], error: Errno) -> NamespaceError {
        // The kernel explains itself through the context's descriptor, a line a read.
        let mut line = [0; 512];
        let message = match rustix::io::read(fs, &mut line) {
            Ok(n) if n > 2 => String::from_utf8_lossy(&line[2..n]).trim_end().to_owned(),
            _ => std::io::Error::from(error).to_string(),
        };
        NamespaceError::Option {
            fstype: self.fstype.to_owned(),
            path: self.seen.to_owned(),
            option: OsStr::from_bytes(option).to_string_lossy().into_owned(),
            message,
        }
    }
}

fn key(option: &[u8]) -> &[u8] {
    option.split(|&b| b == b'=').next().unwrap_or_default()
}
