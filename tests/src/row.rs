//! What a benchmark says.

use serde::Serialize;

/// One measured comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was done, such as `dump flat-100`.
    pub name: String,
    /// Our median.
    pub ours: f64,
    /// The peer's median; absent where there is no peer or it cannot do it.
    pub peer: Option<f64>,
    /// Unit of both.
    pub unit: &'static str,
    /// How often ours fits into the peer's.
    pub ratio: Option<f64>,
    /// The least ratio that is good enough.
    pub bar: f64,
    /// Whether it was reached. Where the peer fails, ours working is enough.
    pub met: bool,
    /// What else is worth knowing.
    pub note: String,
}

impl Row {
    /// A comparison of samples, each list of one side; the smaller is better.
    pub fn compare(
        name: impl Into<String>,
        unit: &'static str,
        ours: &[f64],
        peer: &[f64],
        bar: f64,
    ) -> Self {
        let peer = median(peer);
        let ours = median(ours).unwrap_or(f64::NAN);
        let ratio = peer.map(|p| p / ours);
        Self {
            name: name.into(),
            ours,
            peer,
            unit,
            ratio,
            bar,
            met: ratio.map_or(ours.is_finite(), |r| r >= bar),
            note: String::new(),
        }
    }

    /// With a remark.
    #[must_use]
    pub fn noting(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// The row of a table.
    pub fn line(&self) -> String {
        let number = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.1}"));
        let ratio = self.ratio.map_or("-".into(), |r| format!("{r:.2}"));
        format!(
            "{:<34} {:>10} {:>10} {:<4} {:>7} {:>5} {:<4} {}",
            self.name,
            number(Some(self.ours)),
            number(self.peer),
            self.unit,
            ratio,
            self.bar,
            if self.met { "yes" } else { "NO" },
            self.note
        )
    }

    /// The head of that table.
    pub fn head() -> String {
        format!(
            "{:<34} {:>10} {:>10} {:<4} {:>7} {:>5} {:<4} note",
            "row", "ours", "peer", "unit", "ratio", "bar", "met"
        )
    }
}

/// The middle of the samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_bar_is_met_or_not() {
        let row = Row::compare("x", "ms", &[2.0, 2.0, 9.0], &[5.0], 2.0);
        assert_eq!((row.ratio, row.met), (Some(2.5), true));
        assert!(!Row::compare("x", "ms", &[3.0], &[5.0], 2.0).met);
        // A peer that cannot do it at all.
        assert!(Row::compare("x", "ms", &[3.0], &[], 1.0).met);
        assert!(!Row::compare("x", "ms", &[], &[], 1.0).met);
    }
}
