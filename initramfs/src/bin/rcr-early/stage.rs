//! The last hook: the program moves to where it survives the switch of roots.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use rcr_initramfs::config::{BOOT_DIR, CONFIG_PATH, INIT_PATH};

use crate::{boot, kmsg, landmarks};

/// Puts the program and its configuration onto a tmpfs of their own at
/// [`BOOT_DIR`]; `/run` itself is mounted noexec by initramfs-tools.
///
/// `new_root` is given where init is looked for beneath the new root before
/// `/run` has moved there (dracut): `/run` is made visible there at once, and
/// what switches the root leaves mounts alone that are in place.
pub fn run(new_root: Option<&Path>) -> anyhow::Result<()> {
    if !boot::is_named_by_cmdline() {
        return Ok(());
    }
    let program = fs::read("/proc/self/exe").context("the program itself")?;
    let config = fs::read(CONFIG_PATH).context(CONFIG_PATH)?;
    fs::create_dir_all(BOOT_DIR).context(BOOT_DIR)?;
    let size_bytes = program.len() + config.len() + (1 << 20);
    mount(
        Some("rcr"),
        BOOT_DIR,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(format!("mode=0700,size={size_bytes}").as_str()),
    )
    .with_context(|| format!("mounting {BOOT_DIR}"))?;
    fs::write(Path::new(BOOT_DIR).join(boot::CONFIG_NAME), config).context("configuration")?;
    fs::write(INIT_PATH, program).context(INIT_PATH)?;
    fs::set_permissions(INIT_PATH, fs::Permissions::from_mode(0o755)).context(INIT_PATH)?;
    if let Err(error) = landmarks::stage() {
        kmsg::warn(&format!("stage: the time of the first hook: {error}"));
    }
    if let Some(root) = new_root {
        let run = root.join("run");
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some("/run"), &run, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("binding /run to {}", run.display()))?;
    }
    kmsg::info(&format!("stage: {INIT_PATH} is in place"));
    Ok(())
}
