//! A program and how it is to be run.

use rcr_engine::file::TcpPolicy;

use super::forge::Forge;
use super::{Findings, Stage};

/// Looks whether everything still is as the setup made it. Called once after
/// each cycle; may change its state for the next one.
pub type Check = Box<dyn FnMut(&mut Findings) -> anyhow::Result<()>>;

/// Builds the state and gives the check that knows it. Where this machine lacks
/// what it takes, it fails with [`Unavailable::because`].
pub type Setup = fn(&Stage) -> anyhow::Result<Check>;

/// What becomes of a program's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It goes on as if nothing had been.
    Carried,
    /// Nothing could carry it: the dump is refused by name.
    Refused,
    /// It could be carried, and is refused by name until it is.
    NotYet,
}

/// A machine without what a program needs: no difference, and no success.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}{why}", Self::PREFIX)]
pub struct Unavailable {
    /// What is missing.
    pub why: String,
}

impl Unavailable {
    /// What its message begins with.
    pub const PREFIX: &str = "not on this machine: ";

    /// The error of a setup that cannot be done here.
    pub fn because(why: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self { why: why.into() })
    }

    /// What an error says to be missing, if it is of this kind.
    pub fn of(error: &anyhow::Error) -> Option<&str> {
        error.downcast_ref::<Self>().map(|u| u.why.as_str())
    }
}

/// One conformance program.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// `AREA/NAME`.
    pub name: &'static str,
    /// What it holds and verifies.
    pub about: &'static str,
    /// Its setup.
    pub setup: Setup,
    /// What becomes of established connections.
    pub tcp: TcpPolicy,
    /// Runs in a cgroup of its own, which is what is dumped.
    pub in_cgroup: bool,
    /// What becomes of it. A program that is refused says with which words
    /// ([`Stage::expect_refusal`]).
    pub fate: Fate,
    /// Needs something of the host that nobody else may use meanwhile.
    pub alone: bool,
    /// Pages that processes have in common are written once.
    pub pages_once: bool,
    /// Huge pages it needs on the host.
    pub huge_pages: u64,
    /// MiB of swap it needs on the host.
    pub swap_mib: u64,
    /// What is changed in the images before the restore.
    pub forge: Option<Forge>,
    /// Its tree is never the same twice: only it itself can check.
    pub restless: bool,
    /// Where its first process lives.
    pub pid_ns: PidNs,
}

/// The PID namespace a program runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidNs {
    /// The runner's own.
    Ours,
    /// One of its own, as the first process.
    Init,
    /// One of its own, whose first process is not part of the tree.
    Member,
}

impl Case {
    /// A program that is carried in the plain way.
    pub const fn new(name: &'static str, about: &'static str, setup: Setup) -> Self {
        Self {
            name,
            about,
            setup,
            tcp: TcpPolicy::Refuse,
            in_cgroup: false,
            fate: Fate::Carried,
            alone: false,
            pages_once: false,
            huge_pages: 0,
            swap_mib: 0,
            forge: None,
            restless: false,
            pid_ns: PidNs::Ours,
        }
    }

    /// It is the first process of a PID namespace of its own.
    pub const fn as_init(mut self) -> Self {
        self.pid_ns = PidNs::Init;
        self
    }

    /// It lives in a PID namespace whose first process is not in the tree.
    pub const fn in_pid_ns(mut self) -> Self {
        self.pid_ns = PidNs::Member;
        self
    }

    /// Its connections are closed by the dump.
    pub const fn closing_tcp(mut self) -> Self {
        self.tcp = TcpPolicy::Close;
        self
    }

    /// Processes or threads of it come and go all the time.
    pub const fn restless(mut self) -> Self {
        self.restless = true;
        self
    }

    /// Its connections go on.
    pub const fn carrying_tcp(mut self) -> Self {
        self.tcp = TcpPolicy::Carry;
        self
    }

    /// It is dumped by cgroup.
    pub const fn in_cgroup(mut self) -> Self {
        self.in_cgroup = true;
        self
    }

    /// Nothing could carry it; the dump must be refused.
    pub const fn refused(mut self) -> Self {
        self.fate = Fate::Refused;
        self
    }

    /// It is not carried yet; until it is, the dump must be refused.
    pub const fn not_yet(mut self) -> Self {
        self.fate = Fate::NotYet;
        self
    }

    /// It is dumped with every page once.
    pub const fn with_pages_once(mut self) -> Self {
        self.pages_once = true;
        self
    }

    /// It needs so many huge pages, which are reserved for it.
    pub const fn with_huge_pages(mut self, count: u64) -> Self {
        self.huge_pages = count;
        self.alone()
    }

    /// It needs swap, which is made for it.
    pub const fn with_swap(mut self, mib: u64) -> Self {
        self.swap_mib = mib;
        self.alone()
    }

    /// It uses something of the whole host, so it runs while no other does.
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// The first part of its name.
    pub fn area(&self) -> &'static str {
        self.name.split('/').next().unwrap_or(self.name)
    }

    /// Its images are changed as if they came from elsewhere.
    pub const fn forged(mut self, forge: Forge) -> Self {
        self.forge = Some(forge);
        self
    }
}
