//! Stage 5: everything else has stopped.
//!
//! Success: the services alone still run, and what they have written is on
//! disk. From here on there is no way back to the old system, only a cold start
//! in the new one: dropping the value leaves the kernel loaded. Failure: the
//! transition was taken back and all is as before.

use anyhow::Result;
use rcr_pmem_store::region::HugeRegion;
use rcr_pmem_store::{Nonce, Writer};
use rcr_systemd::handover::LostUnit;
use rcr_systemd::systemctl;

use super::ahead::Ahead;
use super::fault::{self, FailAt};
use super::gate::Visitor;
use super::loaded::Loaded;
use crate::exit::{Failure, OrExit};
use crate::progress::{Progress, tell_kernel};
use crate::service::Service;

/// Services on an otherwise empty system.
#[derive(Debug)]
pub struct Alone {
    pub(super) services: Vec<Service>,
    pub(super) lost: Vec<LostUnit>,
    pub(super) store: Writer<HugeRegion>,
    pub(super) ahead: Ahead,
    pub(super) release: String,
    pub(super) nonce: Nonce,
}

/// A loaded kernel whose transition is under way.
#[derive(Debug)]
pub struct Leaving {
    // Tracks processes until the store is gone.
    ahead: Ahead,
    loaded: Loaded,
}

/// How systemd's transition comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// We ask for it.
    Ours,
    /// It had begun by itself, and would stop the services: it is begun anew.
    Again,
}

impl Leaving {
    /// Has systemd stop everything but the services.
    pub fn begin(
        loaded: Loaded,
        ahead: Ahead,
        transition: Transition,
        fail_at: Option<&FailAt>,
    ) -> Result<Self, Failure> {
        fault::point(fail_at, &FailAt::Jump)?;
        if transition == Transition::Again {
            systemctl::cancel_all().or_rolled_back()?;
        }
        systemctl::enqueue_kexec().or_rolled_back()?;
        Ok(Leaving { ahead, loaded })
    }

    /// Copies the services' memory once while everything else stops.
    pub fn copy_ahead(&mut self, progress: &mut Progress) {
        let Loaded {
            services, store, ..
        } = &mut self.loaded;
        self.ahead.start(services, store, progress);
    }

    /// Waits until it has. The visitor waits at the gate for our word.
    pub fn wait(self) -> Result<(Alone, Visitor)> {
        let Leaving { ahead, loaded } = self;
        let visitor = loaded.gate.wait()?;
        let Loaded {
            services,
            release,
            mut shield,
            mut gate,
            mut image,
            mut store,
            nonce,
        } = loaded;
        shield.keep();
        gate.keep();
        image.keep();
        store.region_mut().keep();
        let alone = Alone {
            services,
            lost: Vec::new(),
            store,
            ahead,
            release,
            nonce,
        };
        Ok((alone, visitor))
    }
}

impl Alone {
    /// Puts on disk what was written until now, and looks at the services anew:
    /// one that has ended meanwhile is left to the new kernel.
    pub fn settle(&mut self) {
        nix::unistd::sync();
        let mut there = Vec::new();
        for mut service in std::mem::take(&mut self.services) {
            match service.look_again() {
                Ok(()) => there.push(service),
                Err(e) => self.lost.push(lost(&service, &e)),
            }
        }
        self.services = there;
    }

    /// Copies once more what memory was written to since the last time.
    pub fn catch_up(&mut self, progress: &mut Progress) {
        self.ahead
            .catch_up(&self.services, &mut self.store, progress);
    }
}

/// A service that does not cross for this reason.
pub(super) fn lost(service: &Service, error: &anyhow::Error) -> LostUnit {
    tell_kernel(&format!("{}: {error:#}", service.unit.id));
    LostUnit {
        unit: service.unit.id.clone(),
        main_pid: service.unit.main_pid,
        reason: format!("{error:#}"),
    }
}
