//! The tag list `/etc/rcr/services.list`: which services cross an upgrade.
//!
//! One unit a line; `#` begins a comment, on a line of its own or after a name.
//! `redis` means `redis.service`. The order is kept, and editing keeps every
//! other line as it was written.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

/// Where the tag list lies.
pub const TAG_FILE: &str = "/etc/rcr/services.list";

/// Longest unit name (`UNIT_NAME_MAX` of systemd, its zero byte excluded).
const NAME_BYTES_MAX: usize = 255;

/// Suffixes of units that are not services (systemd.unit(5)).
const OTHER_SUFFIXES: [&str; 10] = [
    "socket",
    "device",
    "mount",
    "automount",
    "swap",
    "target",
    "path",
    "timer",
    "slice",
    "scope",
];

/// A service's full unit name: valid, ending in `.service`, no bare template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(transparent)]
pub struct ServiceName(String);

/// Why a word is no service name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing before the suffix.
    #[error("a unit name is missing")]
    Empty,
    /// A character that unit names do not have.
    #[error("`{name}` has the character {bad:?}, which no unit name has")]
    Character {
        /// The word.
        name: String,
        /// Its first bad character.
        bad: char,
    },
    /// Longer than systemd allows.
    #[error("the unit name has {bytes} bytes, {NAME_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length, suffix included.
        bytes: usize,
    },
    /// A unit of another type.
    #[error("`{name}` is a {suffix} unit; only services can be carried")]
    NotAService {
        /// The word.
        name: String,
        /// Its type.
        suffix: String,
    },
    /// A template without an instance.
    #[error("`{name}` is a template; name an instance (`{}`)", name.replace("@.", "@INSTANCE."))]
    Template {
        /// The full name.
        name: String,
    },
}

impl ServiceName {
    /// Reads a name as a person writes it; `.service` may be left out.
    pub fn parse(word: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || ":_.-\\@".contains(c);
        if let Some(bad) = word.chars().find(|c| !allowed(*c)) {
            return Err(NameError::Character {
                name: word.to_owned(),
                bad,
            });
        }
        let suffix = word.rsplit_once('.').map(|(_, suffix)| suffix);
        if let Some(suffix) = suffix.filter(|s| OTHER_SUFFIXES.contains(s)) {
            return Err(NameError::NotAService {
                name: word.into(),
                suffix: suffix.into(),
            });
        }
        let full = match suffix {
            Some("service") => word.to_owned(),
            _ => format!("{word}.service"),
        };
        let stem = full.strip_suffix(".service").unwrap_or(&full);
        if stem.is_empty() || stem.starts_with('@') {
            return Err(NameError::Empty);
        }
        if stem.ends_with('@') {
            return Err(NameError::Template { name: full });
        }
        if full.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong { bytes: full.len() });
        }
        Ok(ServiceName(full))
    }

    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a tag list could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TagError {
    /// A line does not name a service.
    #[error("line {line}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        source: NameError,
    },
    /// More than one name on a line.
    #[error("line {line}: one unit a line, found `{text}`")]
    Crowded {
        /// Its number, from 1.
        line: usize,
        /// The line's names.
        text: String,
    },
    /// The file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    text: String,
    unit: Option<ServiceName>,
}

/// A tag list with its comments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TagList {
    lines: Vec<Line>,
}

impl TagList {
    /// Reads the text of a list.
    pub fn parse(text: &str) -> Result<Self, TagError> {
        let mut lines = Vec::new();
        for (index, text) in text.lines().enumerate() {
            let names = text.split('#').next().unwrap_or_default().trim();
            let unit = match names {
                "" => None,
                names if names.contains(char::is_whitespace) => {
                    return Err(TagError::Crowded {
                        line: index + 1,
                        text: names.into(),
                    });
                }
                name => Some(ServiceName::parse(name).map_err(|source| TagError::Line {
                    line: index + 1,
                    source,
                })?),
            };
            lines.push(Line {
                text: text.to_owned(),
                unit,
            });
        }
        Ok(TagList { lines })
    }

    /// Reads a list from its file; a missing file is an empty list.
    pub fn load(path: &Path) -> Result<Self, TagError> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(TagError::Io {
                path: path.into(),
                source,
            }),
        }
    }

    /// Writes the list whole or not at all; a missing directory is made.
    pub fn save(&self, path: &Path) -> Result<(), TagError> {
        let write = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let temporary = path.with_extension("list.new");
            fs::write(&temporary, self.to_string())?;
            fs::File::open(&temporary)?.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|source| TagError::Io {
            path: path.into(),
            source,
        })
    }

    /// The tagged services in order, each once.
    pub fn units(&self) -> Vec<ServiceName> {
        let mut units = Vec::new();
        for unit in self.lines.iter().filter_map(|line| line.unit.as_ref()) {
            if !units.contains(unit) {
                units.push(unit.clone());
            }
        }
        units
    }

    /// Appends a service; `false` where it was tagged already.
    pub fn add(&mut self, unit: &ServiceName) -> bool {
        if self.units().contains(unit) {
            return false;
        }
        self.lines.push(Line {
            text: unit.0.clone(),
            unit: Some(unit.clone()),
        });
        true
    }

    /// Takes every line of a service away; `false` where there was none.
    pub fn remove(&mut self, unit: &ServiceName) -> bool {
        let before = self.lines.len();
        self.lines.retain(|line| line.unit.as_ref() != Some(unit));
        self.lines.len() != before
    }
}

impl fmt::Display for TagList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines
            .iter()
            .try_for_each(|line| writeln!(f, "{}", line.text))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(list: &TagList) -> Vec<String> {
        list.units().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn comments_and_order_survive_editing() {
        let text =
            "# the database\nredis-server   # 64 MiB\n\nnginx.service\nredis-server.service\n";
        let mut list = TagList::parse(text).unwrap();
        assert_eq!(names(&list), ["redis-server.service", "nginx.service"]);
        assert_eq!(list.to_string(), text);
        let foo = ServiceName::parse("foo").unwrap();
        assert!(list.add(&foo));
        assert!(!list.add(&foo));
        assert!(list.remove(&ServiceName::parse("redis-server").unwrap()));
        assert!(!list.remove(&ServiceName::parse("redis-server").unwrap()));
        assert_eq!(
            list.to_string(),
            "# the database\n\nnginx.service\nfoo.service\n"
        );
    }

    #[test]
    fn bad_names_are_told_with_their_line() {
        let message = |text: &str| {
            let error = TagList::parse(text).unwrap_err();
            let source = std::error::Error::source(&error);
            format!(
                "{error}{}",
                source.map(|s| format!(": {s}")).unwrap_or_default()
            )
        };
        assert_eq!(
            message("a\nb/c\n"),
            "line 2: `b/c` has the character '/', which no unit name has"
        );
        assert_eq!(message("a b"), "line 1: one unit a line, found `a b`");
        assert_eq!(
            message("x.socket"),
            "line 1: `x.socket` is a socket unit; only services can be carried"
        );
        assert_eq!(
            message("getty@"),
            "line 1: `getty@.service` is a template; name an instance (`getty@INSTANCE.service`)"
        );
        assert_eq!(message(".service"), "line 1: a unit name is missing");
        assert_eq!(
            message(&"x".repeat(300)),
            "line 1: the unit name has 308 bytes, 255 are allowed"
        );
    }

    #[test]
    fn names_are_completed() {
        for (word, full) in [
            ("foo", "foo.service"),
            ("foo.service", "foo.service"),
            ("postgresql@17-main", "postgresql@17-main.service"),
            ("a.b", "a.b.service"),
        ] {
            assert_eq!(ServiceName::parse(word).unwrap().as_str(), full);
        }
    }

    #[test]
    fn a_list_is_saved_and_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rcr/services.list");
        assert_eq!(TagList::load(&path).unwrap(), TagList::default());
        let list = TagList::parse("# x\nfoo\n").unwrap();
        list.save(&path).unwrap();
        assert_eq!(TagList::load(&path).unwrap(), list);
    }

    proptest! {
        #[test]
        fn any_text_reads_or_is_told(text in "\\PC{0,60}(\n\\PC{0,60}){0,5}") {
            if let Ok(list) = TagList::parse(&text) {
                prop_assert_eq!(&TagList::parse(&list.to_string()).unwrap(), &list);
            }
        }

        #[test]
        fn adding_and_removing_leaves_the_rest(
            words in proptest::collection::vec("[a-z]{1,8}(@[0-9]{1,3})?", 0..8),
            comments in proptest::collection::vec("# [ -~]{0,20}", 0..8),
            added in "[A-Z]{1,8}",
        ) {
            let mut text = String::new();
            for (i, word) in words.iter().enumerate() {
                if let Some(comment) = comments.get(i) {
                    text.push_str(comment);
                    text.push('\n');
                }
                text.push_str(word);
                text.push('\n');
            }
            let before = TagList::parse(&text).unwrap();
            let mut list = before.clone();
            let unit = ServiceName::parse(&added).unwrap();
            prop_assert!(list.add(&unit));
            let units = list.units();
            prop_assert_eq!(units.last(), Some(&unit));
            prop_assert!(list.remove(&unit));
            prop_assert_eq!(list, before);
        }

        #[test]
        fn a_name_reads_as_itself(word in "[a-zA-Z0-9:_.@-]{1,40}") {
            if let Ok(name) = ServiceName::parse(&word) {
                prop_assert_eq!(ServiceName::parse(name.as_str()).unwrap(), name);
            }
        }
    }
}
