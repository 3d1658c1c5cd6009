//! Files opened by path: regular files, directories, device nodes, O_PATH descriptors.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, fstat};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::record::RcrFile;
use super::sys;
use crate::image::schema::{FdTypes, RegFileEntry};
use crate::sys::SysError;

/// How the kernel ends the link of a file whose name is gone.
pub(crate) const DELETED: &str = " (deleted)";

/// Whether the file is still where its descriptor says.
pub(crate) enum Whereabouts {
    /// In mount namespace `mnt_ns`, under `name`.
    Named { name: String, mnt_ns: u32 },
    /// Nowhere; it was `name`.
    Unlinked { name: String },
}

/// Saves a file that has a path; unlinked ones are for [`super::ghost`].
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, name: String) -> Result<(), Stop> {
    device_allowed(file)?;
    if name.ends_with(".pressure") || name.starts_with("/proc/pressure/") {
        let writes = file.info.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        if writes {
            return refuse(
                "pressure monitor",
                format!("{name} carries a trigger that cannot be read back"),
                "turn the service's memory pressure watch off, or untag the unit",
            );
        }
    }
    let id = saved.entry.id;
    saved.entry.r#type = FdTypes::Reg.into();
    saved.entry.reg = Some(RegFileEntry {
        id,
        flags: file.flags(),
        pos: file.info.pos,
        fown: file.fown()?,
        name,
        // What a directory or a device reports is no content to compare.
        size: (file.format() == libc::S_IFREG).then_some(file.stat.st_size as u64),
        mode: Some(file.stat.st_mode),
        ..RegFileEntry::default()
    });
    if is_device(file.stat) {
        saved.extra.rdev = Some(file.stat.st_rdev);
    }
    Ok(())
}

/// Device nodes without state of their own; the rest is refused.
fn device_allowed(file: &Examined<'_>) -> Result<(), Stop> {
    let stat = file.stat;
    if !is_device(stat) || file.is_path() {
        return Ok(());
    }
    let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    let char = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
    match (char, major, minor) {
        // null, zero, full, random, urandom, kmsg
        (true, 1, 3 | 5 | 7 | 8 | 9 | 11) => Ok(()),
        (true, 4 | 5 | 136..=143, _) => refuse(
            "tty",
            format!("{} is a terminal", file.link),
            "run the service without a terminal (StandardInput=null), or untag the unit",
        ),
        (true, 10, 200) => refuse(
            "tun",
            "tun and tap devices are not carried",
            "untag the unit",
        ),
        _ => refuse(
            "device",
            format!(
                "{} ({} {major}:{minor}) holds state in its driver",
                file.link,
                if char { "character" } else { "block" }
            ),
            "untag the unit",
        ),
    }
}

fn is_device(stat: &FileStat) -> bool {
    matches!(stat.st_mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK)
}

/// Looks for the file under its name in the task's mounts, then in ours.
///
/// Descriptors may come from another mount namespace than the task's: a
/// manager opens files before it makes a service's namespace.
pub(crate) fn whereabouts(file: &Examined<'_>) -> Result<Whereabouts, Stop> {
    if !file.link.starts_with('/') {
        return refuse(
            file.link,
            "this kind of file is not carried",
            "untag the unit",
        );
    }
    if file.early.is_some_and(|e| e.named)
        || TaskRoot::open(file.task.voice)?.has(file.link, file.stat)?
    {
        return Ok(Whereabouts::Named {
            name: file.link.to_owned(),
            mnt_ns: file.task.mnt_ns,
        });
    }
    if file.task.mnt_ns != 0 && is_there(open_dir("/")?.as_fd(), file.link, file.stat)? {
        return Ok(Whereabouts::Named {
            name: file.link.to_owned(),
            mnt_ns: 0,
        });
    }
    // Processes end without their files being marked.
    if file.link.starts_with("/proc/") && sys::filesystem(file.fd)? == super::ghost::PROC_MAGIC {
        let name = file.link.strip_suffix(DELETED).unwrap_or(file.link);
        return Ok(Whereabouts::Unlinked {
            name: name.to_owned(),
        });
    }
    if let Some(name) = file.link.strip_suffix(DELETED) {
        return Ok(Whereabouts::Unlinked {
            name: name.to_owned(),
        });
    }
    refuse(
        file.link,
        "under this name the task sees another file or none",
        "restart the service so that it opens what is there now, or untag the unit",
    )
}

/// The root directory of a task.
#[derive(Debug)]
pub(crate) struct TaskRoot {
    /// Where it lies as we see it.
    shown: Option<String>,
    dir: OwnedFd,
}

impl TaskRoot {
    /// Opens that of a task.
    pub(crate) fn open(voice: i32) -> Result<Self, SysError> {
        let path = format!("/proc/{voice}/root");
        let shown = std::fs::read_link(&path).ok();
        Ok(Self {
            shown: shown.and_then(|p| p.into_os_string().into_string().ok()),
            dir: open_dir(&path)?,
        })
    }

    /// Whether the task finds the file that `wanted` tells about by a link's name.
    pub(crate) fn has(&self, link: &str, wanted: &FileStat) -> Result<bool, SysError> {
        // A task in a chroot sees its files below that directory.
        let inside = match self.shown.as_deref() {
            None | Some("/") => Some(link),
            Some(prefix) => link
                .strip_prefix(prefix)
                .map(|p| if p.is_empty() { "/" } else { p }),
        };
        match inside {
            Some(p) => is_there(self.dir.as_fd(), p, wanted),
            None => Ok(false),
        }
    }
}

pub(crate) fn open_dir(path: &str) -> Result<OwnedFd, SysError> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, nix::sys::stat::Mode::empty()).map_err(|e| SysError::new("open", path, e))
}

fn is_there(root: BorrowedFd<'_>, name: &str, wanted: &FileStat) -> Result<bool, SysError> {
    let Ok(path) = CString::new(name) else {
        return Ok(false);
    };
    match sys::open_in_root(root, &path, libc::O_PATH | libc::O_NOFOLLOW, 0) {
        Ok(fd) => {
            Ok(fstat(fd).is_ok_and(|s| (s.st_dev, s.st_ino) == (wanted.st_dev, wanted.st_ino)))
        }
        // This says something about us and nothing about the file.
        Err(e) if matches!(e.errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Err(e),
        Err(_) => Ok(false),
    }
}

/// Opens the file anew in `root`, at its old offset.
pub(crate) fn restore(
    reg: &RegFileEntry,
    extra: Option<&RcrFile>,
    root: BorrowedFd<'_>,
) -> Result<OwnedFd, BuildError> {
    let name = CString::new(reg.name.as_bytes())
        .map_err(|_| BuildError::Images("a path contains NUL".into()))?;
    let former = extra.and_then(|e| e.former_name.as_deref());
    let fd = match former {
        Some(former) => by_former_name(reg, former, root)?,
        None => sys::open_in_root(root, &name, open_flags(reg.flags), 0)?,
    };
    check_same(reg, extra, fd.as_fd())?;
    seek(fd.as_fd(), reg)?;
    Ok(fd)
}

/// Opens a file by a name it has lost, if that is free; then it is lost again.
fn by_former_name(
    reg: &RegFileEntry,
    former: &str,
    root: BorrowedFd<'_>,
) -> Result<OwnedFd, BuildError> {
    use nix::fcntl::{AT_FDCWD, AtFlags};
    let c = |s: &str| CString::new(s).map_err(|_| BuildError::Images("NUL in a path".into()));
    let file = sys::open_in_root(root, &c(&reg.name)?, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
    let (dir, base) = former.rsplit_once('/').unwrap_or(("", former));
    let dir = if dir.is_empty() { "/" } else { dir };
    let flags = open_flags(reg.flags);
    let magic = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(dir) = sys::open_in_root(root, &c(dir)?, libc::O_PATH | libc::O_DIRECTORY, 0) else {
        return Ok(sys::reopen(file.as_fd(), flags)?);
    };
    let follow = AtFlags::AT_SYMLINK_FOLLOW;
    if nix::unistd::linkat(AT_FDCWD, magic.as_str(), &dir, base, follow).is_err() {
        // The name has another file, or the file system has no links.
        return Ok(sys::reopen(file.as_fd(), flags)?);
    }
    let fd = sys::open_in_root(dir.as_fd(), &c(base)?, flags, 0);
    nix::unistd::unlinkat(&dir, base, nix::unistd::UnlinkatFlags::NoRemoveDir)
        .map_err(|e| SysError::new("unlinkat", former, e))?;
    Ok(fd?)
}

/// The flags to open a file with that had `flags` when it was saved.
pub(crate) fn open_flags(flags: u32) -> i32 {
    let flags = flags as i32;
    if flags & libc::O_PATH != 0 {
        return flags & (libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW);
    }
    // O_ASYNC is set together with its owner, later.
    let changed = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;
    flags & !changed | libc::O_NOCTTY
}

/// Puts the offset where it was.
pub(crate) fn seek(fd: BorrowedFd<'_>, reg: &RegFileEntry) -> Result<(), BuildError> {
    let path_only = reg.flags & libc::O_PATH as u32 != 0;
    if reg.pos == 0 || path_only {
        return Ok(());
    }
    nix::unistd::lseek(fd, reg.pos as i64, nix::unistd::Whence::SeekSet)
        .map_err(|e| SysError::new("lseek", format!("{} to {}", reg.name, reg.pos), e))?;
    Ok(())
}

/// A name may lead to another file by now: compare what must not have changed.
fn check_same(
    reg: &RegFileEntry,
    extra: Option<&RcrFile>,
    fd: BorrowedFd<'_>,
) -> Result<(), BuildError> {
    let now = fstat(fd).map_err(|e| SysError::new("fstat", fd.as_raw_fd(), e))?;
    let changed = |what: &str, was: String, is: String| {
        Err(BuildError::Changed {
            what: format!("{} of {}", what, reg.name),
            was,
            is,
        })
    };
    if let Some(mode) = reg.mode {
        let (was, is) = (mode & libc::S_IFMT, now.st_mode & libc::S_IFMT);
        if was != is {
            return changed("type", format!("{was:#o}"), format!("{is:#o}"));
        }
    }
    if let Some(rdev) = extra.and_then(|e| e.rdev)
        && rdev != now.st_rdev
    {
        return changed(
            "device",
            format!("{rdev:#x}"),
            format!("{:#x}", now.st_rdev),
        );
    }
    if now.st_mode & libc::S_IFMT == libc::S_IFREG
        && let Some(size) = reg.size
    {
        let is = now.st_size as u64;
        let exact = extra.and_then(|e| e.exact_size).unwrap_or(false);
        // What a service holds open may have grown by others' hands (a shared log).
        if is < size || exact && is != size {
            return changed("size", size.to_string(), is.to_string());
        }
    }
    Ok(())
}
