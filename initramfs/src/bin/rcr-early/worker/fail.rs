//! Failures on demand, so that tests can see what becomes of a boot in each.

use anyhow::bail;

/// A place where the worker fails on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum FailAt {
    /// Nowhere.
    #[default]
    Nowhere,
    /// At the beginning of the stage of that name.
    Stage(String),
    /// While that unit is restored.
    Restore(String),
    /// The worker stands still once the first unit is restored.
    Hang,
    /// The worker dies once the first unit is restored.
    Crash,
}

impl FailAt {
    /// Reads `STAGE`, `restore:UNIT`, `hang` or `crash`.
    pub fn parse(word: Option<&str>) -> Self {
        match word {
            None | Some("") => FailAt::Nowhere,
            Some("hang") => FailAt::Hang,
            Some("crash") => FailAt::Crash,
            Some(word) => match word.split_once(':') {
                Some(("restore", unit)) => FailAt::Restore(unit.to_owned()),
                _ => FailAt::Stage(word.to_owned()),
            },
        }
    }

    /// Fails if `stage` is the one.
    pub fn stage(&self, stage: &str) -> anyhow::Result<()> {
        match self {
            FailAt::Stage(name) if name == stage => bail!("a test asked for this failure"),
            _ => Ok(()),
        }
    }

    /// Fails if `unit` is the one.
    pub fn unit(&self, unit: &str) -> anyhow::Result<()> {
        match self {
            FailAt::Restore(name) if name == unit => bail!("a test asked for this failure"),
            _ => Ok(()),
        }
    }

    /// Hangs or dies if that was asked for.
    pub fn restored(&self) {
        match self {
            FailAt::Hang => loop {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            },
            FailAt::Crash => std::process::abort(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named() {
        assert_eq!(FailAt::parse(None), FailAt::Nowhere);
        assert_eq!(FailAt::parse(Some("crash")), FailAt::Crash);
        assert!(FailAt::parse(Some("verify")).stage("verify").is_err());
        assert!(FailAt::parse(Some("verify")).stage("find").is_ok());
        assert!(
            FailAt::parse(Some("restore:a.service"))
                .unit("a.service")
                .is_err()
        );
        assert!(
            FailAt::parse(Some("restore:a.service"))
                .unit("b.service")
                .is_ok()
        );
    }
}
