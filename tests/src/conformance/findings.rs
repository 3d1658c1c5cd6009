//! What differs from what was expected.

use std::fmt::Debug;

/// Collects differences; none means all is well.
#[derive(Debug, Default, Clone)]
pub struct Findings(Vec<String>);

impl Findings {
    /// Notes a difference between two values that should be equal.
    pub fn same<T: PartialEq + Debug + ?Sized>(&mut self, what: &str, was: &T, is: &T) {
        if was != is {
            self.note(format!("{what}: was {was:?}, is {is:?}"));
        }
    }

    /// Notes `what` where a condition does not hold.
    pub fn that(&mut self, what: impl Into<String>, holds: bool) {
        if !holds {
            self.note(what);
        }
    }

    /// Notes something that is wrong.
    pub fn note(&mut self, what: impl Into<String>) {
        self.0.push(what.into());
    }

    /// Runs a check that may also end early; its error is a finding.
    pub fn run(&mut self, check: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        if let Err(e) = check(self) {
            self.note(format!("{e:#}"));
        }
    }

    /// Takes over what somebody else found.
    pub fn extend(&mut self, prefix: &str, lines: impl IntoIterator<Item = String>) {
        self.0
            .extend(lines.into_iter().map(|l| format!("{prefix}{l}")));
    }

    /// The differences, a line each.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// Nothing differs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
