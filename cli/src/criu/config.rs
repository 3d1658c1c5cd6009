//! Configuration files: one option a line without its dashes, criu(8).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::Error;
use super::options::{Command, Options};

/// The options of all configuration files and then those of the command line.
pub fn with_defaults(arguments: &[OsString]) -> Result<Options, Error> {
    // Which files count is said on the command line itself.
    let mut asked = Options::default();
    asked.parse(arguments)?;
    let mut options = Options::default();
    if asked.default_config && !matches!(asked.command, Command::Version | Command::Help) {
        for path in default_files() {
            if path.exists() {
                apply(&path, &mut options)?;
            }
        }
    }
    if let Some(path) = std::env::var_os("CRIU_CONFIG_FILE").filter(|p| !p.is_empty()) {
        apply(Path::new(&path), &mut options)?;
    }
    if let Some(path) = &asked.config {
        apply(path, &mut options)?;
    }
    options.parse(arguments)?;
    Ok(options)
}

fn default_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/criu/default.conf")];
    if let Some(home) = std::env::var_os("HOME") {
        files.push(Path::new(&home).join(".criu/default.conf"));
    }
    files
}

/// Takes the options of one file in.
pub fn apply(path: &Path, options: &mut Options) -> Result<(), Error> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| shown.clone())?;
    let arguments = arguments(&text).with_context(|| shown.clone())?;
    let command = options.command.clone();
    options.parse(&arguments).context(shown)?;
    options.command = command;
    Ok(())
}

/// A file's lines as arguments.
fn arguments(text: &str) -> Result<Vec<OsString>, Error> {
    let mut out = Vec::new();
    for line in text.lines() {
        let words = words(line)?;
        match &words[..] {
            [] => {}
            [name] => out.push(format!("--{name}").into()),
            [name, value] => out.push(format!("--{name}={value}").into()),
            _ => bail!("more than one value: {line:?}"),
        }
    }
    Ok(out)
}

/// Words apart by blanks, or in double quotes; `#` begins a comment.
fn words(line: &str) -> Result<Vec<String>, Error> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut word = String::new();
            let mut chars = quoted.char_indices();
            let end = loop {
                match chars.next() {
                    Some((_, '\\')) if chars.as_str().starts_with('"') => {
                        word.push('"');
                        chars.next();
                    }
                    Some((at, '"')) => break at,
                    Some((_, c)) => word.push(c),
                    None => bail!("a quote is not closed: {line:?}"),
                }
            };
            words.push(word);
            rest = quoted[end + 1..].trim_start();
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || c == '#')
                .unwrap_or(rest.len());
            words.push(rest[..end].to_owned());
            rest = rest[end..].trim_start();
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_its_manual_says() {
        let text = "tcp-established\nwork-dir \"/home/me/my \\\"work\\\" dir\"\n\
                    #comment\nno-restore-sibling   # another\n\nghost-limit 1M\n";
        let mut options = Options {
            sibling: true,
            ..Options::default()
        };
        options.parse(&arguments(text).unwrap()).unwrap();
        assert!(options.tcp_established && !options.sibling);
        assert_eq!(options.ghost_limit, Some(1 << 20));
        let dir = options.work_dir.unwrap();
        assert_eq!(dir.to_str(), Some("/home/me/my \"work\" dir"));
        assert!(arguments("work-dir \"x").is_err());
        assert!(arguments("work-dir a b").is_err());
    }
}
