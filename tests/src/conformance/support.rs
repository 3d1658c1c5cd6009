//! The support table: what the suite ran, one row a program.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Fate;
use super::report::{CaseResult, Report, Verdict};

const HEAD: &str = "# What is carried

One row a program of the conformance suite: it sets one kernel object up, and
after each mode it and `/proc` must show what they showed before. Written by
`cargo xtask support` from what the suite ran; `cargo xtask test` compares.

- **carried**: goes on as if nothing had been.
- **refused**: nothing could carry it. The dump says so before anything is
  touched, with process, object, reason and advice, and the tree runs on.
- **not yet**: could be carried; refused in the same way until it is.
- **not tried**: the machine that wrote this table lacks what the program needs.

Modes: *restore*: dumped, killed, restored. *leave-running*: dumped and left
alone. *again*: dumped and restored twice. *pre-dump*: memory written while it
runs, then what had changed since. *lazy*: restored so that it runs before its
memory is filled.
";

/// The table as it stands in the documents. It depends on nothing but verdicts:
/// no times, no process ids.
pub fn table(report: &Report) -> String {
    let mut text = HEAD.to_owned();
    let mut areas: Vec<(&str, Vec<&CaseResult>)> = Vec::new();
    for case in &report.cases {
        let area = case.name.split('/').next().unwrap_or(&case.name);
        match areas.iter_mut().find(|(a, _)| *a == area) {
            Some((_, cases)) => cases.push(case),
            None => areas.push((area, vec![case])),
        }
    }
    text += "\n| area | carried | refused | not yet | not tried |\n|---|---:|---:|---:|---:|\n";
    let all = [("**all**", report.cases.iter().collect::<Vec<_>>())];
    for (area, cases) in areas.iter().chain(&all) {
        let count = |word: &str| cases.iter().filter(|c| state(c) == word).count();
        let words = [CARRIED, REFUSED, NOT_YET, NOT_TRIED].map(count);
        let [carried, refused, not_yet, not_tried] = words;
        let _ = writeln!(
            text,
            "| {area} | {carried} | {refused} | {not_yet} | {not_tried} |"
        );
    }
    for (area, cases) in &areas {
        let _ = write!(
            text,
            "\n## {area}\n\n| program | | what it holds | modes |\n|---|---|---|---|\n"
        );
        for case in cases {
            let _ = writeln!(text, "{}", row(case));
        }
    }
    text
}

const CARRIED: &str = "carried";
const REFUSED: &str = "refused";
const NOT_YET: &str = "not yet";
const NOT_TRIED: &str = "not tried";
const FAILED: &str = "FAILED";

fn state(case: &CaseResult) -> &'static str {
    match (case.verdict(), case.fate) {
        (Verdict::Failed { .. }, _) => FAILED,
        (Verdict::Skipped { .. }, _) => NOT_TRIED,
        (Verdict::Passed, Fate::Carried) => CARRIED,
        (Verdict::Passed, Fate::Refused) => REFUSED,
        (Verdict::Passed, Fate::NotYet) => NOT_YET,
    }
}

fn row(case: &CaseResult) -> String {
    let passed = |m: &&super::report::ModeResult| m.verdict == Verdict::Passed;
    let modes: Vec<&str> = case
        .modes
        .iter()
        .filter(passed)
        .map(|m| m.mode.name())
        .collect();
    let mut about = case.about.clone();
    if let Verdict::Skipped { why } = case.verdict() {
        let _ = write!(about, " ({why})");
    }
    let about = about.replace('|', "\\|").replace('\n', " ");
    let state = state(case);
    let modes = modes.join(", ");
    format!("| `{}` | {state} | {about} | {modes} |", case.name)
}

/// Where a committed table says something else than the suite. What could not be
/// tried, here or where the table was written, is compared by name alone.
pub fn differences(committed: &str, report: &Report) -> Vec<String> {
    let rows = |text: &str| -> BTreeMap<String, String> {
        let row = |line: &str| {
            let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
            Some((name.to_owned(), rest.to_owned()))
        };
        text.lines().filter_map(row).collect()
    };
    let mut written = rows(committed);
    let mut out = Vec::new();
    for (name, now) in rows(&table(report)) {
        match written.remove(&name) {
            None => out.push(format!("{name} is not in the table")),
            Some(was) => {
                let untried = |row: &str| row.starts_with(NOT_TRIED);
                if was != now && !untried(&was) && !untried(&now) {
                    out.push(format!("{name}: the table says {was:?}, the suite {now:?}"));
                }
            }
        }
    }
    let gone = written.into_keys();
    out.extend(gone.map(|name| format!("{name} is in the table and not in the suite")));
    out
}

#[cfg(test)]
mod tests {
    use super::super::report::{Mode, ModeResult};
    use super::*;

    fn case(name: &str, fate: Fate, verdict: Verdict) -> CaseResult {
        CaseResult {
            name: name.into(),
            about: "a | b".into(),
            fate,
            modes: vec![ModeResult {
                mode: Mode::Restore,
                verdict,
                millis: 7,
            }],
        }
    }

    fn report(second: Verdict) -> Report {
        Report {
            cases: vec![
                case("a/one", Fate::Carried, Verdict::Passed),
                case("b/two", Fate::NotYet, second),
            ],
        }
    }

    #[test]
    fn rows_say_what_the_suite_said() {
        let text = table(&report(Verdict::Passed));
        assert!(text.contains("| `a/one` | carried | a \\| b | restore |"));
        assert!(text.contains("| `b/two` | not yet | a \\| b | restore |"));
        assert!(text.contains("| **all** | 1 | 0 | 1 | 0 |"));
        assert_eq!(differences(&text, &report(Verdict::Passed)), [""; 0]);
    }

    #[test]
    fn only_what_was_tried_is_compared() {
        let text = table(&report(Verdict::Passed));
        let why = "no such device".to_owned();
        let skipped = report(Verdict::Skipped { why });
        assert!(table(&skipped).contains("not tried | a \\| b (no such device) |"));
        assert_eq!(differences(&text, &skipped), [""; 0]);
        assert_eq!(
            differences(&table(&skipped), &report(Verdict::Passed)),
            [""; 0]
        );
        let findings = vec!["lost".to_owned()];
        assert_eq!(
            differences(&text, &report(Verdict::Failed { findings })).len(),
            1
        );
        assert_eq!(differences("", &report(Verdict::Passed)).len(), 2);
        let more = format!("{text}| `c/three` | carried | x | |\n");
        assert_eq!(differences(&more, &report(Verdict::Passed)).len(), 1);
    }
}
