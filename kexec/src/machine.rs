//! What the next kernel has to be told about the machine.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::e820::{Entry, Kind};
use crate::efi::Efi;
use crate::sys;

/// Bytes of `struct boot_params`.
pub(crate) const BOOT_PARAMS_LEN: usize = 4096;
/// Where the memory map of the running kernel's firmware is.
const MEMMAP_DIR: &str = "sys/firmware/memmap";

/// Facts about the machine, gathered once.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The running kernel's `struct boot_params`.
    pub boot_params: Vec<u8>,
    /// The memory map that firmware or an earlier loader gave, ascending.
    pub memory_map: Vec<Entry>,
    /// Memory kept for a crash kernel.
    pub crash_kernel: Vec<Range<u64>>,
    /// What a kernel started from another needs to know of EFI; `None` on BIOS machines.
    pub efi: Option<Efi>,
    /// Fresh entropy for the next kernel.
    pub rng_seed: [u8; 32],
}

/// Why the machine's facts cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file of the kernel cannot be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the kernel does not hold what it should.
    #[error("{path} is not understood: {what}")]
    Unparsable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No entropy could be had.
    #[error("reading entropy")]
    Entropy(#[source] io::Error),
}

impl Machine {
    /// Gathers the running machine's facts. Needs root.
    ///
    /// # Errors
    /// Every [`MachineError`].
    pub fn gather() -> Result<Machine, MachineError> {
        let mut rng_seed = [0; 32];
        sys::entropy(&mut rng_seed).map_err(MachineError::Entropy)?;
        Machine::gather_below(Path::new("/"), rng_seed)
    }

    fn gather_below(root: &Path, rng_seed: [u8; 32]) -> Result<Machine, MachineError> {
        let path = root.join("sys/kernel/boot_params/data");
        let boot_params = fs::read(&path).map_err(read_failed(&path))?;
        if boot_params.len() != BOOT_PARAMS_LEN {
            return Err(MachineError::Unparsable {
                path,
                what: "it is not 4096 bytes long",
            });
        }
        let path = root.join("proc/iomem");
        let iomem = read_text(&path)?;
        let crash_kernel = parse_crash_kernel(&iomem).ok_or(MachineError::Unparsable {
            path,
            what: "a line is no range",
        })?;
        let mut memory_map = Vec::new();
        let dir = root.join(MEMMAP_DIR);
        for entry in fs::read_dir(&dir).map_err(read_failed(&dir))? {
            let entry = entry.map_err(read_failed(&dir))?.path();
            let last = read_hex(&entry.join("end"))?;
            let start = read_hex(&entry.join("start"))?;
            let kind = Kind::from_name(read_text(&entry.join("type"))?.trim());
            if last < start {
                let what = "an entry ends before it starts";
                return Err(MachineError::Unparsable { path: entry, what });
            }
            memory_map.push(Entry {
                range: start..last.saturating_add(1),
                kind,
            });
        }
        memory_map.sort_by_key(|entry| entry.range.start);
        if !memory_map.iter().any(|entry| entry.kind == Kind::Ram) {
            return Err(MachineError::Unparsable {
                path: dir,
                what: "it names no RAM",
            });
        }
        let efi = Efi::gather_below(root)?;
        Ok(Machine {
            boot_params,
            memory_map,
            crash_kernel,
            efi,
            rng_seed,
        })
    }
}

pub(crate) fn read_text(path: &Path) -> Result<String, MachineError> {
    fs::read_to_string(path).map_err(read_failed(path))
}

pub(crate) fn read_hex(path: &Path) -> Result<u64, MachineError> {
    let text = read_text(path)?;
    let digits = text.trim().strip_prefix("0x").unwrap_or(text.trim());
    u64::from_str_radix(digits, 16).map_err(|_| MachineError::Unparsable {
        path: path.to_owned(),
        what: "it is not a hexadecimal number",
    })
}

pub(crate) fn read_failed(path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::Read { path, source }
}

/// The ranges named `Crash kernel` in /proc/iomem; `None` where one is no range.
pub(crate) fn parse_crash_kernel(iomem: &str) -> Option<Vec<Range<u64>>> {
    iomem
        .lines()
        .filter_map(|line| line.trim_start().split_once(" : "))
        .filter(|(_, name)| *name == "Crash kernel")
        .map(|(range, _)| {
            let (start, last) = range.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            Some(start..u64::from_str_radix(last, 16).ok()?.checked_add(1)?)
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A BIOS machine with memory on both sides of the hole below 4 GiB.
    pub(crate) fn sample() -> Machine {
        let entry = |range, kind| Entry { range, kind };
        Machine {
            boot_params: vec![0; BOOT_PARAMS_LEN],
            memory_map: vec![
                entry(0..0x9_fc00, Kind::Ram),
                entry(0x9_fc00..0xa_0000, Kind::Reserved),
                entry(0xf_0000..0x10_0000, Kind::Reserved),
                entry(MIB..2047 * MIB, Kind::Ram),
                entry(2047 * MIB..2048 * MIB, Kind::Reserved),
                entry(4096 * MIB..6144 * MIB, Kind::Ram),
            ],
            crash_kernel: vec![],
            efi: None,
            rng_seed: [5; 32],
        }
    }

    #[test]
    fn the_crash_kernels_memory_is_found() {
        let iomem = "00000000-00000fff : Reserved\n00100000-7fffffff : System RAM\n  \
                     04000000-0fffffff : Crash kernel\n  10000000-10ffffff : Kernel code\n";
        assert_eq!(
            parse_crash_kernel(iomem).unwrap(),
            [0x0400_0000..0x1000_0000]
        );
        assert!(parse_crash_kernel("x-y : Crash kernel\n").is_none());
    }

    #[test]
    fn facts_are_gathered_from_the_kernels_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &[u8]| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        write("sys/kernel/boot_params/data", &[0; BOOT_PARAMS_LEN]);
        write("proc/iomem", b"");
        for (n, (start, end, kind)) in [
            ("0x100000", "0x7fffffff", "System RAM"),
            ("0x0", "0x9fbff", "System RAM"),
        ]
        .iter()
        .enumerate()
        {
            write(
                &format!("sys/firmware/memmap/{n}/start"),
                format!("{start}\n").as_bytes(),
            );
            write(
                &format!("sys/firmware/memmap/{n}/end"),
                format!("{end}\n").as_bytes(),
            );
            write(
                &format!("sys/firmware/memmap/{n}/type"),
                format!("{kind}\n").as_bytes(),
            );
        }
        let machine = Machine::gather_below(root.path(), [0; 32]).unwrap();
        assert_eq!(machine.memory_map[0].range, 0..0x9_fc00);
        assert_eq!(
            machine.memory_map[1],
            Entry {
                range: MIB..2048 * MIB,
                kind: Kind::Ram
            }
        );
        assert!(machine.efi.is_none());
        write("sys/firmware/memmap/0/end", b"0x0\n");
        assert!(Machine::gather_below(root.path(), [0; 32]).is_err());
    }
}
