//! `--join-ns KIND:FILE` or `KIND:PID`: namespaces in which a tree comes back
//! that had none of its own.

use std::fs::File;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};
use rcr_engine::image::ImageSource;
use rcr_engine::namespace::NsKind;
use rcr_engine::restore::own_namespaces;

use super::Error;
use super::options::Options;

/// What can be joined: a restoring program that is in one, and its children.
const KINDS: [(&str, NsKind, CloneFlags); 3] = [
    ("net", NsKind::Net, CloneFlags::CLONE_NEWNET),
    ("ipc", NsKind::Ipc, CloneFlags::CLONE_NEWIPC),
    ("uts", NsKind::Uts, CloneFlags::CLONE_NEWUTS),
];

/// Kind and file of an option's value.
fn split(text: &str) -> Option<(usize, String)> {
    let (kind, place) = text.split_once(':')?;
    let index = KINDS.iter().position(|(name, ..)| *name == kind)?;
    let path = match place.parse::<u32>() {
        Ok(pid) => format!("/proc/{pid}/ns/{kind}"),
        Err(_) if place.is_empty() || place.contains(',') => return None,
        Err(_) => place.to_owned(),
    };
    Some((index, path))
}

/// Whether such a value is understood.
pub fn understands(text: &str) -> bool {
    split(text).is_some()
}

/// The namespaces that we came from; back in them when dropped.
#[derive(Debug, Default)]
pub struct Joined(Vec<(CloneFlags, File)>);

/// Enters the namespaces of the options.
pub fn enter(options: &Options, source: &dyn ImageSource) -> Result<Joined, Error> {
    let mut joined = Joined::default();
    let values: Vec<String> = options.values("join-ns").collect();
    if values.is_empty() {
        return Ok(joined);
    }
    let own = own_namespaces(source)?;
    for text in values {
        let told = || format!("option --join-ns {text}");
        let (index, path) = split(&text).with_context(told)?;
        let (name, kind, flag) = KINDS[index];
        if own.contains(&kind) {
            bail!("{}: the tree has a {name} namespace of its own", told());
        }
        let there = File::open(&path).with_context(told)?;
        let here = File::open(format!("/proc/self/ns/{name}")).with_context(told)?;
        setns(&there, flag).with_context(told)?;
        joined.0.push((flag, here));
    }
    Ok(joined)
}

impl Drop for Joined {
    fn drop(&mut self) {
        for (flag, here) in self.0.iter().rev() {
            if let Err(e) = setns(here, *flag) {
                tracing::error!("back from a joined namespace: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_processes_are_named() {
        assert_eq!(split("net:/run/netns/a"), Some((0, "/run/netns/a".into())));
        assert_eq!(split("uts:42"), Some((2, "/proc/42/ns/uts".into())));
        for text in ["pid:42", "net", "user:/x,1,1", "net:"] {
            assert!(!understands(text), "{text}");
        }
    }
}
