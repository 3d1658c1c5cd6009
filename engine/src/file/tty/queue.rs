//! What waits in a terminal: taken out, put in.
//!
//! ```text
//!   master ── write ─▶ [ input: lines ] ─▶ read ── slave
//!   master ◀─ read ── [    output    ] ◀─ write ── slave
//! ```
//! Reading is the only way to see it, so whoever looks puts it back at once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::file::record::{LineEnd, RcrLine};
use crate::file::sys;
use crate::sys::{SysError, SysResult};

/// Larger than what one read gives (`N_TTY_BUF_SIZE`).
const ONE_READ: usize = 8192;
/// Places in `c_cc`: asm-generic/termbits-common.h.
const VEOF: usize = 4;
const VEOL: usize = 11;
const VLNEXT: usize = 15;
const VEOL2: usize = 16;
const IXON: u32 = 0o2000;
const ISIG: u32 = 0o1;
const ICANON: u32 = 0o2;
const ECHO_ALL: u32 = 0o10 | 0o20 | 0o40 | 0o100 | 0o1000 | 0o2000 | 0o4000;
const IEXTEN: u32 = 0o100_000;
/// Input is processed by the master (asm-generic/termbits.h).
pub(super) const EXTPROC: u32 = 0o200_000;

/// What waits on both sides.
#[derive(Debug, Default)]
pub(super) struct Queued {
    pub input: Vec<RcrLine>,
    pub output: Vec<u8>,
}

/// Which events a terminal's end is ready for.
pub(super) fn ready(fd: BorrowedFd<'_>, for_what: PollFlags) -> SysResult<PollFlags> {
    let mut fds = [PollFd::new(fd, for_what)];
    poll(&mut fds, PollTimeout::ZERO).map_err(|e| SysError::new("poll", "terminal", e))?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// One read that does not wait; `None`: there is nothing.
fn read(fd: BorrowedFd<'_>) -> SysResult<Option<Vec<u8>>> {
    let mut data = vec![0; ONE_READ];
    match nix::unistd::read(fd, &mut data) {
        Ok(n) => {
            data.truncate(n);
            Ok(Some(data))
        }
        // The other end may be closed.
        Err(Errno::EAGAIN | Errno::EIO) => Ok(None),
        Err(e) => Err(SysError::new("read", "terminal", e)),
    }
}

/// Takes everything out. `slave` does not wait; `packets`: the master's reads
/// begin with a byte of their own.
pub(super) fn take(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    packets: bool,
) -> (Queued, SysResult<()>) {
    let mut queued = Queued::default();
    let done = take_into(&mut queued, master, slave, packets);
    (queued, done)
}

fn take_into(
    queued: &mut Queued,
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    packets: bool,
) -> SysResult<()> {
    let t = sys::termios(slave)?;
    let canonical = t.c_lflag & ICANON != 0;
    while let Some(data) = read(slave)? {
        let ends = data.last().is_some_and(|c| line_ends(&t).contains(c));
        let end = match (canonical, ends) {
            (false, _) => LineEnd::Open,
            (true, true) => LineEnd::LastByte,
            (true, false) => LineEnd::EndOfFile,
        };
        queued.input.push(line(data, end));
    }
    if canonical {
        // A line that is not ended is seen without lines only.
        let mut raw = t;
        raw.c_lflag &= !(ICANON | ECHO_ALL);
        sys::set_termios(slave, &raw)?;
        let rest = read(slave);
        sys::set_termios(slave, &t)?;
        if let Some(data) = rest?.filter(|d| !d.is_empty()) {
            queued.input.push(line(data, LineEnd::Open));
        }
    }
    // Not ours to make non-blocking: it is asked each time.
    while ready(master, PollFlags::POLLIN)?.contains(PollFlags::POLLIN) {
        let Some(mut data) = read(master)?.filter(|d| !d.is_empty()) else {
            break;
        };
        if packets {
            data.remove(0);
        }
        queued.output.extend(data);
    }
    Ok(())
}

fn line(data: Vec<u8>, end: LineEnd) -> RcrLine {
    RcrLine {
        data,
        end: end.into(),
    }
}

/// The bytes that end a line.
fn line_ends(t: &libc::termios2) -> Vec<u8> {
    let own = [t.c_cc[VEOL], t.c_cc[VEOL2]];
    let own = own.into_iter().filter(|&c| c != 0);
    own.chain([b'\n']).collect()
}

/// Puts everything in, in its order, and leaves the settings as they are.
pub(super) fn put(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, queued: &Queued) -> SysResult<()> {
    if queued.input.is_empty() && queued.output.is_empty() {
        return Ok(());
    }
    let t = sys::termios(slave)?;
    let mut plain = t;
    // The master's packets tell it of changes of IXON.
    plain.c_iflag &= IXON;
    plain.c_oflag = 0;
    plain.c_lflag = (t.c_lflag | IEXTEN) & !(ISIG | ECHO_ALL);
    let used = [t.c_cc[VEOL], t.c_cc[VEOL2], t.c_cc[8], t.c_cc[9], b'\n'];
    let mut free = (1..=u8::MAX).filter(|c| !used.contains(c));
    let (quote, end) = (free.next().unwrap_or(1), free.next().unwrap_or(2));
    let canonical = t.c_lflag & ICANON != 0;
    if canonical {
        plain.c_cc[VLNEXT] = quote;
        plain.c_cc[VEOF] = end;
    } else if queued
        .input
        .iter()
        .any(|l| l.data.iter().any(|c| [t.c_cc[8], t.c_cc[9]].contains(c)))
    {
        plain.c_iflag = 0;
    }
    sys::set_termios(slave, &plain)?;
    let quote = canonical.then_some(quote);
    let done = type_lines(slave, &queued.input, quote, end)
        .and_then(|()| write_output(master, slave, &queued.output));
    sys::set_termios(slave, &t)?;
    done
}

/// Types the lines; `quote` makes the next byte a plain one.
fn type_lines(
    slave: BorrowedFd<'_>,
    lines: &[RcrLine],
    quote: Option<u8>,
    end: u8,
) -> SysResult<()> {
    for line in lines {
        let last = usize::from(line.end() == LineEnd::LastByte && quote.is_some());
        let (content, last) = line.data.split_at(line.data.len().saturating_sub(last));
        for &c in content {
            if let Some(quote) = quote {
                sys::tty_type(slave, quote)?;
            }
            sys::tty_type(slave, c)?;
        }
        for &c in last {
            sys::tty_type(slave, c)?;
        }
        if line.end() == LineEnd::EndOfFile && quote.is_some() {
            sys::tty_type(slave, end)?;
        }
    }
    Ok(())
}

/// Lets the slave, which does not wait, say it again.
fn write_output(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, mut rest: &[u8]) -> SysResult<()> {
    while !rest.is_empty() {
        match nix::unistd::write(slave.as_fd(), rest) {
            Ok(n) if n > 0 => rest = &rest[n..],
            Ok(_) | Err(Errno::EAGAIN) => {
                let on = format!("{} bytes to master {}", rest.len(), master.as_raw_fd());
                return Err(SysError::new("write", on, Errno::EAGAIN));
            }
            Err(e) => return Err(SysError::new("write", "terminal", e)),
        }
    }
    Ok(())
}
