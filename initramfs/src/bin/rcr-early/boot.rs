//! What this boot was told: the overlay's configuration and the command line.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use rcr_initramfs::config::{BOOT_DIR, CONFIG_PATH, EarlyConfig, INIT_ARGUMENT};

/// Name of the configuration's copy in [`BOOT_DIR`].
pub const CONFIG_NAME: &str = "config.json";

/// Time limit, in seconds, of a boot in which a test lets the worker hang.
const HANG_LIMIT_SECONDS: u64 = 30;

/// The configuration in the initramfs.
pub fn overlay_config() -> anyhow::Result<EarlyConfig> {
    read_config(Path::new(CONFIG_PATH))
}

/// The configuration that `stage` kept, with what the command line overrides.
pub fn staged_config() -> anyhow::Result<EarlyConfig> {
    let mut config = read_config(&Path::new(BOOT_DIR).join(CONFIG_NAME))?;
    apply_cmdline(&mut config, &cmdline());
    if config.fail_at.as_deref() == Some("hang") {
        // A test waits for the limit on purpose.
        config.time_limit_seconds = config.time_limit_seconds.min(HANG_LIMIT_SECONDS);
    }
    Ok(config)
}

/// Whether the command line asks for the restorer as init.
pub fn is_named_by_cmdline() -> bool {
    cmdline()
        .split_ascii_whitespace()
        .any(|word| word == INIT_ARGUMENT)
}

fn read_config(path: &Path) -> anyhow::Result<EarlyConfig> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

fn cmdline() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// `rcr.time_limit=SECONDS`, `rcr.fail_at=STAGE` and `rcr.eager`. A value that is none is
/// left alone: the command line must not be able to stop the boot.
fn apply_cmdline(config: &mut EarlyConfig, cmdline: &str) {
    for word in cmdline.split_ascii_whitespace() {
        config.eager |= word == "rcr.eager";
        match word.split_once('=') {
            Some(("rcr.time_limit", seconds)) => {
                config.time_limit_seconds = seconds.parse().unwrap_or(config.time_limit_seconds);
            }
            Some(("rcr.fail_at", stage)) => config.fail_at = Some(stage.to_owned()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_overrides() {
        let mut config = EarlyConfig::default();
        apply_cmdline(&mut config, "ro rcr.time_limit=x quiet\n");
        assert_eq!(config, EarlyConfig::default());
        apply_cmdline(
            &mut config,
            "rcr.time_limit=7 rcr.eager rcr.fail_at=restore:a.service\n",
        );
        assert_eq!(config.time_limit_seconds, 7);
        assert!(config.eager);
        assert_eq!(config.fail_at.as_deref(), Some("restore:a.service"));
    }
}
