//! Where this machine gets its Debian packages: read from apt's own
//! configuration, so that the guest is made from the same mirror.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// One repository line of apt's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Base address.
    pub uri: String,
    /// Suites taken from it.
    pub suites: Vec<String>,
    /// Key file, if the line names one.
    pub signed_by: Option<String>,
}

/// Every binary package source of this machine.
///
/// # Errors
/// When apt's configuration cannot be read.
pub fn sources() -> Result<Vec<Source>> {
    let apt = Path::new("/etc/apt");
    let mut files = vec![apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(apt.join("sources.list.d")) {
        for entry in entries {
            files.push(entry?.path());
        }
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let extension = file
            .extension()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let parse = match extension.as_str() {
            "list" => parse_lines,
            "sources" => parse_stanzas,
            _ => continue,
        };
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        sources.extend(parse(&text));
    }
    Ok(sources)
}

/// The source that has `suite`.
///
/// # Errors
/// When there is none.
pub fn with_suite<'a>(sources: &'a [Source], suite: &str) -> Result<&'a Source> {
    sources
        .iter()
        .find(|source| source.suites.iter().any(|have| have == suite))
        .with_context(|| format!("apt's sources on this machine do not have the suite {suite}"))
}

/// The one-line form: `deb [options] URI SUITE COMPONENT…`.
fn parse_lines(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(mut rest) = line.strip_prefix("deb ").map(str::trim_start) else {
            continue;
        };
        let mut signed_by = None;
        if let Some((options, after)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            signed_by = options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned);
            rest = after;
        }
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            sources.push(Source {
                uri: uri.to_owned(),
                suites: vec![suite.to_owned()],
                signed_by,
            });
        }
    }
    sources
}

/// The deb822 form: stanzas of `Field: value`, continued by indented lines.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn stanza(fields: &[(String, String)]) -> Vec<Source> {
    let field = |name: &str| {
        fields
            .iter()
            .find(|(have, _)| have == name)
            .map(|(_, v)| v.as_str())
    };
    let words = |name| {
        field(name)
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
    };
    if field("enabled") == Some("no") || !words("types").any(|word| word == "deb") {
        return Vec::new();
    }
    let suites: Vec<String> = words("suites").collect();
    // A key given in the file itself is not a path.
    let signed_by = field("signed-by")
        .filter(|key| key.starts_with('/'))
        .map(str::to_owned);
    words("uris")
        .map(|uri| Source {
            uri,
            suites: suites.clone(),
            signed_by: signed_by.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_form() {
        let text = "# a comment\n\
                    deb [arch=amd64 signed-by=/k.gpg] file:/srv/mirror/debian trixie main # x\n\
                    deb-src file:/srv/mirror/debian trixie main\n\
                    deb file:/srv/mirror/security trixie-security main\n";
        let sources = parse_lines(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].uri, "file:/srv/mirror/debian");
        assert_eq!(sources[0].suites, ["trixie"]);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(
            with_suite(&sources, "trixie-security").unwrap(),
            &sources[1]
        );
        assert!(with_suite(&sources, "sid").is_err());
    }

    #[test]
    fn deb822_form() {
        let text = "Types: deb deb-src\n# file:/elsewhere\nURIs: file:/srv/mirror/debian\n\
                    Suites: bookworm\n bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\n\
                    Types: deb\nEnabled: no\nURIs: file:/off\nSuites: x\n";
        let sources = parse_stanzas(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
    }
}
