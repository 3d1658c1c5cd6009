//! Pseudo terminals, both ends of which are in the tree.
//!
//! All that belongs to one is made together: the master, whose index the
//! kernel chooses, then everything that has the slave open.

mod queue;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::stat::fstat;

use super::error::{Stop, refuse};
use super::examined::{Examined, Saved};
use super::identity::Descriptions;
use super::record::{RcrTerminal, TerminalEnd};
use super::reg::{self, Whereabouts};
use super::sys::{self, TtyNumber, tty_number};
use crate::image::schema::{
    FdTypes, FileEntry, RegFileEntry, TermiosEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry,
    TtyPtyEntry, TtyType, WinsizeEntry,
};
use crate::image::{ImageError, ImageSink, Kind, names, put_records};
use crate::sys::{SysError, SysResult};

pub(crate) use restore::TerminalsBack;

/// `DEVPTS_SUPER_MAGIC`: linux/magic.h.
const DEVPTS_MAGIC: i64 = 0x1cd1;
/// `TTYAUX_MAJOR`: 0 is `/dev/tty`, 2 is `ptmx`.
const AUX_MAJOR: u32 = 5;
const SLAVE_MAJOR: u32 = 136;

/// Device number as terminals tell it.
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

fn minor(device: u32) -> u32 {
    device & 0xff | device >> 12 & 0xfff00
}

/// Terminals found while saving.
#[derive(Debug, Default)]
pub(crate) struct Terminals {
    infos: Vec<TtyInfoEntry>,
    data: Vec<TtyDataEntry>,
}

/// Whether a character device is a terminal.
pub(crate) fn is_terminal(file: &Examined<'_>) -> bool {
    let rdev = file.stat.st_rdev;
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    file.format() == libc::S_IFCHR
        && (major == SLAVE_MAJOR || major == AUX_MAJOR && matches!(minor, 0 | 2))
}

/// Saves one end; `path` becomes the record of the node it was opened by.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, path: &mut Saved) -> Result<(), Stop> {
    let rdev = file.stat.st_rdev;
    let (end, index) = match (libc::major(rdev), libc::minor(rdev)) {
        (AUX_MAJOR, 2) => (TerminalEnd::Master, tty_number(file.fd, TtyNumber::Index)?),
        (AUX_MAJOR, _) => match tty_number(file.fd, TtyNumber::Device) {
            Ok(d) if d >> 8 & 0xfff == SLAVE_MAJOR => (TerminalEnd::Controlling, minor(d)),
            Ok(_) => return foreign(file, "its terminal is no pseudo terminal"),
            Err(_) => return foreign(file, "its terminal was hung up"),
        },
        (_, minor) => match tty_number(file.fd, TtyNumber::Device) {
            Err(e) if e.errno == Errno::EIO => (TerminalEnd::HungUp, minor),
            other => {
                other?;
                (TerminalEnd::Slave, minor)
            }
        },
    };
    let (name, mnt_ns) = match reg::whereabouts(file)? {
        Whereabouts::Named { name, mnt_ns } => (name, mnt_ns),
        Whereabouts::Unlinked { name } => (name, file.task.mnt_ns),
    };
    let instance = match end {
        TerminalEnd::Master => devpts_of(file, &name)?,
        TerminalEnd::Controlling => 0,
        _ if sys::filesystem(file.fd)? == DEVPTS_MAGIC => file.stat.st_dev,
        _ => return foreign(file, "its node is not in a devpts"),
    };
    path.entry.r#type = FdTypes::Reg.into();
    path.entry.reg = Some(RegFileEntry {
        id: path.entry.id,
        flags: file.flags(),
        fown: file.fown()?,
        name,
        mode: Some(file.stat.st_mode),
        ..RegFileEntry::default()
    });
    path.extra.mnt_ns = Some(mnt_ns);
    saved.entry.r#type = FdTypes::Tty.into();
    saved.entry.tty = Some(Box::new(TtyFileEntry {
        id: saved.entry.id,
        // Given when all ends are known.
        tty_info_id: 0,
        flags: file.flags(),
        fown: file.fown()?,
        regf_id: Some(path.entry.id),
    }));
    saved.extra.terminal = Some(Box::new(RcrTerminal {
        instance,
        index,
        end: end.into(),
        ..RcrTerminal::default()
    }));
    Ok(())
}

fn foreign<T>(file: &Examined<'_>, why: &str) -> Result<T, Stop> {
    refuse(
        "tty",
        format!("{} cannot be carried: {why}", file.link),
        "run the service without a terminal (StandardInput=null), or untag the unit",
    )
}

/// The devpts a master belongs to: its own file system, or `pts` beside it.
fn devpts_of(file: &Examined<'_>, name: &str) -> Result<u64, Stop> {
    if sys::filesystem(file.fd)? == DEVPTS_MAGIC {
        return Ok(file.stat.st_dev);
    }
    let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
    let root = reg::open_dir(&format!("/proc/{}/root", file.task.voice))?;
    let pts = std::ffi::CString::new(format!("{dir}/pts"))
        .map_err(|_| SysError::new("open", dir, Errno::EINVAL))?;
    let pts = sys::open_in_root(root.as_fd(), &pts, libc::O_PATH | libc::O_DIRECTORY, 0)?;
    let stat = fstat(&pts).map_err(|e| SysError::new("fstat", "devpts", e))?;
    Ok(stat.st_dev)
}

/// The files of one pseudo terminal.
#[derive(Debug, Default)]
struct Ends {
    master: Option<u32>,
    slaves: Vec<u32>,
    hung_up: Vec<u32>,
}

impl Terminals {
    /// Puts the ends together, and looks at each terminal. Of frozen tasks
    /// what waits is read and put back.
    pub(crate) fn settle(
        &mut self,
        files: &mut BTreeMap<u32, Saved>,
        held: &Descriptions,
        frozen: bool,
        shell_job: bool,
    ) -> Result<Vec<(u32, Stop)>, SysError> {
        let mut refusals = Vec::new();
        let mut all: BTreeMap<(u64, u32), Ends> = BTreeMap::new();
        for (id, t) in terminals(files) {
            let ends = match t.end() {
                TerminalEnd::Controlling => continue,
                _ => all.entry((t.instance, t.index)).or_default(),
            };
            match t.end() {
                TerminalEnd::Master => ends.master = Some(id),
                TerminalEnd::HungUp => ends.hung_up.push(id),
                _ => ends.slaves.push(id),
            }
        }
        let controlling: Vec<(u32, u32)> = terminals(files)
            .filter(|(_, t)| t.end() == TerminalEnd::Controlling)
            .map(|(id, t)| (id, t.index))
            .collect();
        for (id, index) in controlling {
            let mut of = all.iter_mut().filter(|((_, i), _)| *i == index);
            match (of.next(), of.next()) {
                (Some((key, ends)), None) => {
                    ends.slaves.push(id);
                    let saved = files.get_mut(&id).and_then(|s| s.extra.terminal.as_mut());
                    if let Some(t) = saved {
                        t.instance = key.0;
                    }
                }
                (Some(_), Some(_)) => {
                    let stop = refuse::<()>(
                        "tty",
                        format!("terminals of index {index} exist in several devpts"),
                        "untag the unit",
                    );
                    refusals.extend(stop.err().map(|s| (id, s)));
                }
                (None, _) => all.entry((0, index)).or_default().slaves.push(id),
            }
        }
        for (number, ((_, index), ends)) in all.into_iter().enumerate() {
            let number = number as u32;
            let one = self.one(number, index, &ends, files, held, frozen, shell_job);
            let first = ends.master.or(ends.slaves.first().copied());
            match one {
                Ok(()) => {}
                Err(Stop::Sys(e)) => return Err(e),
                Err(stop) => refusals.extend(first.map(|id| (id, stop))),
            }
        }
        Ok(refusals)
    }

    #[expect(clippy::too_many_arguments, reason = "one terminal in its tree")]
    fn one(
        &mut self,
        number: u32,
        index: u32,
        ends: &Ends,
        files: &mut BTreeMap<u32, Saved>,
        held: &Descriptions,
        frozen: bool,
        shell_job: bool,
    ) -> Result<(), Stop> {
        let (slave_id, master_id) = (number * 2 + 2, number * 2 + 3);
        let dup = |id: &u32| held.get(*id).map(|h| h.fd.as_fd());
        let info = |id, rdev| TtyInfoEntry {
            id,
            r#type: TtyType::Pty.into(),
            rdev,
            pty: Some(TtyPtyEntry { index }),
            ..TtyInfoEntry::default()
        };
        let mut slave = info(slave_id, device(SLAVE_MAJOR, index));
        for id in ends.slaves.iter().chain(&ends.hung_up) {
            set_info(files, *id, slave_id);
        }
        let some_slave = ends.slaves.first().and_then(dup);
        let owner = match ends.slaves.iter().chain(&ends.hung_up).find_map(dup) {
            Some(fd) => fstat(fd).ok(),
            None => None,
        };
        slave.uid = owner.map(|s| s.st_uid);
        slave.gid = owner.map(|s| s.st_gid);
        let Some(master) = ends.master.as_ref().and_then(dup) else {
            if let Some(fd) = some_slave {
                if !shell_job {
                    return refuse(
                        "tty",
                        format!(
                            "the master of /dev/pts/{index} is held by a process outside the service"
                        ),
                        "run the service without a terminal (StandardInput=null), or dump it as a shell's job (--shell-job)",
                    );
                }
                settings(fd, &mut slave)?;
                slave.r#type = TtyType::ExtTty.into();
                for id in &ends.slaves {
                    let saved = files.get_mut(id).and_then(|s| s.extra.terminal.as_mut());
                    if let Some(t) = saved.filter(|t| t.end() == TerminalEnd::Slave) {
                        t.end = TerminalEnd::Outside.into();
                    }
                }
            }
            self.infos.push(slave);
            return Ok(());
        };
        let Some(id) = ends.master else {
            return Ok(());
        };
        set_info(files, id, master_id);
        let events = queue::ready(master, PollFlags::POLLPRI)?;
        let closed = events.contains(PollFlags::POLLHUP);
        if some_slave.is_none() && !closed {
            return refuse(
                "tty",
                format!(
                    "/dev/pts/{index} is open outside the service, or was never opened: what waits there cannot be seen"
                ),
                "restart the service, or untag the unit",
            );
        }
        if events.contains(PollFlags::POLLPRI) {
            return refuse(
                "tty",
                format!("the master of /dev/pts/{index} has not read a change of state yet"),
                "try again",
            );
        }
        let mut top = info(master_id, device(AUX_MAJOR, 2));
        settings(master, &mut slave)?;
        top.termios = slave.termios.clone();
        top.winsize = slave.winsize;
        top.locked = tty_number(master, TtyNumber::Locked)? != 0;
        top.packet_mode = tty_number(master, TtyNumber::Packets)? != 0;
        top.exclusive = tty_number(master, TtyNumber::Exclusive)? != 0;
        if let Some(fd) = some_slave {
            slave.exclusive = tty_number(fd, TtyNumber::Exclusive)? != 0;
        }
        // Not every terminal controls a session.
        slave.sid = tty_number(master, TtyNumber::Session).unwrap_or(0);
        slave.pgrp = match slave.sid {
            0 => 0,
            _ => tty_number(master, TtyNumber::Group).unwrap_or(0),
        };
        if let Some(fd) = some_slave {
            if tty_number(fd, TtyNumber::Discipline)? != 0 {
                return refuse(
                    "tty",
                    format!("/dev/pts/{index} has a line discipline of its own"),
                    "untag the unit",
                );
            }
            if !queue::ready(fd, PollFlags::POLLOUT)?.contains(PollFlags::POLLOUT) {
                return refuse(
                    "tty",
                    format!("the output of /dev/pts/{index} is stopped, or its buffer is full"),
                    "try again when its master has read",
                );
            }
        }
        let termios = slave.termios.as_ref();
        if termios.is_some_and(|t| t.c_lflag & queue::EXTPROC != 0) {
            return refuse(
                "tty",
                format!("the input of /dev/pts/{index} is processed by its master (EXTPROC)"),
                "untag the unit",
            );
        }
        if frozen {
            let peer = open_peer(master, top.locked)?;
            let stat = fstat(&peer).map_err(|e| SysError::new("fstat", "slave", e))?;
            (slave.uid, slave.gid) = (Some(stat.st_uid), Some(stat.st_gid));
            let (queued, taken) = queue::take(master, peer.as_fd(), top.packet_mode);
            queue::put(master, peer.as_fd(), &queued)?;
            taken?;
            let input: Vec<u8> = queued.input.iter().flat_map(|l| l.data.clone()).collect();
            for (tty_id, data) in [(slave_id, input), (master_id, queued.output.clone())] {
                if !data.is_empty() {
                    self.data.push(TtyDataEntry { tty_id, data });
                }
            }
            let saved = files.get_mut(&id).and_then(|s| s.extra.terminal.as_mut());
            if let Some(t) = saved {
                t.input = queued.input;
                t.output = Some(queued.output).filter(|o| !o.is_empty());
                t.slave_mode = Some(stat.st_mode & 0o7777);
                t.slave_exclusive = Some(slave.exclusive);
            }
        }
        self.infos.extend([slave, top]);
        Ok(())
    }

    /// Processes whose controlling terminal none of these is, though their
    /// session is in the tree; by pid with the index.
    pub(crate) fn uncarried<'t>(
        &self,
        tasks: impl Iterator<Item = (i32, i32)> + 't,
        pids: &BTreeSet<i32>,
    ) -> Vec<(i32, String)> {
        let known: BTreeSet<u32> = self.infos.iter().map(|i| i.rdev).collect();
        let mut out = Vec::new();
        for (pid, voice) in tasks {
            let Some((sid, device)) = controlling_terminal(voice) else {
                continue;
            };
            if device != 0 && pids.contains(&sid) && !known.contains(&device) {
                out.push((pid, format!("{}:{}", device >> 8 & 0xfff, minor(device))));
            }
        }
        out
    }

    /// Names sessions and groups as the images do.
    pub(crate) fn renumber(&mut self, id: impl Fn(i32) -> i32) {
        for info in &mut self.infos {
            for number in [&mut info.sid, &mut info.pgrp] {
                if *number != 0 {
                    *number = id(*number as i32) as u32;
                }
            }
        }
    }

    /// Writes the images.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        if !self.infos.is_empty() {
            put_records(sink, Kind::TtyInfo, names::TTY_INFO, &self.infos)?;
        }
        if !self.data.is_empty() {
            put_records(sink, Kind::TtyData, names::TTY_DATA, &self.data)?;
        }
        Ok(())
    }
}

/// Session and controlling terminal of a task: proc_pid_stat(5).
fn controlling_terminal(pid: i32) -> Option<(i32, u32)> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    let stat = stat.ok()?;
    let mut words = stat.rsplit_once(')')?.1.split_whitespace();
    let sid = words.nth(3)?.parse().ok()?;
    let device: i32 = words.next()?.parse().ok()?;
    Some((sid, device as u32))
}

/// The slave, opened once more and not to wait, though it be locked.
fn open_peer(master: BorrowedFd<'_>, locked: bool) -> SysResult<std::os::fd::OwnedFd> {
    if locked {
        sys::tty_lock(master, false)?;
    }
    let peer = sys::tty_peer(master, libc::O_RDWR | libc::O_NONBLOCK);
    if locked {
        sys::tty_lock(master, true)?;
    }
    peer
}

fn terminals(files: &BTreeMap<u32, Saved>) -> impl Iterator<Item = (u32, &RcrTerminal)> {
    files
        .iter()
        .filter_map(|(id, s)| Some((*id, s.extra.terminal.as_deref()?)))
}

fn set_info(files: &mut BTreeMap<u32, Saved>, id: u32, info: u32) {
    let entry: Option<&mut FileEntry> = files.get_mut(&id).map(|s| s.entry.as_mut());
    if let Some(tty) = entry.and_then(|e| e.tty.as_mut()) {
        tty.tty_info_id = info;
    }
}

fn settings(fd: BorrowedFd<'_>, info: &mut TtyInfoEntry) -> SysResult<()> {
    let t = sys::termios(fd)?;
    info.termios = Some(TermiosEntry {
        c_iflag: t.c_iflag,
        c_oflag: t.c_oflag,
        c_cflag: t.c_cflag,
        c_lflag: t.c_lflag,
        c_line: t.c_line.into(),
        c_ispeed: t.c_ispeed,
        c_ospeed: t.c_ospeed,
        c_cc: t.c_cc.iter().map(|&c| c.into()).collect(),
    });
    let w = sys::window_size(fd)?;
    info.winsize = Some(WinsizeEntry {
        ws_row: w.ws_row.into(),
        ws_col: w.ws_col.into(),
        ws_xpixel: w.ws_xpixel.into(),
        ws_ypixel: w.ws_ypixel.into(),
    });
    Ok(())
}
