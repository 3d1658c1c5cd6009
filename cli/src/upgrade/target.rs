//! The kernel to boot, with its initrd, modules and command line.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rcr_initramfs::modules::STORE_MODULES;
use rcr_initramfs::{EarlyConfig, Initrd, ModuleSet, OverlayInput, config, overlay};
use rcr_kexec::BzImage;
use rcr_kexec::cmdline::CommandLine;

use super::fault::FailAt;
use super::options::Options;

/// Where distributions put initrds.
const BOOT: &str = "/boot";
const MODULES: &str = "/lib/modules";
/// The static program that the overlay brings.
pub const EARLY_PROGRAM: &str = "/usr/lib/rcr/rcr-early";

/// A kernel that can be booted, everything it needs in memory.
#[derive(Debug)]
pub struct Target {
    /// The kernel.
    pub kernel: BzImage,
    /// Its initrd.
    initrd: Initrd,
    modules: ModuleSet,
    program: Vec<u8>,
    command_line: CommandLine,
    eager: bool,
}

impl Target {
    /// Reads what the options name or imply.
    pub fn read(options: &Options) -> Result<Self> {
        let path = options.kernel.as_deref().context("no kernel is named")?;
        let kernel = BzImage::read(path).with_context(|| path.display().to_string())?;
        let initrd_path = match &options.initrd {
            Some(path) => path.clone(),
            None => find_initrd(Path::new(BOOT), kernel.release())?,
        };
        let initrd = Initrd::read(&initrd_path)?;
        let modules = ModuleSet::resolve(Path::new(MODULES), kernel.release(), &STORE_MODULES)?;
        let program = fs::read(EARLY_PROGRAM).with_context(|| {
            format!("{EARLY_PROGRAM} is missing; install the rcr package on this machine")
        })?;
        let command_line = command_line(options)?;
        Ok(Target {
            kernel,
            initrd,
            modules,
            program,
            command_line,
            eager: options.eager,
        })
    }

    /// The initrd with the overlay that restores `kept` process ids.
    pub fn initrd_with_overlay(&self, kept: &[i32], fail_at: Option<&FailAt>) -> Result<Vec<u8>> {
        let config = EarlyConfig {
            pid_base: rcr_initramfs::choose_pid_base(kept),
            real_init: self.command_line.admin_init().map(str::to_owned),
            fail_at: match fail_at {
                Some(FailAt::Early(stage)) => Some(stage.clone()),
                _ => None,
            },
            eager: self.eager,
            ..EarlyConfig::default()
        };
        let input = OverlayInput {
            program: &self.program,
            modules: &self.modules,
            config,
            module_options: Default::default(),
        };
        let overlay = overlay::build(&self.initrd, &input)?;
        Ok(self.initrd.append(&overlay))
    }

    /// The command line of the new kernel.
    pub fn command_line(&self) -> String {
        self.command_line.to_text(Some(config::INIT_PATH))
    }
}

fn command_line(options: &Options) -> Result<CommandLine> {
    let text = match &options.command_line {
        Some(text) => text.clone(),
        None => fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?,
    };
    let mut line = CommandLine::reuse(text.trim());
    if let Some(append) = &options.append {
        // Reading it as a whole line keeps quoted arguments together.
        let whole = CommandLine::reuse(append);
        line.push(whole.to_text(None));
    }
    if line.to_text(None).contains('\n') {
        bail!("the command line has more than one line");
    }
    Ok(line)
}

/// The distribution's initrd for a kernel.
fn find_initrd(boot: &Path, release: &str) -> Result<PathBuf> {
    let names = [
        format!("initrd.img-{release}"),
        format!("initramfs-{release}.img"),
    ];
    let paths = names.map(|name| boot.join(name));
    paths.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let how = if Path::new("/usr/sbin/update-initramfs").exists() {
            format!("update-initramfs -c -k {release}")
        } else {
            format!("dracut --kver {release}")
        };
        anyhow!(
            "there is no initrd for kernel {release} (neither {} nor {}); make it with `{how}`, \
             or name one with --initrd",
            paths[0].display(),
            paths[1].display()
        )
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn both_distributions_initrds_are_found() {
        let boot = tempfile::tempdir().unwrap();
        let error = find_initrd(boot.path(), "6.12.1").unwrap_err().to_string();
        assert!(
            error.contains("initrd.img-6.12.1") && error.contains("make it with `"),
            "{error}"
        );
        for name in ["initramfs-6.12.1.img", "initrd.img-6.12.1"] {
            let path = boot.path().join(name);
            fs::write(&path, "").unwrap();
            assert_eq!(find_initrd(boot.path(), "6.12.1").unwrap(), path);
        }
    }

    #[test]
    fn command_lines_are_built_from_what_is_given() {
        let line = |arguments: &[&str]| {
            let start = ["rcr-upgrade", "--kernel", "x", "--command-line"];
            let options = Options::try_parse_from(start.iter().chain(arguments).copied()).unwrap();
            command_line(&options)
                .unwrap()
                .to_text(Some(config::INIT_PATH))
        };
        assert_eq!(
            line(&["BOOT_IMAGE=/vmlinuz root=/dev/vda1 init=/bin/x"]),
            "root=/dev/vda1 init=/run/rcr/boot/init rcr.init=/bin/x"
        );
        let options = Options::try_parse_from([
            "rcr-upgrade",
            "--kernel",
            "x",
            "--append",
            "a=\"b c\" quiet",
        ])
        .unwrap();
        let text = command_line(&options).unwrap().to_text(None);
        assert!(text.contains(" a=\"b c\" quiet"), "{text}");
    }
}
