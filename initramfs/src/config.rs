//! What the overlay tells `rcr-early`.

use serde::{Deserialize, Serialize};

use crate::pid_base::PID_BASE_MIN;

/// Directory of our files in the initramfs.
pub const OVERLAY_DIR: &str = "/rcr";

/// The configuration's path in the initramfs.
pub const CONFIG_PATH: &str = "/rcr/config.json";

/// Where `stage` puts the program and its configuration, so that they live on in
/// the real root.
pub const BOOT_DIR: &str = "/run/rcr/boot";

/// The program as the new kernel's `init=`.
pub const INIT_PATH: &str = "/run/rcr/boot/init";

/// What the kernel's command line must say so that the restorer runs as init.
pub const INIT_ARGUMENT: &str = "init=/run/rcr/boot/init";

/// How long restoring may take before boot goes on without, in seconds.
pub const TIME_LIMIT_SECONDS: u64 = 120;

/// Configuration of `rcr-early`, a JSON file of the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EarlyConfig {
    /// Value for `ns_last_pid` ([`crate::choose_pid_base`]).
    pub pid_base: u32,
    /// After this many seconds the restore is given up and boot goes on.
    pub time_limit_seconds: u64,
    /// The admin's own `init=`; `None` for the kernel's defaults.
    pub real_init: Option<String>,
    /// The kernel modules to load, in order.
    pub modules: Vec<ModuleFile>,
    /// A stage that is to fail, for tests: `find`, `verify`, `restore`,
    /// `restore:UNIT`, `resume`, `hang` or `crash`.
    pub fail_at: Option<String>,
    /// Fill all memory before a service runs, rather than as it is touched.
    #[serde(default)]
    pub eager: bool,
}

impl Default for EarlyConfig {
    fn default() -> Self {
        EarlyConfig {
            pid_base: PID_BASE_MIN,
            time_limit_seconds: TIME_LIMIT_SECONDS,
            real_init: None,
            modules: Vec::new(),
            fail_at: None,
            eager: false,
        }
    }
}

/// One module of the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFile {
    /// Module name with underscores.
    pub name: String,
    /// File name below `/rcr/modules`.
    pub file: String,
    /// Parameters as `insmod` takes them; mostly empty.
    #[serde(default)]
    pub options: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_fields_take_their_defaults_and_typos_are_errors() {
        let config: EarlyConfig = serde_json::from_str(r#"{"pid_base": 200000}"#).unwrap();
        assert_eq!(
            config,
            EarlyConfig {
                pid_base: 200_000,
                ..Default::default()
            }
        );
        assert!(serde_json::from_str::<EarlyConfig>(r#"{"pidbase": 1}"#).is_err());
    }
}
