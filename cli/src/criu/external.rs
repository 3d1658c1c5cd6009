//! `--external`, `--inherit-fd` and their like: what is outside of the tree.
//!
//! Resources are written `KIND[ID]:VALUE`, criu(8).

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context, bail};
use rcr_engine::namespace::VethEnd;

use super::Error;
use super::options::Options;

/// `KIND[ID]` and what follows the colon.
fn split(text: &str) -> Option<(&str, &str, Option<&str>)> {
    let (kind, rest) = text.split_once('[')?;
    let (id, rest) = rest.split_once(']')?;
    match rest {
        "" => Some((kind, id, None)),
        rest => Some((kind, id, Some(rest.strip_prefix(':')?))),
    }
}

/// Whether the engine does what such a resource asks for.
pub fn understands(text: &str) -> bool {
    net(text).is_some() || veth(text).is_some() || mount(text).is_some() || auto_mounts(text)
}

/// `mnt[PLACE]:NAME` on dump, `mnt[NAME]:SOURCE` on restore: a mount that is
/// not saved.
pub fn mount(text: &str) -> Option<(String, String)> {
    match split(text)? {
        ("mnt", key, Some(value)) if !key.is_empty() => Some((key.to_owned(), value.to_owned())),
        _ => None,
    }
}

/// `mnt[]` or `mnt[]:FLAGS`: what is bound from outside is found without being
/// named, which is always so.
fn auto_mounts(text: &str) -> bool {
    matches!(split(text), Some(("mnt", "", _)))
}

/// The older spelling, `KEY:VALUE`; `auto` for all.
pub fn mount_map(text: &str) -> Option<(String, String)> {
    let (key, value) = text.split_once(':')?;
    mount(&format!("mnt[{key}]:{value}"))
}

/// All mounts that are not saved, from either spelling.
pub fn mounts(options: &Options) -> BTreeMap<String, String> {
    let maps = options.values("ext-mount-map");
    let maps = maps.filter_map(|v| mount_map(&v));
    let named = options.values("external").filter_map(|v| mount(&v));
    named.chain(maps).collect()
}

/// `net[INODE]:NAME`: a network namespace that is not saved.
pub fn net(text: &str) -> Option<(u64, String)> {
    let ("net", id, Some(name)) = split(text)? else {
        return None;
    };
    Some((id.parse().ok()?, name.to_owned()))
}

/// `veth[INSIDE]:OUTSIDE` or `veth[INSIDE]:OUTSIDE@BRIDGE`.
pub fn veth(text: &str) -> Option<VethEnd> {
    let ("veth", inside, Some(outer)) = split(text)? else {
        return None;
    };
    let (outside, bridge) = match outer.split_once('@') {
        Some((outside, bridge)) => (outside, Some(bridge.to_owned())),
        None => (outer, None),
    };
    Some(VethEnd {
        inside: inside.to_owned(),
        outside: outside.to_owned(),
        bridge,
    })
}

/// The older spelling, `INSIDE=OUTSIDE`.
pub fn veth_pair(text: &str) -> Option<VethEnd> {
    let (inside, outer) = text.split_once('=')?;
    veth(&format!("veth[{inside}]:{outer}"))
}

/// `fd[N]:NAME` where the name is that of a network namespace: engines call it
/// `extRootNetNS`.
pub fn inherited_net(text: &str) -> Option<(i32, String)> {
    let ("fd", number, Some(name)) = split(text)? else {
        return None;
    };
    let number = number.parse().ok()?;
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
    let is_net = link.to_str()?.starts_with("net:[");
    is_net.then(|| (number, name.to_owned()))
}

/// `fd[N]:pipe:[INODE]`: an end of a pipe in the place of one that led outside.
pub fn inherited_pipe(text: &str) -> Option<(i32, String)> {
    let ("fd", number, Some(name)) = split(text)? else {
        return None;
    };
    let is_pipe = name.starts_with("pipe:[") && name.ends_with(']');
    Some((number.parse().ok()?, name.to_owned())).filter(|_| is_pipe)
}

/// Descriptors by the names of what they stand for.
pub type Inherited = BTreeMap<String, OwnedFd>;

/// The namespaces among the inherited descriptors.
pub fn inherited_nets(options: &Options) -> Result<Inherited, Error> {
    inherited(options, inherited_net)
}

/// The pipes among the inherited descriptors.
pub fn inherited_pipes(options: &Options) -> Result<Inherited, Error> {
    inherited(options, inherited_pipe)
}

fn inherited(
    options: &Options,
    which: impl Fn(&str) -> Option<(i32, String)>,
) -> Result<Inherited, Error> {
    let mut found = BTreeMap::new();
    for text in options.values("inherit-fd") {
        let Some((number, name)) = which(&text) else {
            continue;
        };
        if !std::path::Path::new(&format!("/proc/self/fd/{number}")).exists() {
            bail!("option --inherit-fd {text}: {number} is not open");
        }
        // SAFETY: it was open a moment ago and nothing here closes it.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let fd = fd
            .try_clone_to_owned()
            .with_context(|| format!("option --inherit-fd {text}"))?;
        found.insert(name, fd);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_taken_apart() {
        assert_eq!(net("net[4026531840]:x"), Some((4_026_531_840, "x".into())));
        assert_eq!(net("mnt[/a]:x"), None);
        let v = veth("veth[eth0]:veth7@br0").unwrap();
        assert_eq!((v.inside.as_str(), v.outside.as_str()), ("eth0", "veth7"));
        assert_eq!(v.bridge.as_deref(), Some("br0"));
        assert_eq!(veth_pair("eth0=veth7").unwrap().bridge, None);
        assert_eq!(mount("mnt[/a]:b"), Some(("/a".into(), "b".into())));
        assert_eq!(mount_map("/a:b"), mount("mnt[/a]:b"));
        assert_eq!((mount("mnt[]:sm"), mount("mnt[/a]")), (None, None));
        assert!(understands("mnt[]:sm") && understands("mnt[]"));
        assert!(!understands("mnt[/a]") && !understands("unix[7]"));
        let file = std::fs::File::open("/proc/self/ns/net").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let found = inherited_net(&format!("fd[{number}]:extRootNetNS"));
        assert_eq!(found, Some((number, "extRootNetNS".into())));
        assert_eq!(inherited_net("fd[0]:pipe:[7]"), None);
        assert_eq!(
            inherited_pipe("fd[0]:pipe:[7]"),
            Some((0, "pipe:[7]".into()))
        );
        assert_eq!(inherited_pipe("fd[0]:extRootNetNS"), None);
    }
}
