//! The gate: a unit that systemd starts when everything else has stopped, as
//! the last before it calls kexec.
//!
//! ```text
//! systemd                          rcr-freeze.service             rcr-upgrade, in its scope
//! shutdown, umount, final ──start──▶ rcr-upgrade --gate ──opens──▶ sync, freeze, dump, seal, kill
//! systemd-kexec.service ◀──ended──── waits ◀─────────"sealed"───── ends
//! ```
//! Both files of it lie in /run and are there for one transition alone. Whatever
//! goes wrong from here on, kexec is called: the services are then stopped their
//! ordinary way first, and start cold.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rcr_systemd::shield::{self, RUNTIME_UNITS};
use rcr_systemd::systemctl;
use rcr_systemd::tags::{TAG_FILE, TagList};

use super::lock::Lock;
use super::{Ended, outcome};
use crate::exit::{Failure, OrExit};
use crate::progress::tell_kernel;

/// Where the working process is met.
const SOCKET: &str = "/run/rcr/gate";

const UNIT: &str = "rcr-freeze.service";

const WANTS: &str = "kexec.target.wants";

/// What the gate is told first when the services are in the store and have
/// ended; the names of those that are not follow.
const SEALED: &str = "sealed";

/// How often it is looked whether the transition is still wanted.
const LOOK: Duration = Duration::from_secs(5);

/// The unit and the place of meeting. Dropping it removes them.
#[derive(Debug)]
pub struct Gate {
    listener: UnixListener,
    standing: bool,
}

/// systemd's side of the gate, waiting. Dropping it lets systemd go on, with
/// what [`Visitor::answer`] was told.
#[derive(Debug)]
pub struct Visitor(UnixStream);

/// Whether an upgrade that still runs has put a gate up.
pub fn stands() -> Result<bool> {
    // A connection would count as systemd's.
    Ok(Path::new(SOCKET).exists() && Lock::is_held()?)
}

impl Gate {
    /// Puts up the gate for the next transition. systemd has to read it.
    pub fn set_up() -> Result<Self> {
        let _ = fs::remove_file(SOCKET);
        let listener = UnixListener::bind(SOCKET).context(SOCKET)?;
        listener.set_nonblocking(true).context(SOCKET)?;
        let gate = Gate {
            listener,
            standing: true,
        };
        let program = std::env::current_exe().context("the program itself")?;
        let units = Path::new(RUNTIME_UNITS);
        let (unit, wants) = (units.join(UNIT), units.join(WANTS));
        fs::create_dir_all(&wants).context(WANTS)?;
        fs::write(&unit, text(&program)).context(UNIT)?;
        let _ = fs::remove_file(wants.join(UNIT));
        std::os::unix::fs::symlink(&unit, wants.join(UNIT)).context(WANTS)?;
        Ok(gate)
    }

    /// Waits until everything else has stopped. An error if the transition is
    /// taken back.
    pub fn wait(&self) -> Result<Visitor> {
        let mut looked = Instant::now();
        let mut missing = 0;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(Visitor(stream));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context(SOCKET),
            }
            std::thread::sleep(Duration::from_millis(5));
            if looked.elapsed() < LOOK {
                continue;
            }
            looked = Instant::now();
            // systemd may be busy; it is asked twice.
            missing = match systemctl::kexec_is_pending() {
                Ok(false) => missing + 1,
                _ => 0,
            };
            if missing > 1 {
                bail!("the transition was taken back");
            }
        }
    }

    /// Leaves the files: from here on they are needed to the end.
    pub fn keep(&mut self) {
        self.standing = false;
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if self.standing {
            let units = Path::new(RUNTIME_UNITS);
            let files = [units.join(WANTS).join(UNIT), units.join(UNIT)];
            for path in files.iter().map(|p| p.as_path()).chain([Path::new(SOCKET)]) {
                if let Err(e) = fs::remove_file(path)
                    && e.kind() != ErrorKind::NotFound
                {
                    tracing::error!("{} stays behind: {e}", path.display());
                }
            }
            let _ = fs::remove_dir(units.join(WANTS));
        }
    }
}

impl Visitor {
    /// Tells how it went: a failure's words, or that the services are in the
    /// store.
    pub fn answer(mut self, result: &Result<Vec<String>, Failure>) {
        let word = match result {
            Ok(lost) => [&[SEALED.to_owned()], &lost[..]].concat().join(" "),
            Err(failure) => failure.to_string(),
        };
        if let Err(e) = self.0.write_all(word.as_bytes()) {
            tell_kernel(&format!("the gate was not told: {e}"));
        }
    }
}

fn text(program: &Path) -> String {
    format!(
        "# Made by rcr for the jump into the next kernel; it does not outlive it.\n\
         [Unit]\n\
         Description=Freeze the services that cross\n\
         DefaultDependencies=no\n\
         After=shutdown.target umount.target final.target\n\
         Before=systemd-kexec.service kexec.target\n\n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart={} --gate\n\
         StandardOutput=null\n\
         StandardError=null\n\
         TimeoutStartSec=15min\n",
        program.display()
    )
}

/// Runs as the gate.
pub fn visit() -> Result<Ended, Failure> {
    let told = ask().or_rolled_back();
    let reason = match told {
        Ok(word) if word.split(' ').next() == Some(SEALED) => {
            let lost: Vec<&str> = word.split(' ').skip(1).collect();
            stop_services(&lost).or_rolled_back()?;
            return Ok(Ended::Left);
        }
        Ok(word) if word.is_empty() => {
            // It may have sealed the store before it ended; what the services
            // do from here on must not be undone by restoring them.
            if let Err(e) = rcr_kexec::unload() {
                tell_kernel(&format!("{:#}", anyhow::Error::from(e)));
            }
            "the program that carries the services ended before its time".to_owned()
        }
        Ok(word) => word,
        Err(failure) => failure.to_string(),
    };
    let reason = reason.replace('\n', "; ");
    tell_kernel(&format!("{reason}; the services will start cold"));
    outcome::leave_word(&reason);
    let tagged = TagList::load(Path::new(TAG_FILE)).or_rolled_back()?.units();
    let tagged: Vec<&str> = tagged.iter().map(|unit| unit.as_str()).collect();
    stop_services(&tagged).or_rolled_back()?;
    Err(Failure::new(
        crate::exit::Exit::RolledBack,
        anyhow!("{reason}"),
    ))
}

fn ask() -> Result<String> {
    let mut stream = UnixStream::connect(SOCKET).context(SOCKET)?;
    let mut word = String::new();
    stream.read_to_string(&mut word).context(SOCKET)?;
    Ok(word)
}

/// Everything that systemd would have done long ago.
fn stop_services(units: &[&str]) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    shield::lower(units)?;
    systemctl::stop(units)?;
    nix::unistd::sync();
    Ok(())
}
