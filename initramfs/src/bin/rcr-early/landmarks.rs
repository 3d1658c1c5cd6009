//! Points in time of this boot that lie before the restorer runs as init.

use std::fs;
use std::path::Path;

use nix::time::{ClockId, clock_gettime};
use rcr_initramfs::config::{BOOT_DIR, OVERLAY_DIR};
use rcr_systemd::handover::{Side, StageTime, now_ms};

/// Name of the file with the moment at which the initramfs took over.
const FILE: &str = "initramfs-ms";

/// When the parts of this boot began, `CLOCK_REALTIME` in ms since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Landmarks {
    /// The kernel's clock began.
    pub kernel_ms: Option<u64>,
    /// The initramfs' first program of ours ran.
    pub initramfs_ms: Option<u64>,
}

/// Notes in the initramfs that it has taken over.
pub fn note() -> std::io::Result<()> {
    fs::write(Path::new(OVERLAY_DIR).join(FILE), now_ms().to_string())
}

/// Puts the note where it survives the switch of roots.
pub fn stage() -> std::io::Result<()> {
    let from = Path::new(OVERLAY_DIR).join(FILE);
    fs::copy(from, Path::new(BOOT_DIR).join(FILE)).map(drop)
}

impl Landmarks {
    /// Those of this boot.
    pub fn of_this_boot() -> Self {
        let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).ok();
        let since_boot_ms =
            since_boot.map(|t| t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000);
        let noted = fs::read_to_string(Path::new(BOOT_DIR).join(FILE)).ok();
        Landmarks {
            kernel_ms: since_boot_ms.map(|ms| now_ms().saturating_sub(ms)),
            initramfs_ms: noted.and_then(|text| text.trim().parse().ok()),
        }
    }

    /// What lies between the old side's last stage and the new side's first.
    pub fn between(&self, from_ms: u64, to_ms: u64) -> Vec<StageTime> {
        let parts = [
            ("leave", Side::Old, Some(from_ms)),
            ("kernel", Side::New, self.kernel_ms),
            ("initramfs", Side::New, self.initramfs_ms),
        ];
        let begun: Vec<_> = parts
            .into_iter()
            .filter_map(|(name, side, at)| Some((name, side, at?.clamp(from_ms, to_ms))))
            .collect();
        let ends = begun.iter().skip(1).map(|(_, _, at)| *at).chain([to_ms]);
        begun
            .iter()
            .zip(ends)
            .map(|((name, side, started_ms), end)| StageTime {
                name: (*name).to_owned(),
                side: *side,
                started_ms: *started_ms,
                ms: end.saturating_sub(*started_ms),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jump_has_its_parts() {
        let parts = |landmarks: Landmarks| -> Vec<(String, u64)> {
            let stages = landmarks.between(100, 900);
            stages.into_iter().map(|s| (s.name, s.ms)).collect()
        };
        let all = Landmarks {
            kernel_ms: Some(150),
            initramfs_ms: Some(400),
        };
        let named = |name: &str, ms| (name.to_owned(), ms);
        assert_eq!(
            parts(all),
            [
                named("leave", 50),
                named("kernel", 250),
                named("initramfs", 500)
            ]
        );
        // A clock that was set back in between.
        let back = Landmarks {
            kernel_ms: Some(7),
            initramfs_ms: None,
        };
        assert_eq!(parts(back), [named("leave", 0), named("kernel", 800)]);
    }
}
