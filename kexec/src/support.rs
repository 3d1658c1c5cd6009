//! Whether this system can load a kernel at all.

use std::arch::x86_64::__cpuid;
use std::fs;
use std::path::Path;

/// Why no kernel can be loaded, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// No kexec in the kernel.
    #[error("the running kernel was built without kexec (CONFIG_KEXEC)")]
    NotBuilt,
    /// Switched off until the next boot.
    #[error(
        "kexec is switched off until the next boot (sysctl kernel.kexec_load_disabled is 1); \
         remove the setting and reboot"
    )]
    Disabled,
    /// Locked down.
    #[error(
        "the kernel is locked down ({mode}), which forbids loading a kernel with a memory map of \
         our own; switch Secure Boot or the lockdown= argument off"
    )]
    Locked {
        /// `integrity` or `confidentiality`.
        mode: String,
    },
    /// Not root, or a container.
    #[error("loading a kernel needs root (CAP_SYS_BOOT) outside of containers")]
    NotPermitted,
    /// Memory encryption.
    #[error(
        "memory is encrypted ({technology}), and handing encrypted memory over is not supported"
    )]
    EncryptedMemory {
        /// `SME`, `SEV` or `TDX`.
        technology: &'static str,
    },
    /// The loaded image count limit.
    #[error(
        "no more kernels may be loaded before the next boot (sysctl kernel.kexec_load_limit_reboot \
         is 0)"
    )]
    LimitReached,
}

/// Finds out whether a kernel can be loaded, without loading one.
///
/// # Errors
/// The first [`Unsupported`] that applies.
pub fn check() -> Result<(), Unsupported> {
    check_below(Path::new("/"))?;
    check_encryption(Path::new("/"), &Cpu::detect())
}

fn check_below(root: &Path) -> Result<(), Unsupported> {
    let text = |path: &str| fs::read_to_string(root.join(path)).ok();
    if text("sys/kernel/kexec_loaded").is_none() {
        return Err(Unsupported::NotBuilt);
    }
    let sysctl = |name: &str| text(&format!("proc/sys/kernel/{name}"));
    if sysctl("kexec_load_disabled").is_some_and(|value| value.trim() == "1") {
        return Err(Unsupported::Disabled);
    }
    if sysctl("kexec_load_limit_reboot").is_some_and(|value| value.trim() == "0") {
        return Err(Unsupported::LimitReached);
    }
    // The mode in force stands in brackets.
    let lockdown = text("sys/kernel/security/lockdown").unwrap_or_default();
    let mode = lockdown
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    match mode {
        Some((mode, _)) if mode != "none" => Err(Unsupported::Locked {
            mode: mode.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// What the processor says of memory encryption.
struct Cpu {
    hypervisor: bool,
    sme: bool,
    sev: bool,
    tdx_guest: bool,
}

impl Cpu {
    fn detect() -> Cpu {
        const HYPERVISOR: u32 = 1 << 31;
        let extended = __cpuid(0x8000_0000).eax;
        let encryption = if extended >= 0x8000_001f {
            __cpuid(0x8000_001f).eax
        } else {
            0
        };
        let tdx = if __cpuid(0).eax >= 0x21 {
            Some(__cpuid(0x21))
        } else {
            None
        };
        // "IntelTDX    " in EBX, EDX, ECX.
        let is_tdx = |id: &std::arch::x86_64::CpuidResult| {
            (id.ebx, id.edx, id.ecx) == (0x6574_6e49, 0x5844_546c, 0x2020_2020)
        };
        Cpu {
            hypervisor: __cpuid(1).ecx & HYPERVISOR != 0,
            sme: encryption & 1 != 0,
            sev: encryption & 2 != 0,
            tdx_guest: tdx.as_ref().is_some_and(is_tdx),
        }
    }
}

fn check_encryption(root: &Path, cpu: &Cpu) -> Result<(), Unsupported> {
    let refuse = |technology| Err(Unsupported::EncryptedMemory { technology });
    if cpu.tdx_guest {
        return refuse("TDX");
    }
    // A hypervisor shows the bit to guests that use it only; a host shows that it could.
    if cpu.hypervisor && cpu.sev {
        return refuse("SEV");
    }
    let cmdline = fs::read_to_string(root.join("proc/cmdline")).unwrap_or_default();
    if cpu.sme
        && cmdline
            .split_whitespace()
            .any(|argument| argument == "mem_encrypt=on")
    {
        return refuse("SME");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_obstacle_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        let check = || check_below(root.path());
        assert_eq!(check(), Err(Unsupported::NotBuilt));
        write("sys/kernel/kexec_loaded", "0\n");
        assert_eq!(check(), Ok(()));
        write(
            "sys/kernel/security/lockdown",
            "[none] integrity confidentiality\n",
        );
        assert_eq!(check(), Ok(()));
        write(
            "sys/kernel/security/lockdown",
            "none [integrity] confidentiality\n",
        );
        assert_eq!(
            check(),
            Err(Unsupported::Locked {
                mode: "integrity".into()
            })
        );
        write("proc/sys/kernel/kexec_load_limit_reboot", "-1\n");
        write("proc/sys/kernel/kexec_load_disabled", "1\n");
        assert_eq!(check(), Err(Unsupported::Disabled));
    }

    #[test]
    fn encryption_in_use_is_told_from_encryption_at_hand() {
        let root = tempfile::tempdir().unwrap();
        let refused = |hypervisor, sme, sev| {
            check_encryption(
                root.path(),
                &Cpu {
                    hypervisor,
                    sme,
                    sev,
                    tdx_guest: false,
                },
            )
            .is_err()
        };
        assert!(!refused(false, true, true));
        assert!(refused(true, false, true));
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cmdline"), "ro mem_encrypt=on\n").unwrap();
        assert!(refused(false, true, true));
        assert!(!refused(false, false, false));
    }
}
