//! A small world in which programs run one after the other: process ids that
//! nobody else takes meanwhile, and mounts as on a host with systemd.

use std::collections::BTreeSet;
use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::exit;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::{Lab, all};

/// What a worker is told when it starts.
#[derive(Debug, Clone)]
pub struct WorkerPlan {
    /// Directory of the run, with the executables in it.
    pub home: PathBuf,
    /// A name that nothing else on this host has.
    pub unique: String,
    /// Cycles of the mode that dumps and restores several times.
    pub cycles: u32,
    /// Added to the seeds of what is random.
    pub seed: u64,
}

/// The life of a worker: names of cases on the standard input, results on the
/// standard output. Must be called by a process with a single thread.
pub fn work(plan: &WorkerPlan) -> Result<()> {
    let new = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    unshare(new).context("namespaces of a worker")?;
    // SAFETY: there is one thread, so no lock is held that the child would miss.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Its end takes everything in its process id namespace along.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            let status = match inside(plan) {
                Ok(()) => 0,
                Err(e) => {
                    eprintln!("worker: {e:#}");
                    1
                }
            };
            exit(status)
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, code) => exit(code),
            _ => exit(1),
        },
    }
}

fn inside(plan: &WorkerPlan) -> Result<()> {
    own_mounts().context("mounts of a worker")?;
    loopback_up().context("network of a worker")?;
    let lab = Lab {
        home: plan.home.clone(),
        program: plan.home.join("program"),
        tool: plan.home.join("tool"),
        unique: plan.unique.clone(),
        seed: plan.seed,
    };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let case = all().find(|c| c.name == line);
        let result = lab.case(case.context(line)?, plan.cycles);
        println!("{}", serde_json::to_string(&result)?);
    }
    Ok(())
}

/// A mount namespace of our own that is as on a host with systemd: shared,
/// without hierarchies of cgroup version 1, without mounts under mounts, and
/// without what other programs mount for a while where temporary files are.
fn own_mounts() -> Result<()> {
    let none: Option<&str> = None;
    for kind in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, "/", none, MsFlags::MS_REC | kind, none)?;
    }
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mut seen = BTreeSet::new();
    let temporary = std::env::temp_dir();
    // The last ones first: they may lie in earlier ones.
    for line in text.lines().rev() {
        let place = line.split(' ').nth(4).context("mountinfo")?;
        let below = Path::new(place).starts_with(&temporary) && Path::new(place) != temporary;
        if !seen.insert(place) || below || line.contains(" - cgroup ") {
            umount2(place, MntFlags::MNT_DETACH).with_context(|| place.to_owned())?;
        }
    }
    umount2("/proc", MntFlags::MNT_DETACH).context("/proc")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none).context("/proc")
}

/// A new network namespace has a loopback device that is down.
fn loopback_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let kind = SockType::Datagram;
    let fd = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an ifreq of zeros is valid; the name and flags are set below.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the request outlives the call and is of the type the call takes.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    if r < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
