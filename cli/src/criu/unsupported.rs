//! Options that are understood: which mean nothing here, and which ask for
//! what is not done.

use anyhow::bail;

use super::options::{Command, Options};
use super::{Error, external, join};

/// Options that change nothing: what they allow or tune is always so, or
/// concerns a mechanism that is not used.
const MOOT: &[&str] = &[
    // Locks and removed files always come along.
    "file-locks",
    "link-remap",
    "ghost-fiemap",
    // Our own ways of freezing, reading memory and naming files.
    "freeze-cgroup",
    "force-irmap",
    "irmap-scan-path",
    "evasive-devices",
    "mntns-compat-mode",
    "file-validation",
    "skip-file-rwx-check",
    // Nothing is made of them.
    "libdir",
    "log-pid",
    "deprecated",
    "all",
    "extra",
    "experimental",
    "weak-sysctls",
    "pre-dump-mode",
    "track-mem",
    // A terminal's master outside is refused by name.
    "orphan-pts-master",
];

/// Refuses what was asked for and is not done.
pub fn check(options: &Options) -> Result<(), Error> {
    for (name, value) in &options.named {
        let value = value.as_deref().unwrap_or_default().to_string_lossy();
        let nothing_to_do = match (name.as_str(), value.as_ref()) {
            // Tasks come back into the cgroups we are in.
            ("manage-cgroups", "ignore") => true,
            ("prev-images-dir", _) => true,
            // With a page server the images are there, and it is asked for there.
            ("auto-dedup", _) => options.command == Command::Dump && !options.has("page-server"),
            ("lazy-pages", _) => matches!(options.command, Command::Dump | Command::Restore),
            ("join-ns", value) => options.command == Command::Restore && join::understands(value),
            ("page-server", _) => matches!(options.command, Command::Dump | Command::PreDump),
            // Processes stay together where who restores has put itself.
            ("manage-cgroups", _) => options.command == Command::Dump || options.has("cgroup-root"),
            ("cgroup-root", _) => true,
            ("external", value) => external::understands(value),
            ("ext-mount-map", "auto") => true,
            ("ext-mount-map", value) => external::mount_map(value).is_some(),
            ("root" | "shell-job", _) => true,
            ("inherit-fd", value) => {
                external::inherited_net(value).is_some()
                    || external::inherited_pipe(value).is_some()
            }
            ("veth-pair", value) => external::veth_pair(value).is_some(),
            ("empty-ns", "net" | "0x40000000") => true,
            ("network-lock", "nftables" | "skip") => true,
            (name, _) => MOOT.contains(&name),
        };
        if nothing_to_do {
            continue;
        }
        if value.is_empty() {
            bail!("option --{name} is not supported");
        }
        bail!("option --{name} {value} is not supported");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(line: &str) -> Options {
        let mut options = Options::default();
        let words: Vec<_> = line.split(' ').map(Into::into).collect();
        options.parse(&words).unwrap();
        options
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        check(&with("dump -t 1 --file-locks --manage-cgroups=ignore")).unwrap();
        let e = check(&with("dump -t 1 --tls")).unwrap_err();
        assert_eq!(e.to_string(), "option --tls is not supported");
        check(&with("restore --join-ns net:/x")).unwrap();
        let e = check(&with("restore --join-ns mnt:/x")).unwrap_err();
        assert_eq!(e.to_string(), "option --join-ns mnt:/x is not supported");
    }
}
