//! PID 1 between the initramfs and the distribution's init.
//!
//! It must not die and must not wait for ever, so it does four things alone:
//! fork, wait with a bound, reap, exec. All that can fail runs in a child; a
//! second child cleans up where the first one did not end by itself.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rcr_initramfs::EarlyConfig;
use rcr_initramfs::config::{BOOT_DIR, INIT_PATH};

use crate::worker::{self, cleanup};
use crate::{boot, kmsg, sys};

/// How long cleaning up may take.
const CLEANUP_LIMIT: Duration = Duration::from_secs(20);

/// How often a child is looked after.
const POLL: Duration = Duration::from_millis(5);

/// What the kernel itself tries (`init/main.c`).
const DEFAULT_INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Exited(i32),
    /// By a signal that was not ours.
    Killed(Signal),
    /// It was still at work at its time limit and was killed.
    TimedOut(Duration),
    /// It never began.
    NotStarted(nix::Error),
}

/// Restores what was handed over and becomes the distribution's init.
pub fn run() -> ! {
    let config = std::panic::catch_unwind(boot::staged_config)
        .unwrap_or_else(|_| Err(anyhow::anyhow!("the configuration could not be read")));
    let config = config.unwrap_or_else(|error| {
        kmsg::warn(&format!("init: {error:#}"));
        EarlyConfig::default()
    });
    let limit = Duration::from_secs(config.time_limit_seconds);
    let ended = supervise(limit, || worker::main(&config));
    if ended != Ended::Exited(0) {
        kmsg::warn(&format!(
            "init: {}; starting the services cold",
            cleanup::describe(&ended)
        ));
        let cleaned = supervise(CLEANUP_LIMIT, || cleanup::main(&ended));
        if cleaned != Ended::Exited(0) {
            kmsg::warn(&format!(
                "init: cleaning up: {}",
                cleanup::describe(&cleaned)
            ));
        }
    }
    exec_real_init(&config)
}

/// Runs `body` in a child for at most `limit`.
fn supervise(limit: Duration, body: impl FnOnce() -> i32) -> Ended {
    match sys::fork_worker(body) {
        Ok(child) => wait(child, limit),
        Err(error) => Ended::NotStarted(error),
    }
}

/// Waits for this one child: others are restored processes and the next init's.
fn wait(child: Pid, limit: Duration) -> Ended {
    let started = Instant::now();
    let mut timed_out = false;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) if timed_out => {
                return Ended::TimedOut(limit);
            }
            Ok(WaitStatus::Exited(_, code)) => return Ended::Exited(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ended::Killed(signal),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Ended::NotStarted(error),
        }
        if !timed_out && started.elapsed() >= limit {
            let _ = kill(child, Signal::SIGKILL);
            timed_out = true;
        }
        // A child in an uninterruptible sleep is left behind in the end.
        if timed_out && started.elapsed() >= limit + CLEANUP_LIMIT {
            return Ended::TimedOut(limit);
        }
        std::thread::sleep(POLL);
    }
}

/// Becomes the real init, with the arguments and environment that we were given.
fn exec_real_init(config: &EarlyConfig) -> ! {
    // Nothing of ours is needed any more; the running program stays mapped.
    let _ = umount2(BOOT_DIR, MntFlags::MNT_DETACH);
    let _ = std::fs::remove_dir(BOOT_DIR);
    sys::default_sigpipe();
    let rest: Vec<CString> = std::env::args_os()
        .skip(1)
        .filter_map(|arg| CString::new(arg.into_vec()).ok())
        .collect();
    let own = config
        .real_init
        .as_deref()
        .filter(|path| *path != INIT_PATH);
    for path in own.into_iter().chain(DEFAULT_INITS) {
        let Ok(program) = CString::new(path) else {
            continue;
        };
        let mut args = vec![program.clone()];
        args.extend(rest.iter().cloned());
        if let Err(error) = nix::unistd::execv(&program, &args)
            && (error != nix::Error::ENOENT || own == Some(path))
        {
            kmsg::warn(&format!("init: {path}: {error}"));
        }
    }
    // As without us: the kernel says that there is no init, and panics.
    kmsg::warn("init: no working init found");
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_told_apart_by_how_they_end() {
        let limit = Duration::from_secs(600);
        assert_eq!(supervise(limit, || 0), Ended::Exited(0));
        assert_eq!(supervise(limit, || 7), Ended::Exited(7));
        assert_eq!(
            supervise(limit, || panic!("on purpose")),
            Ended::Exited(101)
        );
        let ended = supervise(limit, || {
            let _ = kill(Pid::this(), Signal::SIGKILL);
            0
        });
        assert_eq!(ended, Ended::Killed(Signal::SIGKILL));
        let limit = Duration::from_millis(1);
        let ended = supervise(limit, || {
            loop {
                std::thread::sleep(Duration::from_secs(600));
            }
        });
        assert_eq!(ended, Ended::TimedOut(limit));
    }
}
