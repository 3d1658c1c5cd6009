//! Calls on terminals: ioctl_tty(2).

use std::ffi::{CStr, c_int};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{done, owned};
use crate::sys::{SysError, SysResult};

// asm-generic/ioctls.h
const TIOCEXCL: u64 = 0x540c;
const TIOCSTI: u64 = 0x5412;
const TIOCPKT: u64 = 0x5420;
const TIOCVHANGUP: u64 = 0x5437;
const TIOCGPTPEER: u64 = 0x5441;
const TCGETS2: u64 = 0x802c_542a;
const TCSETS2: u64 = 0x402c_542b;
const TIOCSPTLCK: u64 = 0x4004_5431;

/// What a terminal can be asked for that is one number.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub(crate) enum TtyNumber {
    /// Of a master: the index of the pair (TIOCGPTN).
    Index = 0x8004_5430,
    /// Of a master: whether its slave cannot be opened (TIOCGPTLCK).
    Locked = 0x8004_5439,
    /// Of a master: whether it reads packets (TIOCGPKT).
    Packets = 0x8004_5438,
    /// Whether it can be opened by root alone (TIOCGEXCL).
    Exclusive = 0x8004_5440,
    /// Device number, of a master that of its slave (TIOCGDEV).
    Device = 0x8004_5432,
    /// The session it controls (TIOCGSID).
    Session = 0x5429,
    /// The foreground process group (TIOCGPGRP).
    Group = 0x540f,
    /// The line discipline (TIOCGETD).
    Discipline = 0x5424,
}

/// Asks a terminal.
pub(crate) fn tty_number(fd: BorrowedFd<'_>, what: TtyNumber) -> SysResult<u32> {
    let mut n: c_int = 0;
    // SAFETY: all of these write one int, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), what as u64, &raw mut n) };
    done("ioctl", format!("terminal, {what:?}"), r.into())?;
    Ok(n as u32)
}

fn tell(fd: BorrowedFd<'_>, call: &'static str, request: u64, value: bool) -> SysResult<()> {
    let value = c_int::from(value);
    // SAFETY: callers pass requests that read one int, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    done(call, value, r.into()).map(drop)
}

/// Lets a master's slave be opened, or not.
pub(crate) fn tty_lock(fd: BorrowedFd<'_>, locked: bool) -> SysResult<()> {
    tell(fd, "ioctl(TIOCSPTLCK)", TIOCSPTLCK, locked)
}

/// Lets a master read packets, or not.
pub(crate) fn tty_packets(fd: BorrowedFd<'_>, packets: bool) -> SysResult<()> {
    tell(fd, "ioctl(TIOCPKT)", TIOCPKT, packets)
}

/// Lets nobody but root open it any more.
pub(crate) fn tty_exclusive(fd: BorrowedFd<'_>) -> SysResult<()> {
    // SAFETY: takes no argument.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TIOCEXCL, 0) };
    done("ioctl(TIOCEXCL)", "terminal", r.into()).map(drop)
}

/// Hangs up all that have it open so far.
pub(crate) fn tty_hang_up(fd: BorrowedFd<'_>) -> SysResult<()> {
    // SAFETY: takes no argument.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TIOCVHANGUP, 0) };
    done("ioctl(TIOCVHANGUP)", "terminal", r.into()).map(drop)
}

/// Opens the slave of a master.
pub(crate) fn tty_peer(master: BorrowedFd<'_>, flags: c_int) -> SysResult<OwnedFd> {
    let flags = flags | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: numbers only.
    let r = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) };
    owned("ioctl(TIOCGPTPEER)", "master", r.into())
}

/// Puts one byte into the terminal's input, as if it had been typed.
pub(crate) fn tty_type(fd: BorrowedFd<'_>, byte: u8) -> SysResult<()> {
    // SAFETY: reads one byte, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TIOCSTI, &raw const byte) };
    done("ioctl(TIOCSTI)", "terminal", r.into()).map(drop)
}

/// The settings; of a master those of its slave.
pub(crate) fn termios(fd: BorrowedFd<'_>) -> SysResult<libc::termios2> {
    // SAFETY: all zero is a value of this struct of numbers.
    let mut t: libc::termios2 = unsafe { std::mem::zeroed() };
    // SAFETY: writes the struct, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TCGETS2, &raw mut t) };
    done("ioctl(TCGETS2)", "terminal", r.into())?;
    Ok(t)
}

/// Changes the settings at once.
pub(crate) fn set_termios(fd: BorrowedFd<'_>, t: &libc::termios2) -> SysResult<()> {
    // SAFETY: reads the struct, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TCSETS2, std::ptr::from_ref(t)) };
    done("ioctl(TCSETS2)", "terminal", r.into()).map(drop)
}

/// The size of the window.
pub(crate) fn window_size(fd: BorrowedFd<'_>) -> SysResult<libc::winsize> {
    let mut w = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: writes the struct, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut w) };
    done("ioctl(TIOCGWINSZ)", "terminal", r.into())?;
    Ok(w)
}

/// Sets the size of the window.
pub(crate) fn set_window_size(fd: BorrowedFd<'_>, w: &libc::winsize) -> SysResult<()> {
    // SAFETY: reads the struct, alive across the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, std::ptr::from_ref(w)) };
    done("ioctl(TIOCSWINSZ)", "terminal", r.into()).map(drop)
}

/// Opens `path` (a `/dev/tty`) in `root` as a process does whose session
/// `terminal` controls. The caller must have a single thread.
pub(crate) fn open_as_controlling(
    terminal: BorrowedFd<'_>,
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: c_int,
) -> SysResult<OwnedFd> {
    // A number for the child to put the file under: it shares our table.
    let place = super::dup(terminal)?;
    // SAFETY: as fork(2), but for the table; there is one thread.
    let child = unsafe {
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0)
    };
    if child == 0 {
        let errno = controlled(terminal, root, path, flags, &place).err();
        // SAFETY: leaves at once.
        unsafe { libc::_exit(errno.map_or(0, |e| e.errno as i32)) }
    }
    done("clone", "a session for a terminal", child)?;
    let mut status = 0;
    // SAFETY: writes one int, alive across the call.
    let r = unsafe { libc::waitpid(child as i32, &raw mut status, 0) };
    done("waitpid", child, r.into())?;
    // The end of a session may come with SIGHUP for its foreground.
    if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
        let errno = match libc::WIFEXITED(status) {
            true => Errno::from_raw(libc::WEXITSTATUS(status)),
            false => Errno::EINTR,
        };
        return Err(SysError::new("open", path.to_string_lossy(), errno));
    }
    Ok(place)
}

fn controlled(
    terminal: BorrowedFd<'_>,
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: c_int,
    place: &OwnedFd,
) -> SysResult<()> {
    // SAFETY: no arguments.
    done("setsid", "", unsafe { libc::setsid() }.into())?;
    // SAFETY: numbers only.
    let r = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    done("ioctl(TIOCSCTTY)", "", r.into())?;
    let file = super::open_in_root(root, path, flags, 0)?;
    // SAFETY: `place` is ours to replace, and is not used meanwhile.
    let r = unsafe { libc::dup3(file.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    done("dup3", "", r.into()).map(drop)
}
