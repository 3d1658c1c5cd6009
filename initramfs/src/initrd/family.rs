//! Who made an initrd, and so where its init looks for hooks.

use super::Names;

/// A maker of initrds whose hooks are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Debian's initramfs-tools: init sources `conf/conf.d/*` before it parses
    /// the command line, and runs `scripts/init-bottom/ORDER` before it switches
    /// to the real root.
    InitramfsTools,
    /// dracut: init, or units of systemd, source `HOOKS/NAME/*.sh`.
    Dracut {
        /// The directory of the hooks inside the initrd: `var/lib/dracut/hooks`
        /// (Debian's 106 and later), before that `usr/lib/dracut/hooks`, reached
        /// through `/lib`.
        hooks: &'static str,
    },
}

impl Family {
    /// The maker of an initrd with these names.
    pub(super) fn of(names: &Names) -> Option<Self> {
        if names.contains("scripts/functions")
            && (names.contains("conf/initramfs.conf") || names.contains("conf/arch.conf"))
        {
            return Some(Family::InitramfsTools);
        }
        [
            "var/lib/dracut/hooks",
            "usr/lib/dracut/hooks",
            "lib/dracut/hooks",
        ]
        .into_iter()
        .find(|hooks| names.contains(&format!("{hooks}/pre-pivot")))
        .map(|hooks| Family::Dracut { hooks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_known_by_their_files() {
        let of = |names: &[&str]| Family::of(&names.iter().collect::<Names>());
        assert_eq!(
            of(&["conf/arch.conf", "scripts/functions"]),
            Some(Family::InitramfsTools)
        );
        assert_eq!(of(&["scripts/functions"]), None);
        assert_eq!(
            of(&["usr/lib/dracut/hooks", "usr/lib/dracut/hooks/pre-pivot"]),
            Some(Family::Dracut {
                hooks: "usr/lib/dracut/hooks"
            })
        );
        assert_eq!(
            of(&[
                "usr/lib/dracut/hooks/pre-pivot",
                "var/lib/dracut/hooks/pre-pivot"
            ]),
            Some(Family::Dracut {
                hooks: "var/lib/dracut/hooks"
            })
        );
        assert_eq!(of(&["usr/lib/dracut-lib.sh"]), None);
    }
}
