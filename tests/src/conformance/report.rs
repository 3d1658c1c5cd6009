//! What came out of a run.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Case, Fate};

/// What a program goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Dumped, killed, restored.
    Restore,
    /// Dumped and left running.
    LeaveRunning,
    /// Dumped, killed and restored several times.
    Again,
    /// Pre-dumped twice while it runs, dumped, killed, restored.
    PreDump,
    /// Dumped, killed, and restored so that it runs before its memory is filled.
    Lazy,
    /// A dump is refused and the tree runs on.
    Refused,
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Restore => "restore",
            Mode::LeaveRunning => "leave-running",
            Mode::Again => "again",
            Mode::PreDump => "pre-dump",
            Mode::Lazy => "lazy",
            Mode::Refused => "refused",
        }
    }

    /// The modes of a program.
    pub fn of(case: &Case) -> &'static [Mode] {
        match case.fate {
            Fate::Carried => &[
                Mode::Restore,
                Mode::LeaveRunning,
                Mode::Again,
                Mode::PreDump,
                Mode::Lazy,
            ],
            Fate::Refused | Fate::NotYet => &[Mode::Refused],
        }
    }
}

/// Differences of one program that are printed.
const SHOWN_MAX: usize = 20;

/// How a program, or one of its modes, ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// As it should.
    Passed,
    /// With differences.
    Failed {
        /// One line each.
        findings: Vec<String>,
    },
    /// This machine lacks what it takes.
    Skipped {
        /// What is missing.
        why: String,
    },
}

/// One mode of one program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModeResult {
    /// Which.
    pub mode: Mode,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it took.
    pub millis: u64,
}

/// One program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CaseResult {
    /// `AREA/NAME`.
    pub name: String,
    /// What it holds.
    pub about: String,
    /// What is to become of it.
    pub fate: Fate,
    /// Its modes, in order.
    pub modes: Vec<ModeResult>,
}

impl CaseResult {
    /// A program that nothing was heard of.
    pub fn lost(case: &Case, why: String) -> Self {
        let findings = vec![why];
        Self::new(
            case,
            vec![ModeResult {
                mode: Mode::of(case)[0],
                verdict: Verdict::Failed { findings },
                millis: 0,
            }],
        )
    }

    /// The result of a case.
    pub fn new(case: &Case, modes: Vec<ModeResult>) -> Self {
        Self {
            name: case.name.to_owned(),
            about: case.about.to_owned(),
            fate: case.fate,
            modes,
        }
    }

    /// All modes in one: what differs, else what is missing.
    pub fn verdict(&self) -> Verdict {
        let mut findings = Vec::new();
        let mut missing = None;
        for m in &self.modes {
            match &m.verdict {
                Verdict::Passed => {}
                Verdict::Failed { findings: found } => {
                    findings.extend(found.iter().map(|l| format!("{}: {l}", m.mode.name())));
                }
                Verdict::Skipped { why } => missing = Some(why.clone()),
            }
        }
        match missing {
            _ if !findings.is_empty() => Verdict::Failed { findings },
            Some(why) => Verdict::Skipped { why },
            None => Verdict::Passed,
        }
    }
}

impl fmt::Display for CaseResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.verdict();
        let word = match verdict {
            Verdict::Passed => "ok",
            Verdict::Failed { .. } => "FAILED",
            Verdict::Skipped { .. } => "skipped",
        };
        write!(f, "{:<36} {word:<7}", self.name)?;
        match verdict {
            Verdict::Skipped { why } => write!(f, "  {why}"),
            Verdict::Passed => times(&self.modes, f),
            Verdict::Failed { findings } => {
                times(&self.modes, f)?;
                let shown = findings.iter().take(SHOWN_MAX);
                shown.into_iter().try_for_each(|l| write!(f, "\n    {l}"))?;
                match findings.len().saturating_sub(SHOWN_MAX) {
                    0 => Ok(()),
                    more => write!(f, "\n    and {more} more"),
                }
            }
        }
    }
}

fn times(modes: &[ModeResult], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    modes.iter().try_for_each(|m| {
        let seconds = m.millis as f64 / 1000.0;
        write!(f, "  {} {seconds:.2} s", m.mode.name())
    })
}

/// Numbers of one area, or of all.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Passed.
    pub passed: usize,
    /// Of those, the ones that were refused as they should be.
    pub refused: usize,
    /// Failed.
    pub failed: usize,
    /// Not on this machine.
    pub skipped: usize,
}

impl Count {
    fn add(&mut self, result: &CaseResult) {
        match result.verdict() {
            Verdict::Passed => {
                self.passed += 1;
                self.refused += usize::from(result.fate != Fate::Carried);
            }
            Verdict::Failed { .. } => self.failed += 1,
            Verdict::Skipped { .. } => self.skipped += 1,
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed ({} refused by name), {} failed, {} skipped here",
            self.passed, self.refused, self.failed, self.skipped
        )
    }
}

/// What a whole run came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// The programs, in the suite's order.
    pub cases: Vec<CaseResult>,
}

impl Report {
    /// Numbers of all.
    pub fn total(&self) -> Count {
        let mut count = Count::default();
        self.cases.iter().for_each(|c| count.add(c));
        count
    }

    /// Numbers by area.
    pub fn by_area(&self) -> BTreeMap<&str, Count> {
        let mut areas: BTreeMap<&str, Count> = BTreeMap::new();
        for case in &self.cases {
            let area = case.name.split('/').next().unwrap_or(&case.name);
            areas.entry(area).or_default().add(case);
        }
        areas
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(verdicts: Vec<Verdict>) -> CaseResult {
        let of = |verdict| ModeResult {
            mode: Mode::Restore,
            verdict,
            millis: 1,
        };
        CaseResult {
            name: "area/name".into(),
            about: String::new(),
            fate: Fate::Carried,
            modes: verdicts.into_iter().map(of).collect(),
        }
    }

    #[test]
    fn a_difference_outweighs_a_skip() {
        let why = "no such kernel".to_owned();
        let skipped = Verdict::Skipped { why };
        let findings = vec!["lost".to_owned()];
        let failed = Verdict::Failed { findings };
        assert_eq!(result(vec![Verdict::Passed]).verdict(), Verdict::Passed);
        let half = result(vec![Verdict::Passed, skipped.clone()]);
        assert_eq!(half.verdict(), skipped);
        let both = result(vec![skipped, failed]);
        assert!(matches!(both.verdict(), Verdict::Failed { .. }));
    }
}
