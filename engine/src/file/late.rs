//! What only a holder of a file can do: epoll interest, SIGIO owners, record
//! locks, and listening once more so that peers see the right process.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;

use nix::errno::Errno;

use super::error::{FileError, Stop, refuse};
use super::examined::Saved;
use super::fdinfo::Lock;
use super::identity::Slot;
use super::record::{RcrFile, RcrLock};
use super::{FileBuilder, epoll, mqueue, sys};
use crate::image::schema::{EventpollTfdEntry, FdinfoEntry, FileEntry, FownEntry};
use crate::remote::{Arg, Program};
use crate::socket::unix::LISTEN;
use crate::sys::{SysError, SysResult};

const EPOLL_CTL_ADD: i32 = libc::EPOLL_CTL_ADD;
const F_SETLEASE: i32 = 1024;
/// `pid` of a lock that belongs to the description.
const OF_DESCRIPTION: i32 = -1;

/// Locks as `/proc` showed them, by file and slot.
#[derive(Debug, Default)]
pub(crate) struct LocksSeen {
    seen: Vec<(u32, Slot, Vec<Lock>)>,
}

impl LocksSeen {
    pub(crate) fn note(&mut self, id: u32, slot: Slot, locks: Vec<Lock>) {
        self.seen.push((id, slot, locks));
    }

    /// Records each lock once; a task's record lock shows on all its descriptors of a file.
    pub(crate) fn settle(&mut self, files: &mut BTreeMap<u32, Saved>) -> Vec<(u32, Stop)> {
        let mut refusals = Vec::new();
        let mut known = BTreeSet::new();
        for (id, slot, locks) in self.seen.drain(..) {
            let Some(saved) = files.get_mut(&id) else {
                continue;
            };
            for lock in locks {
                let kind = if lock.write {
                    libc::F_WRLCK
                } else {
                    libc::F_RDLCK
                } as u32;
                let len = lock.end.map_or(0, |end| end.saturating_sub(lock.start) + 1);
                let pid = match lock.class.as_str() {
                    "FLOCK" => {
                        let mode = if lock.write {
                            libc::LOCK_EX
                        } else {
                            libc::LOCK_SH
                        };
                        saved.extra.flock = Some(mode as u32);
                        continue;
                    }
                    "POSIX" => slot.pid,
                    "OFDLCK" => OF_DESCRIPTION,
                    "LEASE" if lock.state == "ACTIVE" => {
                        saved.extra.lease = Some(kind);
                        continue;
                    }
                    "LEASE" => {
                        let reason = "its lease is about to be broken by another process";
                        let stop = refuse::<()>("file lease", reason, "try again");
                        refusals.extend(stop.err().map(|s| (id, s)));
                        continue;
                    }
                    other => {
                        let reason = format!("a {} on it is not carried", other.to_lowercase());
                        let stop = refuse::<()>("file lease", reason, "untag the unit");
                        refusals.extend(stop.err().map(|s| (id, s)));
                        continue;
                    }
                };
                let owner = if pid == OF_DESCRIPTION {
                    i64::from(id)
                } else {
                    -i64::from(pid)
                };
                if known.insert((saved.found.inode, owner, kind, lock.start, len)) {
                    saved.extra.locks.push(RcrLock {
                        pid,
                        kind,
                        start: lock.start,
                        len,
                    });
                }
            }
        }
        refusals
    }
}

/// Takes the locks that belong to a description.
pub(super) fn lock_description(extra: Option<&RcrFile>, fd: BorrowedFd<'_>) -> SysResult<()> {
    let Some(extra) = extra else { return Ok(()) };
    if let Some(mode) = extra.flock {
        // SAFETY: numbers only.
        let r = unsafe { libc::flock(fd.as_raw_fd(), mode as i32 | libc::LOCK_NB) };
        if r < 0 {
            return Err(SysError::last("flock", format!("file {}", extra.id)));
        }
    }
    for lock in extra.locks.iter().filter(|l| l.pid == OF_DESCRIPTION) {
        let f = libc::flock {
            l_type: lock.kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: lock.start as i64,
            l_len: lock.len as i64,
            l_pid: 0,
        };
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_OFD_SETLK(&f))
            .map_err(|e| SysError::new("fcntl(F_OFD_SETLK)", format!("file {}", extra.id), e))?;
    }
    Ok(())
}

/// A descriptor table by numbers.
struct Numbers<'a> {
    entries: HashMap<u32, &'a FdinfoEntry>,
    /// Above all of them.
    end: u32,
    /// See [`spare_number`].
    spare: u32,
}

impl<'a> Numbers<'a> {
    fn new(table: &'a [FdinfoEntry]) -> Self {
        Self {
            entries: table.iter().map(|e| (e.fd, e)).collect(),
            end: table.iter().map(|e| e.fd + 1).max().unwrap_or(0),
            spare: spare_number(table),
        }
    }
}

impl FileBuilder<'_> {
    /// Appends what task `pid`, numbered as in the images, adds to its epoll instances, while it may still
    /// trace us. `table` is its own, placed.
    pub fn late(
        &mut self,
        pid: i32,
        table: &[FdinfoEntry],
        program: &mut Program,
    ) -> Result<(), FileError> {
        let here = Numbers::new(table);
        for (fd, entry, extra) in self.duties(pid, table) {
            self.watch(&entry, &extra, fd, &here, program)?;
            if let Some(kind) = extra.lease {
                let args = [
                    Arg::Imm(fd.into()),
                    F_SETLEASE.into(),
                    Arg::Imm(kind.into()),
                ];
                program.call(libc::SYS_fcntl, format!("lease on fd {fd}"), &args);
            }
        }
        Ok(())
    }

    /// Appends what task `pid` does for its files at the very end, with its
    /// final credentials and when all processes exist.
    pub fn last(&self, pid: i32, table: &[FdinfoEntry], program: &mut Program) {
        for (fd, entry, extra) in self.duties(pid, table) {
            let known = extra.socket.as_ref().is_some_and(|s| s.peer_cred.is_some());
            let listener = entry.usk.as_ref().filter(|u| u.state == LISTEN);
            if let Some(usk) = listener.filter(|_| !known) {
                // Images of others do not tell who listened; peers see the credentials of whoever called listen(2) last.
                let args = [Arg::Imm(fd.into()), Arg::Imm(usk.backlog.into())];
                program.call(libc::SYS_listen, format!("listen on fd {fd}"), &args);
            }
            if let Some((fown, flags)) = owner_of(&entry, &extra) {
                let there = FownEntry {
                    pid: self.env.pid_seen(pid, fown.pid as i32) as u32,
                    ..fown
                };
                set_owner(&there, flags, fd, program);
            }
        }
        self.open_threads(pid, table, program);
        for (n, slot) in table.iter().enumerate() {
            let queue = self.extra(slot.id).and_then(|e| e.queue.as_ref());
            let notify = queue.and_then(|q| q.notify.as_ref());
            let Some(notify) = notify.filter(|t| t.pid == pid) else {
                continue;
            };
            if !table[..n].iter().any(|s| s.id == slot.id) {
                mqueue::ask(notify, slot.fd, program);
            }
        }
        let mut seen = BTreeSet::new();
        for slot in table.iter().filter(|s| seen.insert(s.id)) {
            let locks = self.extra(slot.id).map_or(&[][..], |e| &e.locks);
            for lock in locks.iter().filter(|l| l.pid == pid) {
                take_lock(lock, slot.fd, program);
            }
        }
    }

    /// Pidfds of threads other than the first are opened where these are.
    fn open_threads(&self, pid: i32, table: &[FdinfoEntry], program: &mut Program) {
        let mut made = BTreeMap::new();
        for slot in table {
            let target = self.extra(slot.id).and_then(|e| e.pidfd);
            let Some(tid) = target
                .filter(|t| t.thread == Some(true))
                .and_then(|t| t.pid)
            else {
                continue;
            };
            let entry = self.entry(slot.id).and_then(|e| e.pidfd.as_ref());
            let flags = entry.map_or(0, |e| e.flags as i32);
            let flags = flags & (sys::PIDFD_THREAD | libc::O_NONBLOCK);
            let what = format!("open the pidfd of thread {tid} as fd {}", slot.fd);
            let seen = self.env.pid_seen(pid, tid);
            let op = *made.entry(slot.id).or_insert_with(|| {
                program.call(
                    libc::SYS_pidfd_open,
                    what.clone(),
                    &[seen.into(), flags.into()],
                )
            });
            let cloexec = if slot.flags & 1 != 0 {
                libc::O_CLOEXEC
            } else {
                0
            };
            let args = [op.into(), Arg::Imm(slot.fd.into()), cloexec.into()];
            program.call(libc::SYS_dup3, what, &args);
        }
        for op in made.into_values() {
            program.call(libc::SYS_close, "close a spare pidfd", &[op.into()]);
        }
    }

    /// The files of `table` that task `pid` looks after, each once.
    pub(super) fn duties(
        &self,
        pid: i32,
        table: &[FdinfoEntry],
    ) -> Vec<(u32, Rc<FileEntry>, Rc<RcrFile>)> {
        let mut seen = BTreeSet::new();
        let mut duties = Vec::new();
        for slot in table {
            let extra = self.extras.get(&slot.id);
            let extra = extra.filter(|e| e.late_pid == Some(pid));
            if let (Some(extra), Some(entry)) = (extra, self.entries.get(&slot.id))
                && seen.insert(slot.id)
            {
                duties.push((slot.fd, Rc::clone(entry), Rc::clone(extra)));
            }
        }
        duties
    }

    fn watch(
        &mut self,
        entry: &FileEntry,
        extra: &RcrFile,
        epfd: u32,
        numbers: &Numbers<'_>,
        program: &mut Program,
    ) -> Result<(), FileError> {
        let Some(epoll) = &entry.epfd else {
            return Ok(());
        };
        for (i, w) in epoll.tfd.iter().enumerate() {
            let here = numbers.entries.get(&w.tfd).copied();
            // Images of others do not say more than the number.
            let target = extra.epoll_targets.get(i).copied().or(here.map(|e| e.id));
            let Some(target) = target else {
                let on = format!("epoll target {}", w.tfd);
                return Err(SysError::new("epoll_ctl", on, Errno::EBADF).into());
            };
            if here.is_some_and(|e| e.id == target) {
                add(epfd, w, program);
            } else {
                let ours = self.open(target)?.as_raw_fd();
                add_elsewhere(epfd, w, ours, here, numbers, program);
            }
        }
        Ok(())
    }
}

fn add(epfd: u32, w: &EventpollTfdEntry, program: &mut Program) {
    let event = program.bytes(&epoll::event_bytes(w));
    let args = [
        Arg::Imm(epfd.into()),
        EPOLL_CTL_ADD.into(),
        Arg::Imm(w.tfd.into()),
        event.into(),
    ];
    program.call(
        libc::SYS_epoll_ctl,
        format!("epoll fd {epfd} watches fd {}", w.tfd),
        &args,
    );
}

/// Where our pidfd sits in a task's table while its files are placed: a number
/// that none of them has.
pub fn spare_number(table: &[FdinfoEntry]) -> u32 {
    let taken: BTreeSet<u32> = table.iter().map(|e| e.fd).collect();
    // Not 0: there it is opened.
    (1..).find(|n| !taken.contains(n)).unwrap_or(1)
}

/// The number under which a file is watched stands for something else by now:
/// it is lent to the file while it is added.
fn add_elsewhere(
    epfd: u32,
    w: &EventpollTfdEntry,
    ours: i32,
    here: Option<&FdinfoEntry>,
    numbers: &Numbers<'_>,
    program: &mut Program,
) {
    let pidfd = numbers.spare;
    let high = numbers.end.max(pidfd + 1).max(w.tfd + 1);
    let what = format!("epoll fd {epfd}, former fd {}", w.tfd);
    let mut call = |nr, args: &[Arg]| program.call(nr, what.clone(), args);
    let above = [
        Arg::Imm(libc::F_DUPFD_CLOEXEC as u64),
        Arg::Imm(high.into()),
    ];
    // New numbers might be the very one in question: go above all in use.
    let low = call(
        libc::SYS_pidfd_getfd,
        &[Arg::Imm(pidfd.into()), ours.into(), 0.into()],
    );
    let file = call(libc::SYS_fcntl, &[low.into(), above[0], above[1]]);
    call(libc::SYS_close, &[low.into()]);
    let number = Arg::Imm(w.tfd.into());
    let aside = here.map(|_| call(libc::SYS_fcntl, &[number, above[0], above[1]]));
    call(libc::SYS_dup3, &[file.into(), number, 0.into()]);
    add(epfd, w, program);
    let mut call = |nr, args: &[Arg]| program.call(nr, what.clone(), args);
    match (aside, here) {
        (Some(aside), Some(e)) => {
            let cloexec = if e.flags & 1 != 0 { libc::O_CLOEXEC } else { 0 };
            call(libc::SYS_dup3, &[aside.into(), number, cloexec.into()]);
            call(libc::SYS_close, &[aside.into()]);
        }
        _ => {
            call(libc::SYS_close, &[number]);
        }
    }
    call(libc::SYS_close, &[file.into()]);
}

/// Who gets SIGIO for a file, and its status flags.
pub(crate) fn owner_of(entry: &FileEntry, extra: &RcrFile) -> Option<(FownEntry, u32)> {
    let e = entry;
    None.or(e.reg.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.isk.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.usk.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.nlsk.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.psk.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.efd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.epfd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.sgfd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.tfd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.pipe.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.memfd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.ify.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.ffy.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.bpf.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.pidfd.as_ref().map(|f| (f.fown, f.flags)))
        .or(e.tty.as_ref().map(|f| (f.fown, f.flags)))
        .or(extra.fifo_fown.zip(extra.fifo_flags))
}

/// Who gets SIGIO for a file, to be changed.
pub(crate) fn owner_mut<'a>(
    e: &'a mut FileEntry,
    extra: &'a mut RcrFile,
) -> Option<&'a mut FownEntry> {
    None.or(e.reg.as_mut().map(|f| &mut f.fown))
        .or(e.isk.as_mut().map(|f| &mut f.fown))
        .or(e.usk.as_mut().map(|f| &mut f.fown))
        .or(e.nlsk.as_mut().map(|f| &mut f.fown))
        .or(e.efd.as_mut().map(|f| &mut f.fown))
        .or(e.epfd.as_mut().map(|f| &mut f.fown))
        .or(e.sgfd.as_mut().map(|f| &mut f.fown))
        .or(e.tfd.as_mut().map(|f| &mut f.fown))
        .or(e.pipe.as_mut().map(|f| &mut f.fown))
        .or(e.memfd.as_mut().map(|f| &mut f.fown))
        .or(e.ify.as_mut().map(|f| &mut f.fown))
        .or(e.ffy.as_mut().map(|f| &mut f.fown))
        .or(e.pidfd.as_mut().map(|f| &mut f.fown))
        .or(extra.fifo_fown.as_mut())
}

fn set_owner(fown: &FownEntry, flags: u32, fd: u32, program: &mut Program) {
    let is_async = flags & libc::O_ASYNC as u32 != 0;
    if fown.pid == 0 && fown.signum == 0 && !is_async {
        return;
    }
    let (set_owner, set_signal) = sys::SET_OWNER;
    let fd_arg = Arg::Imm(fd.into());
    let what = format!("SIGIO owner of fd {fd}");
    if fown.pid != 0 {
        let mut owner = fown.pid_type.to_ne_bytes().to_vec();
        owner.extend_from_slice(&fown.pid.to_ne_bytes());
        let owner = program.bytes(&owner);
        program.call(
            libc::SYS_fcntl,
            what.clone(),
            &[fd_arg, set_owner.into(), owner.into()],
        );
    }
    if fown.signum != 0 {
        let args = [fd_arg, set_signal.into(), Arg::Imm(fown.signum.into())];
        program.call(libc::SYS_fcntl, what.clone(), &args);
    }
    if is_async {
        let args = [fd_arg, libc::F_SETFL.into(), Arg::Imm(flags.into())];
        program.call(libc::SYS_fcntl, what, &args);
    }
}

fn take_lock(lock: &RcrLock, fd: u32, program: &mut Program) {
    // struct flock: short type, short whence, padding, start, len, pid.
    let mut f = (lock.kind as i16).to_ne_bytes().to_vec();
    f.extend_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    f.extend_from_slice(&[0; 4]);
    f.extend_from_slice(&lock.start.to_ne_bytes());
    f.extend_from_slice(&lock.len.to_ne_bytes());
    f.extend_from_slice(&[0; 8]);
    let f = program.bytes(&f);
    let args = [Arg::Imm(fd.into()), libc::F_SETLK.into(), f.into()];
    program.call(libc::SYS_fcntl, format!("lock on fd {fd}"), &args);
}
