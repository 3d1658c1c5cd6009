//! What the worker asks of the engine.

use std::path::Path;

use rcr_engine::image::ImageSource;
use rcr_systemd::handover::UnitPlan;

/// Brings a service's processes back.
pub trait Restorer {
    /// Restores all processes of `plan` from `images`, whose names come without
    /// the unit's prefix, into `cgroup` and leaves them standing still.
    ///
    /// `output` is where descriptors that led to the old journal are to lead
    /// until systemd's side connects them anew.
    fn restore(
        &mut self,
        plan: &UnitPlan,
        images: &dyn ImageSource,
        cgroup: &Path,
        output: &Path,
    ) -> anyhow::Result<Box<dyn Standing>>;
}

/// Restored processes that do not run yet. Dropping it kills them.
pub trait Standing {
    /// Lets them run.
    fn resume(self: Box<Self>) -> anyhow::Result<()>;
}

/// INTERIM until the engine's restore has landed.
pub fn engine() -> impl Restorer {
    struct None_;
    impl Restorer for None_ {
        fn restore(
            &mut self,
            _: &UnitPlan,
            _: &dyn ImageSource,
            _: &Path,
            _: &Path,
        ) -> anyhow::Result<Box<dyn Standing>> {
            anyhow::bail!("this build has no engine")
        }
    }
    None_
}
