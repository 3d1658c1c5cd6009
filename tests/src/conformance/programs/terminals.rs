//! Pseudo terminals, and the sessions they control.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, ensure};
use nix::sys::termios::{self, InputFlags, LocalFlags, SetArg};
use nix::unistd::Pid;

use super::refusals::expect;
use crate::conformance::sys;
use crate::conformance::{Case, Check, Findings, Member, Stage};

/// The programs of this area. The host chooses indexes, so they run one by one.
pub const CASES: &[Case] = &[
    Case::new("terminals/pair", "both ends of a pseudo terminal", pair).alone(),
    Case::new("terminals/raw", "raw mode and a window size", raw).alone(),
    Case::new(
        "terminals/queued",
        "bytes waiting in both directions",
        queued,
    )
    .alone(),
    Case::new(
        "terminals/lines",
        "whole lines and one that is not ended",
        lines,
    )
    .alone(),
    Case::new(
        "terminals/packets",
        "packet mode and exclusive use",
        packets,
    )
    .alone(),
    Case::new("terminals/several", "indexes with gaps", several).alone(),
    Case::new(
        "terminals/hung-up",
        "a slave whose master is closed",
        hung_up,
    )
    .alone(),
    Case::new("terminals/alone", "a master whose slave is closed", alone).alone(),
    Case::new("terminals/shared", "a terminal of parent and child", shared).alone(),
    Case::new(
        "terminals/session",
        "a session with its terminal and foreground",
        session,
    )
    .alone(),
    Case::new(
        "terminals/dev-tty",
        "a terminal opened as /dev/tty",
        dev_tty,
    )
    .alone(),
    Case::new(
        "terminals/outside",
        "a slave whose master is elsewhere",
        outside,
    )
    .refused()
    .alone(),
    Case::new("terminals/console", "the console", console)
        .refused()
        .alone(),
];

struct Pair {
    master: File,
    slave: File,
    index: i32,
}

const TIOCGPTN: i64 = 0x8004_5430;
const TIOCSPTLCK: i64 = 0x4004_5431;
const TIOCGPTLCK: i64 = 0x8004_5439;
const TIOCPKT: i64 = 0x5420;
const TIOCGPKT: i64 = 0x8004_5438;
const TIOCEXCL: i64 = 0x540c;
const TIOCGEXCL: i64 = 0x8004_5440;

fn control(fd: &impl AsFd, request: i64, value: &mut i32) -> Result<i64> {
    let at = std::ptr::from_mut(value) as u64;
    let fd = fd.as_fd().as_raw_fd() as u64;
    // SAFETY: callers use requests that read or write one int.
    Ok(unsafe { sys::call(libc::SYS_ioctl, [fd, request as u64, at, 0, 0, 0]) }?)
}

fn ask(fd: &impl AsFd, request: i64) -> Result<i32> {
    let mut value = 0;
    control(fd, request, &mut value)?;
    Ok(value)
}

impl Pair {
    fn new() -> Result<Self> {
        let master = open("/dev/ptmx")?;
        control(&master, TIOCSPTLCK, &mut 0)?;
        let index = ask(&master, TIOCGPTN)?;
        let slave = open(&format!("/dev/pts/{index}"))?;
        Ok(Self {
            master,
            slave,
            index,
        })
    }

    fn raw() -> Result<Self> {
        let pair = Self::new()?;
        let mut t = termios::tcgetattr(&pair.slave)?;
        termios::cfmakeraw(&mut t);
        termios::tcsetattr(&pair.slave, SetArg::TCSANOW, &t)?;
        Ok(pair)
    }

    /// Sends a word each way.
    fn talk(&mut self, f: &mut Findings) -> Result<()> {
        let mut word = [0; 5];
        self.slave.write_all(b"there")?;
        self.master.read_exact(&mut word)?;
        f.same("what the slave wrote", b"there", &word);
        self.master.write_all(b"back\n")?;
        self.slave.read_exact(&mut word)?;
        f.same("what the master wrote", b"back\n", &word);
        Ok(())
    }
}

fn open(path: &str) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .with_context(|| path.to_owned())
}

fn without_echo(fd: &impl AsFd) -> Result<()> {
    let mut t = termios::tcgetattr(fd)?;
    t.local_flags.remove(LocalFlags::ECHO);
    Ok(termios::tcsetattr(fd, SetArg::TCSANOW, &t)?)
}

fn pair(_: &Stage) -> Result<Check> {
    let mut p = Pair::new()?;
    without_echo(&p.slave)?;
    nix::unistd::fchown(&p.slave, Some(1000.into()), None)?;
    let before = termios::tcgetattr(&p.slave)?;
    let node = p.slave.metadata()?;
    Ok(Box::new(move |f| {
        f.same("index", &p.index, &ask(&p.master, TIOCGPTN)?);
        f.same("locked", &0, &ask(&p.master, TIOCGPTLCK)?);
        let t = termios::tcgetattr(&p.slave)?;
        f.that("the settings are the same", t == before);
        let now = std::fs::metadata(format!("/dev/pts/{}", p.index))?;
        f.same(
            "owner and mode",
            &(node.uid(), node.gid(), node.mode()),
            &(now.uid(), now.gid(), now.mode()),
        );
        p.talk(f)
    }))
}

fn raw(_: &Stage) -> Result<Check> {
    let mut p = Pair::raw()?;
    let mut t = termios::tcgetattr(&p.slave)?;
    t.control_chars[libc::VERASE] = 9;
    t.input_flags.insert(InputFlags::IXON);
    termios::tcsetattr(&p.slave, SetArg::TCSANOW, &t)?;
    let mut size = [40_u16, 120, 7, 9];
    let window = |request: u64, size: &mut [u16; 4], p: &Pair| -> Result<()> {
        let fd = p.slave.as_raw_fd() as u64;
        let args = [fd, request, size.as_mut_ptr() as u64, 0, 0, 0];
        // SAFETY: four shorts are read or written.
        unsafe { sys::call(libc::SYS_ioctl, args) }?;
        Ok(())
    };
    window(libc::TIOCSWINSZ, &mut size, &p)?;
    Ok(Box::new(move |f| {
        let now = termios::tcgetattr(&p.slave)?;
        f.that("the settings are the same", now == t);
        let mut is = [0; 4];
        window(libc::TIOCGWINSZ, &mut is, &p)?;
        f.same("window", &[40, 120, 7, 9], &is);
        p.talk(f)
    }))
}

fn queued(_: &Stage) -> Result<Check> {
    let mut p = Pair::raw()?;
    let input: Vec<u8> = (0..3000_u32).map(|n| (n % 251) as u8).collect();
    let output: Vec<u8> = (0..9000_u32).map(|n| (n % 241) as u8).collect();
    p.master.write_all(&input)?;
    p.slave.write_all(&output)?;
    Ok(Box::new(move |f| {
        let mut is = vec![0; input.len()];
        p.slave.read_exact(&mut is)?;
        f.that("what the slave has to read", is == input);
        let mut is = vec![0; output.len()];
        p.master.read_exact(&mut is)?;
        f.that("what the master has to read", is == output);
        p.talk(f)?;
        p.master.write_all(&input)?;
        Ok(p.slave.write_all(&output)?)
    }))
}

fn lines(_: &Stage) -> Result<Check> {
    let mut p = Pair::new()?;
    without_echo(&p.slave)?;
    // A quoted interrupt, a line that ends without its end, an empty one.
    let typed = b"first\nsec\x16\x03ond\nthird\x04\x04open";
    p.master.write_all(typed)?;
    Ok(Box::new(move |f| {
        let mut text = [0; 64];
        let mut next = || -> Result<Vec<u8>> {
            let n = p.slave.read(&mut text)?;
            Ok(text[..n].to_vec())
        };
        for line in [&b"first\n"[..], b"sec\x03ond\n", b"third", b""] {
            f.same("a line", &line.to_vec(), &next()?);
        }
        p.master.write_all(b"ed\n")?;
        f.same("the rest", &b"opened\n".to_vec(), &next()?);
        Ok(p.master.write_all(typed)?)
    }))
}

fn packets(_: &Stage) -> Result<Check> {
    let mut p = Pair::raw()?;
    control(&p.master, TIOCPKT, &mut 1)?;
    control(&p.slave, TIOCEXCL, &mut 0)?;
    p.slave.write_all(b"word")?;
    Ok(Box::new(move |f| {
        f.same("packet mode", &1, &ask(&p.master, TIOCGPKT)?);
        f.same("exclusive", &1, &ask(&p.slave, TIOCGEXCL)?);
        let mut text = [9; 16];
        let n = p.master.read(&mut text)?;
        f.same("a packet", &b"\0word".to_vec(), &text[..n].to_vec());
        Ok(p.slave.write_all(b"word")?)
    }))
}

fn several(_: &Stage) -> Result<Check> {
    let mut all: Vec<Pair> = (0..7).map(|_| Pair::new()).collect::<Result<_>>()?;
    let mut kept = Vec::new();
    for (n, p) in all.drain(..).enumerate() {
        without_echo(&p.slave)?;
        if n % 3 != 1 {
            kept.push(p);
        }
    }
    kept.reverse();
    Ok(Box::new(move |f| {
        for p in &mut kept {
            f.same("index", &p.index, &ask(&p.master, TIOCGPTN)?);
            p.talk(f)?;
        }
        Ok(())
    }))
}

fn hung_up(_: &Stage) -> Result<Check> {
    let p = Pair::new()?;
    let mut slave = p.slave;
    drop(p.master);
    ensure!(slave.read(&mut [0; 4])? == 0, "it is not hung up");
    Ok(Box::new(move |f| {
        f.same("a read", &0, &slave.read(&mut [0; 4])?);
        let refused = slave.write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write", &Err(Some(libc::EIO)), &refused);
        Ok(())
    }))
}

fn alone(_: &Stage) -> Result<Check> {
    let p = Pair::raw()?;
    let (mut master, mut slave) = (p.master, p.slave);
    slave.write_all(b"last words")?;
    drop(slave);
    let mut left = Some(b"last words".to_vec());
    Ok(Box::new(move |f| {
        let mut text = [0; 32];
        if let Some(left) = left.take() {
            let n = master.read(&mut text)?;
            f.same("what is left", &left, &text[..n].to_vec());
        }
        let end = master.read(&mut text).map_err(|e| e.raw_os_error());
        f.same("then", &Err(Some(libc::EIO)), &end);
        Ok(())
    }))
}

fn shared(_: &Stage) -> Result<Check> {
    let mut p = Pair::raw()?;
    let mut slave = p.slave.try_clone()?;
    let member = Member::start("child", move || {
        Ok(Box::new(move |f: &mut Findings| {
            let mut word = [0; 4];
            slave.read_exact(&mut word)?;
            f.same("the request", b"ping", &word);
            Ok(slave.write_all(b"pong")?)
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        p.master.write_all(b"ping")?;
        member.check(f)?;
        let mut word = [0; 4];
        p.master.read_exact(&mut word)?;
        f.same("the answer", b"pong", &word);
        Ok(())
    }))
}

/// Makes the slave the terminal of a new session of ours.
fn lead(slave: &File) -> Result<()> {
    nix::unistd::setsid()?;
    control(slave, libc::TIOCSCTTY as i64, &mut 0)?;
    Ok(())
}

pub(super) fn session(_: &Stage) -> Result<Check> {
    let mut p = Pair::new()?;
    let slave = p.slave.try_clone()?;
    let leader = Member::start("leader", move || {
        lead(&slave)?;
        let job = Member::start("job", || {
            nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            Ok(Box::new(|f: &mut Findings| {
                f.that("it has a terminal", open("/dev/tty").is_ok());
                let own = nix::unistd::getpgrp().as_raw();
                let front = ask(&open("/dev/tty")?, libc::TIOCGPGRP as i64)?;
                f.same("foreground", &own, &front);
                Ok(())
            }) as Check)
        })?;
        control(&slave, libc::TIOCSPGRP as i64, &mut { job.pid })?;
        Ok(Box::new(move |f: &mut Findings| {
            let me = std::process::id() as i32;
            f.same("session", &me, &ask(&slave, libc::TIOCGSID as i64)?);
            f.same("group", &job.pid, &ask(&slave, libc::TIOCGPGRP as i64)?);
            job.check(f)
        }) as Check)
    })?;
    without_echo(&p.slave)?;
    Ok(Box::new(move |f| {
        leader.check(f)?;
        p.talk(f)
    }))
}

fn dev_tty(_: &Stage) -> Result<Check> {
    let mut p = Pair::raw()?;
    let slave = p.slave.try_clone()?;
    let leader = Member::start("leader", move || {
        lead(&slave)?;
        let mut tty = open("/dev/tty")?;
        Ok(Box::new(move |f: &mut Findings| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", tty.as_raw_fd()))?;
            f.same("name", "/dev/tty", &link.to_string_lossy());
            Ok(tty.write_all(b"hello")?)
        }) as Check)
    })?;
    Ok(Box::new(move |f| {
        leader.check(f)?;
        let mut word = [0; 5];
        p.master.read_exact(&mut word)?;
        f.same("what it wrote", b"hello", &word);
        Ok(())
    }))
}

fn outside(stage: &Stage) -> Result<Check> {
    let p = Pair::raw()?;
    let mut master = p.master.try_clone()?;
    super::refusals::stranger(move || {
        let mut word = [0; 5];
        let _ = master.read_exact(&mut word);
        let _ = master.write_all(&word);
        // Its end would hang the slave up before it has read.
        let _ = master.read_exact(&mut word);
    })?;
    let mut slave = p.slave;
    drop(p.master);
    expect(stage, &slave, "tty")?;
    Ok(Box::new(move |f| {
        slave.write_all(b"hello")?;
        let mut word = [0; 5];
        slave.read_exact(&mut word)?;
        f.same("the echo", b"hello", &word);
        slave.write_all(b"leave")?;
        Ok(())
    }))
}

fn console(stage: &Stage) -> Result<Check> {
    let console = open("/dev/console")
        .map_err(|e| crate::conformance::Unavailable::because(format!("no console: {e:#}")))?;
    expect(stage, &console, "tty")?;
    Ok(Box::new(move |f| {
        f.that("it is still open", console.try_clone().is_ok());
        Ok(())
    }))
}
