//! How the programs end.

use std::fmt;
use std::process::ExitCode;

use rcr_engine::Refusal;

/// Exit codes, the same for `rcr` and `rcr-upgrade`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Something that should not happen did.
    Internal = 1,
    /// The command line was not understood (clap's own code).
    Usage = 2,
    /// Something cannot be carried; nothing was touched.
    Refused = 3,
    /// The machine or what was named does not allow it; nothing was touched.
    Environment = 4,
    /// It failed before the transition; everything is as it was.
    RolledBack = 5,
}

/// The codes for `--help`.
pub const EXIT_HELP: &str = "\
Exit status:
  0  done (rcr-upgrade: the jump is under way)
  1  an error of the program itself
  2  the command line was not understood
  3  a service cannot be carried; nothing was touched
  4  bad input or environment (kernel, initrd, tags, privileges, memory); nothing was touched
  5  failed before the transition; everything was put back as it was";

/// A failure and how the program ends by it.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What went wrong, with its causes.
    pub error: anyhow::Error,
    /// What stands in the way, for [`Exit::Refused`].
    pub refusals: Vec<Refused>,
}

/// A refusal and the unit that it concerns.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Refused {
    /// The unit; empty for a tree that is none.
    pub unit: String,
    /// What stands in the way.
    #[serde(flatten)]
    pub refusal: Refusal,
}

impl Failure {
    /// A failure for this reason.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Failure {
            exit,
            error: error.into(),
            refusals: Vec::new(),
        }
    }

    /// Something cannot be carried.
    pub fn refused(refusals: Vec<Refused>) -> Self {
        let error = match refusals.len() {
            1 => anyhow::anyhow!("1 thing cannot be carried; nothing was touched"),
            n => anyhow::anyhow!("{n} things cannot be carried; nothing was touched"),
        };
        Failure {
            exit: Exit::Refused,
            error,
            refusals,
        }
    }

    /// As a process ends.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for refused in &self.refusals {
            if !refused.unit.is_empty() {
                write!(f, "{}: ", refused.unit)?;
            }
            writeln!(f, "{}", refused.refusal)?;
        }
        write!(f, "{:#}", self.error)
    }
}

/// Says by which exit code an error ends the program.
pub trait OrExit<T> {
    /// Ends by `exit`.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;

    /// Ends by [`Exit::Environment`].
    fn or_environment(self) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_exit(Exit::Environment)
    }

    /// Ends by [`Exit::RolledBack`].
    fn or_rolled_back(self) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_exit(Exit::RolledBack)
    }
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|e| Failure::new(exit, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_told() {
        let refusal = Refusal {
            pid: 812,
            comm: "nginx".into(),
            object: "fd 7 (io_uring)".into(),
            reason: "requests are in flight".into(),
            advice: "untag the unit".into(),
        };
        let refused = |unit: &str| Refused {
            unit: unit.into(),
            refusal: refusal.clone(),
        };
        let failure = Failure::refused(vec![refused("nginx.service"), refused("")]);
        assert_eq!(
            failure.to_string(),
            "nginx.service: nginx (pid 812): fd 7 (io_uring): requests are in flight; untag the unit\n\
             nginx (pid 812): fd 7 (io_uring): requests are in flight; untag the unit\n\
             2 things cannot be carried; nothing was touched"
        );
        let json = serde_json::to_value(&failure.refusals[0]).unwrap();
        assert_eq!(json["unit"], "nginx.service");
        assert_eq!(json["pid"], 812);
    }
}
