//! `modules.dep` and `modules.builtin`, as depmod(8) writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

/// Why an index cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DepError {
    /// Not `FILE: FILE...`.
    #[error("line {line} is not 'FILE: FILE...'")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// A path that leads out of the modules' directory.
    #[error("line {line} names a file outside the modules' directory")]
    Outside {
        /// Counted from 1.
        line: usize,
    },
    /// A dependency without a line of its own.
    #[error("{module} depends on {file}, which is not listed")]
    Dangling {
        /// Whose dependency it is.
        module: String,
        /// The file that is not listed.
        file: String,
    },
    /// Modules that need each other.
    #[error("{module} depends on itself")]
    Cycle {
        /// One of them.
        module: String,
    },
}

/// `modules.dep`: module files and what each needs.
#[derive(Debug, Default)]
pub(crate) struct ModulesDep {
    modules: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: String,
    needs: Vec<String>,
}

impl ModulesDep {
    /// Reads the text of a `modules.dep`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, DepError> {
        let mut modules = BTreeMap::new();
        for (line, text) in (1..).zip(bytes.split(|b| *b == b'\n')) {
            let text = std::str::from_utf8(text)
                .map_err(|_| DepError::Line { line })?
                .trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let (file, needs) = text.split_once(':').ok_or(DepError::Line { line })?;
            let needs: Vec<String> = needs.split_ascii_whitespace().map(str::to_owned).collect();
            if !needs
                .iter()
                .map(String::as_str)
                .chain([file])
                .all(is_inside)
            {
                return Err(DepError::Outside { line });
            }
            modules.insert(
                module_name(file),
                Entry {
                    file: file.to_owned(),
                    needs,
                },
            );
        }
        Ok(ModulesDep { modules })
    }

    /// Whether there is a module of that name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// Names and files of `wanted` and of all they need, each behind its needs.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Result<Vec<(&str, &str)>, DepError> {
        let mut walk = Walk {
            dep: self,
            order: Vec::new(),
            states: BTreeMap::new(),
        };
        for name in wanted {
            if let Some((name, entry)) = self.modules.get_key_value(*name) {
                walk.visit(name, entry)?;
            }
        }
        Ok(walk.order)
    }
}

struct Walk<'d> {
    dep: &'d ModulesDep,
    order: Vec<(&'d str, &'d str)>,
    /// `true` once a module stands in `order`, `false` while its needs are walked.
    states: BTreeMap<&'d str, bool>,
}

impl<'d> Walk<'d> {
    /// Depth-first, with a stack of our own: an index may nest as deep as it
    /// likes.
    fn visit(&mut self, name: &'d str, entry: &'d Entry) -> Result<(), DepError> {
        let mut stack = vec![(name, entry, 0)];
        while let Some((name, entry, next)) = stack.pop() {
            if next == 0 {
                match self.states.get(name) {
                    Some(true) => continue,
                    Some(false) => {
                        return Err(DepError::Cycle {
                            module: name.to_owned(),
                        });
                    }
                    None => self.states.insert(name, false),
                };
            }
            let Some(file) = entry.needs.get(next) else {
                self.states.insert(name, true);
                self.order.push((name, &entry.file));
                continue;
            };
            let needed = module_name(file);
            let (needed, needed_entry) =
                self.dep
                    .modules
                    .get_key_value(&needed)
                    .ok_or_else(|| DepError::Dangling {
                        module: name.to_owned(),
                        file: file.clone(),
                    })?;
            stack.push((name, entry, next + 1));
            stack.push((needed, needed_entry, 0));
        }
        Ok(())
    }
}

/// Names of the modules built into the kernel, from the text of a
/// `modules.builtin`.
pub(crate) fn builtin_names(bytes: &[u8]) -> BTreeSet<String> {
    String::from_utf8_lossy(bytes)
        .lines()
        .map(|line| module_name(line.trim()))
        .collect()
}

/// The module's name of a file name: `kernel/a/snd-pcm.ko.xz` is `snd_pcm`.
fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    let stem = base.find(".ko").map_or(base, |at| &base[..at]);
    stem.replace('-', "_")
}

fn is_inside(file: &str) -> bool {
    !file.is_empty()
        && Path::new(file)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dep: &str, wanted: &[&str]) -> Result<Vec<String>, DepError> {
        let dep = ModulesDep::parse(dep.as_bytes())?;
        Ok(dep
            .load_order(wanted)?
            .into_iter()
            .map(|(name, _)| name.to_owned())
            .collect())
    }

    #[test]
    fn needs_come_first_and_once() {
        let dep = "k/c-c.ko: k/b.ko.xz k/a.ko\nk/b.ko.xz: k/a.ko\nk/a.ko:\n";
        assert_eq!(names(dep, &["c_c", "a", "b"]).unwrap(), ["a", "b", "c_c"]);
        assert_eq!(names(dep, &["b"]).unwrap(), ["a", "b"]);
    }

    #[test]
    fn broken_indexes_are_errors() {
        assert_eq!(names("a.ko\n", &[]), Err(DepError::Line { line: 1 }));
        assert_eq!(
            names("\n../a.ko:\n", &[]),
            Err(DepError::Outside { line: 2 })
        );
        assert_eq!(
            names("a.ko: /etc/x\n", &[]),
            Err(DepError::Outside { line: 1 })
        );
        assert!(matches!(
            names("a.ko: b.ko\n", &["a"]),
            Err(DepError::Dangling { .. })
        ));
        assert!(matches!(
            names("a.ko: b.ko\nb.ko: a.ko\n", &["a"]),
            Err(DepError::Cycle { .. })
        ));
    }

    #[test]
    fn builtin_modules_are_known_by_name() {
        let names = builtin_names(b"kernel/fs/ext4/ext4.ko\nkernel/a/x-y.ko\n");
        assert!(names.contains("ext4") && names.contains("x_y"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_an_answer(text: Vec<u8>) {
            let _ = ModulesDep::parse(&text);
            let _ = builtin_names(&text);
        }

        #[test]
        fn an_order_never_loads_before_needs(edges in proptest::collection::vec((0u8..12, 0u8..12), 0..40)) {
            // Edges from higher to lower numbers alone: no cycles.
            let mut text = String::new();
            for module in 0..12 {
                text += &format!("k/m{module}.ko:");
                for (from, to) in &edges {
                    if *from == module && to < from {
                        text += &format!(" k/m{to}.ko");
                    }
                }
                text += "\n";
            }
            let order = names(&text, &["m11", "m5"]).unwrap();
            let at = |m: u8| order.iter().position(|n| *n == format!("m{m}"));
            for (from, to) in edges {
                if let (true, Some(from)) = (to < from, at(from)) {
                    proptest::prop_assert!(at(to).unwrap() < from);
                }
            }
        }
    }
}
