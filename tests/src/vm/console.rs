//! The serial console's log file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// Reads a console log that QEMU is still writing.
pub struct Console {
    path: PathBuf,
    position: u64,
    partial: String,
}

impl Console {
    /// A reader that starts at the beginning.
    pub fn new(path: PathBuf) -> Console {
        Console {
            path,
            position: 0,
            partial: String::new(),
        }
    }

    /// The log file.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Everything so far; empty if there is no log yet.
    pub fn all(&self) -> String {
        std::fs::read(&self.path)
            .map(|bytes| clean(&String::from_utf8_lossy(&bytes)))
            .unwrap_or_default()
    }

    /// The last lines.
    pub fn tail(&self, lines: usize) -> String {
        let all = self.all();
        let lines_all: Vec<&str> = all.lines().collect();
        lines_all[lines_all.len().saturating_sub(lines)..].join("\n")
    }

    /// Leaves out what is there already.
    pub fn skip_to_end(&mut self) {
        self.position = std::fs::metadata(&self.path).map_or(0, |meta| meta.len());
        self.partial.clear();
    }

    /// Whole lines that came since the last call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn new_lines(&mut self) -> std::io::Result<Vec<String>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.position))?;
        let mut bytes = Vec::new();
        self.position += file.read_to_end(&mut bytes)? as u64;
        self.partial
            .push_str(&clean(&String::from_utf8_lossy(&bytes)));
        let Some(end) = self.partial.rfind('\n') else {
            return Ok(Vec::new());
        };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        Ok(whole.lines().map(str::to_owned).collect())
    }
}

/// Without carriage returns and terminal escapes.
fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\r' => {}
            '\u{1b}' => {
                if chars.next_if_eq(&'[').is_some() {
                    for c in chars.by_ref() {
                        if c.is_ascii_alphabetic() {
                            break;
                        }
                    }
                }
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_returns_are_dropped() {
        assert_eq!(
            clean("\u{1b}[0;32m  OK  \u{1b}[0m Started\r\n"),
            "  OK   Started\n"
        );
    }

    #[test]
    fn only_whole_lines_are_handed_out() {
        let path = std::env::temp_dir().join(format!("rcr-console-{}", std::process::id()));
        std::fs::write(&path, "one\ntw").unwrap();
        let mut console = Console::new(path.clone());
        assert_eq!(console.new_lines().unwrap(), ["one"]);
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(console.new_lines().unwrap(), ["two"]);
        std::fs::remove_file(path).unwrap();
    }
}
