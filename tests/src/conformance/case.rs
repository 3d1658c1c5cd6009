//! A program and how it is to be run.

use rcr_engine::file::TcpPolicy;

use super::forge::Forge;
use super::{Findings, Stage};

/// Looks whether everything still is as the setup made it. Called once after
/// each cycle; may change its state for the next one.
pub type Check = Box<dyn FnMut(&mut Findings) -> anyhow::Result<()>>;

/// Builds the state and gives the check that knows it.
pub type Setup = fn(&Stage) -> anyhow::Result<Check>;

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
    /// The dump must be refused; the program says with which words
    /// ([`Stage::expect_refusal`]).
    pub refused: bool,
    /// What is changed in the images before the restore.
    pub forge: Option<Forge>,
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
            refused: false,
            forge: None,
        }
    }

    /// Its connections are closed by the dump.
    pub const fn closing_tcp(mut self) -> Self {
        self.tcp = TcpPolicy::Close;
        self
    }

    /// It is dumped by cgroup.
    pub const fn in_cgroup(mut self) -> Self {
        self.in_cgroup = true;
        self
    }

    /// It cannot be dumped.
    pub const fn refused(mut self) -> Self {
        self.refused = true;
        self
    }

    /// Its images are changed as if they came from elsewhere.
    pub const fn forged(mut self, forge: Forge) -> Self {
        self.forge = Some(forge);
        self
    }
}
