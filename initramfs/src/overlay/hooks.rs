//! The few lines of shell that call `rcr-early` from an initramfs' own init.

use crate::initrd::Family;

/// A file that the initramfs' init sources.
pub(super) struct Hook {
    pub path: String,
    pub script: &'static str,
}

/// Sourced before init parses the command line and before udev starts. That is
/// early enough to number processes and to bind the memory's device before
/// another driver takes it; `init-bottom` runs with the real root mounted.
/// Configuration may be sourced more than once. The root was mounted a moment
/// ago and was synced at its end: checking it can wait for the next cold boot,
/// unless somebody asks for it. What its journal holds is replayed by mounting.
const INITRAMFS_TOOLS: &str = r#"# Made by rcr-upgrade for this boot.
if [ ! -e /rcr/hooked ]; then
	: > /rcr/hooked
	/rcr/rcr-early early || :
	mkdir -p /scripts/init-bottom
	echo '/rcr/rcr-early stage || :' >> /scripts/init-bottom/ORDER
	case " $(cat /proc/cmdline) " in
	*" forcefsck "* | *" fsck.mode=force "*) ;;
	*" init=/run/rcr/boot/init "*) fastboot=y ;;
	esac
fi
"#;

const DRACUT_CMDLINE: &str = r#"# Made by rcr-upgrade for this boot.
/rcr/rcr-early early || :
"#;

const DRACUT_PRE_PIVOT: &str = r#"# Made by rcr-upgrade for this boot.
/rcr/rcr-early stage "${NEWROOT:-/sysroot}" || :
"#;

/// The hooks for an initrd of `family`.
pub(super) fn of(family: Family) -> Vec<Hook> {
    match family {
        Family::InitramfsTools => {
            vec![Hook {
                path: "conf/conf.d/zz-rcr".into(),
                script: INITRAMFS_TOOLS,
            }]
        }
        Family::Dracut { hooks } => vec![
            Hook {
                path: format!("{hooks}/cmdline/zz-rcr.sh"),
                script: DRACUT_CMDLINE,
            },
            Hook {
                path: format!("{hooks}/pre-pivot/zz-rcr.sh"),
                script: DRACUT_PRE_PIVOT,
            },
        ],
    }
}
