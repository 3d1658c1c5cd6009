//! What the worker asks of the engine.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rcr_engine::content;
use rcr_engine::image::ImageSource;
use rcr_engine::restore::{RestoreOptions, Restored, WORTH_WAITING, restore};
use rcr_systemd::handover::{RUNTIME_TREE, UnitPlan};

/// Brings a service's processes back.
pub trait Restorer {
    /// Restores all processes of `plan` from `images`, whose names come without
    /// the unit's prefix, into its cgroup and leaves them standing still.
    ///
    /// `output` is where descriptors that led to the old journal are to lead
    /// until systemd's side connects them anew.
    fn restore(
        &mut self,
        plan: &UnitPlan,
        images: &dyn ImageSource,
        output: &Path,
    ) -> anyhow::Result<Box<dyn Standing>>;
}

/// Restored processes that do not run yet. Dropping it kills them.
pub trait Standing {
    /// Lets them run.
    fn resume(self: Box<Self>) -> anyhow::Result<()>;
}

/// The engine.
pub struct Engine {
    /// Where cgroup2 is mounted.
    pub cgroup_root: PathBuf,
    /// Let services run before all of their memory is filled.
    pub lazy: bool,
}

impl Restorer for Engine {
    fn restore(
        &mut self,
        plan: &UnitPlan,
        images: &dyn ImageSource,
        output: &Path,
    ) -> anyhow::Result<Box<dyn Standing>> {
        if !plan.runtime_paths.is_empty() {
            let root = File::open("/").context("/")?;
            content::restore_paths(root.as_fd(), images, RUNTIME_TREE)?;
        }
        let options = RestoreOptions {
            sibling: true,
            cgroup_mount: Some(self.cgroup_root.clone()),
            journal_interim: Some(output.to_path_buf()),
            without_network: true,
            lazy: self.lazy.then_some(WORTH_WAITING),
            ..RestoreOptions::default()
        };
        Ok(Box::new(Stopped(restore(images, &options)?)))
    }
}

struct Stopped(Restored);

impl Standing for Stopped {
    fn resume(self: Box<Self>) -> anyhow::Result<()> {
        Ok(self.0.resume()?)
    }
}
