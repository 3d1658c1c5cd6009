//! Mount tables in a form that can be compared across namespaces and boots.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;

use super::mountinfo::MountInfo;

/// One line a mount: what a task in the namespace can tell from another's.
///
/// Left out is what only numbers things: mount ids, device numbers, peer
/// groups (numbered anew by first appearance), the boot id in names.
pub fn normalised(mounts: &[MountInfo], boot_id: &str) -> Vec<String> {
    let mut groups = HashMap::new();
    let mut devices = HashMap::new();
    let places: HashMap<u32, &MountInfo> = mounts.iter().map(|m| (m.id, m)).collect();
    let path = |p: &std::path::Path| {
        let text = p.display().to_string();
        if boot_id.is_empty() {
            text
        } else {
            text.replace(boot_id, "BOOT")
        }
    };
    let mut lines = Vec::new();
    for m in mounts {
        let next = groups.len() + 1;
        let group = m.shared.map(|g| *groups.entry(g).or_insert(next));
        let next = devices.len() + 1;
        let device = *devices.entry(m.dev).or_insert(next);
        let parent = places
            .get(&m.parent)
            .map_or("-".into(), |p| path(&p.mountpoint));
        let options: Vec<_> = m
            .options
            .iter()
            .map(|o| String::from_utf8_lossy(o.as_bytes()).into_owned())
            .collect();
        lines.push(format!(
            "{} on {parent}: {} of fs{device} {} {} [{}] attrs {:#x}{}{}{}",
            path(&m.mountpoint),
            path(&m.root),
            m.fstype,
            m.source.display(),
            options.join(","),
            m.attrs,
            group.map_or(String::new(), |g| format!(" shared:{g}")),
            if m.master.is_some() { " slave" } else { "" },
            if m.unbindable { " unbindable" } else { "" },
        ));
    }
    lines
}
