//! Faults on request, so that tests can walk every stage's failure.

use std::str::FromStr;

use anyhow::anyhow;

use crate::exit::{Exit, Failure};

/// Where to fail: each at the end of its stage, when that stage's work is there
/// to be undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailAt {
    /// With the region allocated.
    Prepare,
    /// With the kernel loaded.
    Load,
    /// With every service frozen.
    Freeze,
    /// With every image written.
    Dump,
    /// With the store sealed.
    Seal,
    /// With systemd's transition about to be queued.
    Jump,
    /// Not at all, but with one byte of the sealed store flipped.
    CorruptStore,
    /// In the new kernel's early boot (`early:STAGE`, see `EarlyConfig::fail_at`).
    Early(String),
}

impl FromStr for FailAt {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Ok(match word {
            "prepare" => FailAt::Prepare,
            "load" => FailAt::Load,
            "freeze" => FailAt::Freeze,
            "dump" => FailAt::Dump,
            "seal" => FailAt::Seal,
            "jump" => FailAt::Jump,
            "corrupt-store" => FailAt::CorruptStore,
            other => match other.strip_prefix("early:") {
                Some(stage) => FailAt::Early(stage.to_owned()),
                None => {
                    return Err(
                        "one of prepare, load, freeze, dump, seal, jump, corrupt-store, \
                                early:STAGE"
                            .into(),
                    );
                }
            },
        })
    }
}

/// Fails where `wanted` is the point that has been reached.
pub fn point(wanted: Option<&FailAt>, reached: &FailAt) -> Result<(), Failure> {
    if wanted == Some(reached) {
        let error = anyhow!("failed on request at the end of this stage ({reached:?})");
        return Err(Failure::new(Exit::RolledBack, error));
    }
    Ok(())
}
