//! What is left of EFI after boot, for a kernel that did not come from the firmware
//! (`struct efi_setup_data` of arch/x86/include/asm/efi.h).

use std::fs;
use std::path::Path;

use crate::machine::{MachineError, read_failed, read_hex, read_text};

/// `efi_loader_signature` of a 64-bit firmware.
pub(crate) const SIGNATURE: [u8; 4] = *b"EL64";
/// Bytes of an `efi_memory_desc_t`.
pub(crate) const DESCRIPTOR_LEN: u32 = 40;
/// `EFI_MEMORY_DESCRIPTOR_VERSION`.
pub(crate) const DESCRIPTOR_VERSION: u32 = 1;
/// Bytes of a `struct efi_setup_data`.
const SETUP_DATA_LEN: usize = 96;

/// Addresses and the memory that the firmware's run-time services live in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Efi {
    /// Physical address of the vendor's name.
    pub fw_vendor: u64,
    /// Physical address of the run-time services, zero where the kernel does not tell.
    pub runtime: u64,
    /// Physical address of the configuration tables.
    pub tables: u64,
    /// Physical address of the SMBIOS table, zero for none.
    pub smbios: u64,
    /// Physical address of the ACPI root pointer, zero for none.
    pub acpi_rsdp: u64,
    /// The run-time memory with the virtual addresses that the firmware was given.
    pub runtime_map: Vec<RuntimeRange>,
}

/// An `efi_memory_desc_t`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeRange {
    /// EFI memory type.
    pub kind: u32,
    /// Physical address.
    pub phys: u64,
    /// Virtual address.
    pub virt: u64,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// EFI memory attributes.
    pub attribute: u64,
}

impl Efi {
    pub(crate) fn gather_below(root: &Path) -> Result<Option<Efi>, MachineError> {
        let dir = root.join("sys/firmware/efi");
        let map_dir = dir.join("runtime-map");
        // Without a run-time map (`noefi`, or services that the kernel gave up on) the next
        // kernel is better off without any EFI than with half of it.
        if !map_dir.exists() {
            return Ok(None);
        }
        let mut efi = Efi {
            fw_vendor: read_hex(&dir.join("fw_vendor"))?,
            tables: read_hex(&dir.join("config_table"))?,
            ..Efi::default()
        };
        let runtime = dir.join("runtime");
        if runtime.exists() {
            efi.runtime = read_hex(&runtime)?;
        }
        let systab_path = dir.join("systab");
        if systab_path.exists() {
            let systab = read_text(&systab_path)?;
            efi.acpi_rsdp = systab_value(&systab, "ACPI20=").unwrap_or(0);
            efi.smbios = systab_value(&systab, "SMBIOS=").unwrap_or(0);
        }
        let mut numbers: Vec<u32> = Vec::new();
        for entry in fs::read_dir(&map_dir).map_err(read_failed(&map_dir))? {
            let name = entry.map_err(read_failed(&map_dir))?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        numbers.sort_unstable();
        for number in numbers {
            let dir = map_dir.join(number.to_string());
            efi.runtime_map.push(RuntimeRange {
                kind: read_hex(&dir.join("type"))? as u32,
                phys: read_hex(&dir.join("phys_addr"))?,
                virt: read_hex(&dir.join("virt_addr"))?,
                pages: read_hex(&dir.join("num_pages"))?,
                attribute: read_hex(&dir.join("attribute"))?,
            });
        }
        Ok(Some(efi))
    }

    /// The content of the setup_data node.
    pub(crate) fn setup_data(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SETUP_DATA_LEN);
        for value in [self.fw_vendor, self.runtime, self.tables, self.smbios] {
            out.extend(value.to_le_bytes());
        }
        out.resize(SETUP_DATA_LEN, 0);
        out
    }

    /// The run-time memory as an EFI memory map.
    pub(crate) fn memory_map(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.runtime_map.len() * DESCRIPTOR_LEN as usize);
        for range in &self.runtime_map {
            out.extend(u64::from(range.kind).to_le_bytes());
            for value in [range.phys, range.virt, range.pages, range.attribute] {
                out.extend(value.to_le_bytes());
            }
        }
        out
    }
}

fn systab_value(systab: &str, name: &str) -> Option<u64> {
    let value = systab.lines().find_map(|line| line.strip_prefix(name))?;
    u64::from_str_radix(value.trim().trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efi_facts_are_encoded_as_the_kernel_reads_them() {
        let efi = Efi {
            fw_vendor: 1,
            runtime: 2,
            tables: 3,
            smbios: 4,
            acpi_rsdp: 5,
            runtime_map: vec![RuntimeRange {
                kind: 6,
                phys: 7,
                virt: 8,
                pages: 9,
                attribute: 10,
            }],
        };
        let data = efi.setup_data();
        assert_eq!(
            (data.len(), data[0], data[8], data[16], data[24]),
            (96, 1, 2, 3, 4)
        );
        let map = efi.memory_map();
        assert_eq!(map.len(), DESCRIPTOR_LEN as usize);
        assert_eq!(
            (map[0], map[8], map[16], map[24], map[32]),
            (6, 7, 8, 9, 10)
        );
    }

    #[test]
    fn the_system_table_names_acpi() {
        assert_eq!(
            systab_value("ACPI20=0x7fb7e014\nACPI=0x1\n", "ACPI20="),
            Some(0x7fb7_e014)
        );
        assert_eq!(systab_value("ACPI=0x1\n", "ACPI20="), None);
    }
}
