//! A pseudo terminal made again, with everything that has it open.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};

use super::queue::{self, Queued};
use super::{AUX_MAJOR, device};
use crate::file::FileBuilder;
use crate::file::error::BuildError;
use crate::file::record::{LineEnd, RcrLine, RcrTerminal, TerminalEnd};
use crate::file::sys::{self, TtyNumber, tty_number};
use crate::image::schema::{FileEntry, TtyDataEntry, TtyInfoEntry, TtyType};
use crate::image::{ImageError, ImageSource, Kind, get_records, names};
use crate::sys::{SysError, SysResult};

/// Terminals of the images.
#[derive(Debug, Default)]
pub(crate) struct TerminalsBack {
    infos: BTreeMap<u32, TtyInfoEntry>,
    data: Vec<TtyDataEntry>,
}

impl TerminalsBack {
    pub(crate) fn load(source: &dyn ImageSource) -> Result<Self, ImageError> {
        let infos: Vec<TtyInfoEntry> = get_records(source, Kind::TtyInfo, names::TTY_INFO)?;
        let data = get_records(source, Kind::TtyData, names::TTY_DATA)?;
        Ok(Self {
            infos: infos.into_iter().map(|i| (i.id, i)).collect(),
            data,
        })
    }

    /// What our own record of a file would say, for dumps of others.
    pub(crate) fn derive(&self, entry: &FileEntry) -> Option<RcrTerminal> {
        let info = self.infos.get(&entry.tty.as_ref()?.tty_info_id)?;
        let end = match info.r#type() {
            TtyType::Pty if info.rdev == device(AUX_MAJOR, 2) => TerminalEnd::Master,
            TtyType::Pty => TerminalEnd::Slave,
            TtyType::Ctty => TerminalEnd::Controlling,
            _ => TerminalEnd::Outside,
        };
        let index = info.pty.map_or(0, |p| p.index);
        let waits = |top: bool| {
            let of = |i: &&TtyInfoEntry| {
                i.pty.map(|p| p.index) == Some(index) && (i.rdev == device(AUX_MAJOR, 2)) == top
            };
            let id = self.infos.values().find(of).map(|i| i.id);
            let mut found = self.data.iter().filter(|d| Some(d.tty_id) == id);
            found.next().map(|d| d.data.clone())
        };
        let input = waits(false).map(|data| RcrLine {
            data,
            end: LineEnd::Open.into(),
        });
        Some(RcrTerminal {
            index,
            end: end.into(),
            input: input.into_iter().collect(),
            output: waits(true),
            ..RcrTerminal::default()
        })
    }
}

impl FileBuilder<'_> {
    fn terminal(&self, id: u32) -> Option<RcrTerminal> {
        let own = self.extra(id).and_then(|e| e.terminal.as_deref().cloned());
        own.or_else(|| self.terminals.derive(self.entry(id)?))
    }

    fn info(&self, id: u32) -> Option<&TtyInfoEntry> {
        let tty = self.entry(id)?.tty.as_ref()?;
        self.terminals.infos.get(&tty.tty_info_id)
    }

    /// The terminal that controls a session: one of its files, and its
    /// foreground process group. All by our numbers.
    pub fn controlling(&self, sid: i32) -> Option<(u32, i32)> {
        let ids = self.entries.iter().filter(|(_, e)| e.tty.is_some());
        for (&id, _) in ids {
            let end = self.terminal(id).map(|t| t.end());
            let slave = matches!(end, Some(TerminalEnd::Slave | TerminalEnd::Controlling));
            let here = |number: u32| match number {
                0 => 0,
                n => self.env.pid_here(n as i32),
            };
            if let Some(info) = self.info(id).filter(|i| slave && here(i.sid) == sid) {
                return Some((id, here(info.pgrp)));
            }
        }
        None
    }

    /// Makes the terminal that file `id` is an end of.
    pub(in crate::file) fn build_terminal(
        &self,
        id: u32,
    ) -> Result<Vec<(u32, OwnedFd)>, BuildError> {
        let lost = || BuildError::Images("a terminal without its part".into());
        let me = self.terminal(id).ok_or_else(lost)?;
        if me.end() == TerminalEnd::Outside {
            let tty = self.entry(id).and_then(|e| e.tty.as_ref());
            let flags = tty.ok_or_else(lost)?.flags as i32;
            let own = reopened(flags).map_err(|source| BuildError::Env {
                what: "our own terminal in place of the one outside".into(),
                source,
            })?;
            return Ok(vec![(id, own)]);
        }
        let ends: Vec<(u32, RcrTerminal)> = self
            .entries
            .keys()
            .filter_map(|&id| Some((id, self.terminal(id)?)))
            .filter(|(_, t)| (t.instance, t.index) == (me.instance, me.index))
            .collect();
        let of = |end: TerminalEnd| ends.iter().filter(move |(_, t)| t.end() == end);
        let top = of(TerminalEnd::Master).next();
        let (root, name) = self.node(top.map_or(id, |(id, _)| *id))?;
        let name = match top {
            Some(_) => name,
            None => {
                let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                format!("{dir}/ptmx")
            }
        };
        let master = take_index(root, &name, me.index)?;
        sys::tty_lock(master.as_fd(), false)?;
        let mut made = Vec::new();
        let again = libc::O_RDWR | libc::O_NONBLOCK;
        let mut peer = sys::tty_peer(master.as_fd(), again)?;
        for (id, _) in of(TerminalEnd::HungUp) {
            made.push((*id, sys::tty_peer(master.as_fd(), self.flags(*id))?));
        }
        if !made.is_empty() {
            sys::tty_hang_up(peer.as_fd())?;
            peer = sys::tty_peer(master.as_fd(), again)?;
        }
        for (id, _) in of(TerminalEnd::Slave) {
            made.push((*id, sys::tty_peer(master.as_fd(), self.flags(*id))?));
        }
        for (id, _) in of(TerminalEnd::Controlling) {
            let (root, name) = self.node(*id)?;
            let flags = self.flags(*id);
            let file = sys::open_as_controlling(peer.as_fd(), root, &c(&name)?, flags)?;
            made.push((*id, file));
        }
        for (id, fd) in &made {
            let flags = self.flags(*id) & !libc::O_ASYNC;
            let hung = of(TerminalEnd::HungUp).any(|(h, _)| h == id);
            if !hung {
                sys::set_status_flags(fd.as_fd(), flags)?;
            }
        }
        let Some((top_id, more)) = top else {
            // It goes, and what had it open is hung up.
            return Ok(made);
        };
        let info = self.info(*top_id).ok_or_else(lost)?;
        let slave_info = self.slave_info(info);
        give_node(peer.as_fd(), slave_info, more)?;
        set_up(master.as_fd(), peer.as_fd(), slave_info.unwrap_or(info))?;
        let queued = Queued {
            input: more.input.clone(),
            output: more.output.clone().unwrap_or_default(),
        };
        queue::put(master.as_fd(), peer.as_fd(), &queued)?;
        if slave_info.is_some_and(|i| i.exclusive) {
            sys::tty_exclusive(peer.as_fd())?;
        }
        if info.exclusive {
            sys::tty_exclusive(master.as_fd())?;
        }
        sys::tty_packets(master.as_fd(), info.packet_mode)?;
        sys::tty_lock(master.as_fd(), info.locked)?;
        sys::set_status_flags(master.as_fd(), self.flags(*top_id) & !libc::O_ASYNC)?;
        made.push((*top_id, master));
        Ok(made)
    }

    fn slave_info(&self, top: &TtyInfoEntry) -> Option<&TtyInfoEntry> {
        // Ours come in pairs; CRIU numbers them alike.
        let slave = |i: &&TtyInfoEntry| i.pty == top.pty && i.id != top.id;
        let next = self
            .terminals
            .infos
            .get(&top.id.wrapping_sub(1))
            .filter(slave);
        next.or_else(|| self.terminals.infos.values().find(slave))
    }

    fn flags(&self, id: u32) -> i32 {
        let tty = self.entry(id).and_then(|e| e.tty.as_ref());
        tty.map_or(libc::O_RDWR, |t| t.flags as i32)
    }

    /// Where the node of an end is.
    fn node(&self, id: u32) -> Result<(BorrowedFd<'_>, String), BuildError> {
        let lost = || BuildError::Images("a terminal without a path".into());
        let tty = self.entry(id).and_then(|e| e.tty.as_ref());
        let path = tty.and_then(|t| t.regf_id).ok_or_else(lost)?;
        let reg = self.entry(path).and_then(|e| e.reg.as_ref());
        let name = reg.ok_or_else(lost)?.name.clone();
        Ok((
            crate::file::builder::root(self.env, self.extra(path))?,
            name,
        ))
    }
}

fn c(path: &str) -> Result<CString, BuildError> {
    CString::new(path).map_err(|_| BuildError::Images("NUL in a path".into()))
}

/// Opens our own controlling terminal.
fn reopened(flags: i32) -> std::io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let mode = flags & libc::O_ACCMODE;
    let file = std::fs::OpenOptions::new()
        .read(mode != libc::O_WRONLY)
        .write(mode != libc::O_RDONLY)
        .custom_flags(libc::O_NOCTTY | flags & libc::O_NONBLOCK)
        .open("/dev/tty")?;
    Ok(file.into())
}

/// Somebody who just closed it, or who looks for one of their own, may sit on
/// an index for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

fn take_index(root: BorrowedFd<'_>, ptmx: &str, index: u32) -> Result<OwnedFd, BuildError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match try_index(root, ptmx, index) {
            Err(BuildError::Changed { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

/// The kernel gives the lowest free index: those below are taken meanwhile.
fn try_index(root: BorrowedFd<'_>, ptmx: &str, index: u32) -> Result<OwnedFd, BuildError> {
    let path = c(ptmx)?;
    let mut below = Vec::new();
    loop {
        let flags = libc::O_RDWR | libc::O_NOCTTY;
        let master = sys::open_in_root(root, &path, flags, 0)?;
        let given = tty_number(master.as_fd(), TtyNumber::Index)?;
        if given == index {
            return Ok(master);
        }
        if given > index {
            return Err(BuildError::Changed {
                what: format!("/dev/pts/{index}"),
                was: "a terminal of the dump".into(),
                is: "taken by somebody else".into(),
            });
        }
        below.push(master);
    }
}

/// Owner and permissions of the slave's node.
fn give_node(
    peer: BorrowedFd<'_>,
    info: Option<&TtyInfoEntry>,
    more: &RcrTerminal,
) -> SysResult<()> {
    if let Some(i) = info {
        let (uid, gid) = (i.uid.map(Uid::from_raw), i.gid.map(Gid::from_raw));
        fchown(peer, uid, gid).map_err(|e| SysError::new("fchown", "terminal", e))?;
    }
    if let Some(mode) = more.slave_mode {
        fchmod(peer, Mode::from_bits_truncate(mode))
            .map_err(|e| SysError::new("fchmod", "terminal", e))?;
    }
    Ok(())
}

/// Settings and window size.
fn set_up(master: BorrowedFd<'_>, peer: BorrowedFd<'_>, info: &TtyInfoEntry) -> SysResult<()> {
    if let Some(e) = &info.termios {
        let mut t = sys::termios(peer)?;
        (t.c_iflag, t.c_oflag) = (e.c_iflag, e.c_oflag);
        (t.c_cflag, t.c_lflag) = (e.c_cflag, e.c_lflag);
        (t.c_ispeed, t.c_ospeed) = (e.c_ispeed, e.c_ospeed);
        for (to, from) in t.c_cc.iter_mut().zip(&e.c_cc) {
            *to = *from as u8;
        }
        sys::set_termios(peer, &t)?;
    }
    if let Some(w) = info.winsize {
        let size = libc::winsize {
            ws_row: w.ws_row as u16,
            ws_col: w.ws_col as u16,
            ws_xpixel: w.ws_xpixel as u16,
            ws_ypixel: w.ws_ypixel as u16,
        };
        sys::set_window_size(master, &size)?;
    }
    Ok(())
}
