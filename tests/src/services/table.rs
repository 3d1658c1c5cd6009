//! What the runs showed: a row a service, kept as JSON and shown as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::catalog::SERVICES;

/// One service's row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Whether it was carried with all its connections.
    pub carried: bool,
    /// The package's version.
    pub version: String,
    /// What its clients held.
    pub held: Vec<String>,
    /// Upgrades with these connections.
    pub upgrades: u32,
    /// Connections that ended.
    pub resets: u64,
    /// Answers that were not right.
    pub wrong: u64,
    /// Bytes of answers that were right.
    pub bytes: u64,
    /// The longest wait for an answer, in seconds.
    pub longest_s: f64,
    /// Settings without which it would be refused.
    pub needs: Vec<String>,
    /// Why it was not carried.
    pub reason: Option<String>,
}

/// Rows by service.
pub type Rows = BTreeMap<String, Row>;

/// The rows of earlier runs; none where there is no file.
///
/// # Errors
/// When the file is not one of ours.
pub fn read(path: &Path) -> Result<Rows> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| path.display().to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Rows::new()),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// Writes rows for programs and for people.
///
/// # Errors
/// When a file cannot be written.
pub fn write(rows: &Rows, json: &Path, table: &Path) -> Result<()> {
    let mut text = serde_json::to_string_pretty(rows)?;
    text.push('\n');
    fs::write(json, text).with_context(|| json.display().to_string())?;
    fs::write(table, markdown(rows)).with_context(|| table.display().to_string())
}

const HEAD: &str = "\
# Services

Debian's packages in a virtual machine, each with clients outside that opened
their connections before the first upgrade and held them through all. Written by
`cargo xtask services` from what its runs showed (`services.json` has the same
for programs); a service that was not run is not here.

- **yes**: carried in every upgrade: same processes, `NRestarts=0`, no connection
  ended, every byte of every answer as it should be.
- **no**: not carried, or something of this was not so; the reason is below.

Upgrades alternate between Debian's stable kernel and that of backports. The
machine is emulated, so *silence*, the longest wait for an answer, is many times
what hardware shows.

| service | | what was held | upgrades | resets | wrong answers | bytes checked | silence |
|---|---|---|---:|---:|---:|---:|---:|
";

fn markdown(rows: &Rows) -> String {
    let mut text = HEAD.to_owned();
    let (mut needs, mut reasons) = (String::new(), String::new());
    for (name, row) in in_order(rows) {
        let carried = if row.carried { "yes" } else { "no" };
        let _ = writeln!(
            text,
            "| {name} {} | {carried} | {} | {} | {} | {} | {} | {:.0} s |",
            row.version,
            row.held.join("; "),
            row.upgrades,
            row.resets,
            row.wrong,
            row.bytes,
            row.longest_s
        );
        if !row.needs.is_empty() {
            let _ = writeln!(needs, "- **{name}**: {}", row.needs.join("; "));
        }
        if let Some(reason) = &row.reason {
            let reason = reason.replace('\n', "\n  ");
            let _ = writeln!(reasons, "- **{name}**: {reason}");
        }
    }
    if !needs.is_empty() {
        let _ = write!(text, "\n## Settings without which it is refused\n\n{needs}");
    }
    if !reasons.is_empty() {
        let _ = write!(text, "\n## Why not\n\n{reasons}");
    }
    text
}

/// Rows in the catalog's order.
fn in_order(rows: &Rows) -> impl Iterator<Item = (&str, &Row)> {
    SERVICES
        .iter()
        .filter_map(|service| Some((service.name, rows.get(service.name)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_no_has_its_reason() {
        let row = Row {
            carried: false,
            version: "1.6".into(),
            held: vec!["values".into()],
            upgrades: 0,
            resets: 0,
            wrong: 0,
            bytes: 10,
            longest_s: 0.4,
            needs: vec!["`a=b`".into()],
            reason: Some("fd 7: io_uring".into()),
        };
        let rows = Rows::from([("memcached".to_owned(), row)]);
        let text = markdown(&rows);
        assert!(
            text.contains("| memcached 1.6 | no | values | 0 |"),
            "{text}"
        );
        assert!(
            text.ends_with("- **memcached**: fd 7: io_uring\n"),
            "{text}"
        );
    }
}
