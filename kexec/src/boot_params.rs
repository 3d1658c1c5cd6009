//! `struct boot_params`, made by hand (Documentation/arch/x86/zero-page.rst).

use std::ops::Range;

use crate::bzimage::{BzImage, header};
use crate::e820::{ENTRY_LEN, Entry};
use crate::efi;
use crate::machine::{BOOT_PARAMS_LEN, Machine};

/// Offsets of the fields that we set or carry over.
mod at {
    use std::ops::Range;

    pub const SCREEN_INFO: Range<usize> = 0x000..0x040;
    pub const ACPI_RSDP: usize = 0x070;
    pub const EXT_INITRD: usize = 0x0c0;
    pub const EXT_INITRD_LEN: usize = 0x0c4;
    pub const EXT_CMDLINE: usize = 0x0c8;
    pub const EFI_SIGNATURE: usize = 0x1c0;
    pub const EFI_SYSTAB: Range<usize> = 0x1c4..0x1c8;
    pub const EFI_DESCRIPTOR_LEN: usize = 0x1c8;
    pub const EFI_DESCRIPTOR_VERSION: usize = 0x1cc;
    pub const EFI_MAP: usize = 0x1d0;
    pub const EFI_MAP_LEN: usize = 0x1d4;
    pub const EFI_SYSTAB_HI: Range<usize> = 0x1d8..0x1dc;
    pub const EFI_MAP_HI: usize = 0x1dc;
    pub const E820_ENTRIES: usize = 0x1e8;
    /// `eddbuf_entries` and `edd_mbr_sig_buf_entries`.
    pub const EDD_COUNTS: Range<usize> = 0x1e9..0x1eb;
    pub const SECURE_BOOT: Range<usize> = 0x1ec..0x1ed;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const CODE32_START: usize = 0x214;
    pub const INITRD: usize = 0x218;
    pub const INITRD_LEN: usize = 0x21c;
    pub const CMDLINE: usize = 0x228;
    /// `hardware_subarch` and its data.
    pub const SUBARCH: Range<usize> = 0x23c..0x248;
    pub const SETUP_DATA: usize = 0x250;
    pub const EDD_MBR_SIGNATURES: Range<usize> = 0x290..0x2d0;
    pub const E820_TABLE: usize = 0x2d0;
    pub const EDD: Range<usize> = 0xd00..0xeec;
}

/// What boot_params' own table holds; the rest goes into setup_data.
pub(crate) const E820_MAX: usize = 128;
/// The loader type of kexec.
const LOADER_KEXEC: u8 = 0xd0;

/// Physical addresses that boot_params points to.
#[derive(Debug, Clone)]
pub(crate) struct Pointers {
    pub kernel: u64,
    pub command_line: u64,
    pub initrd: Range<u64>,
    /// Zero for none.
    pub setup_data: u64,
    /// EFI's run-time memory map; empty for none.
    pub efi_map: Range<u64>,
}

/// The zero page for `kernel` on `machine`.
pub(crate) fn build(
    machine: &Machine,
    kernel: &BzImage,
    memory_map: &[Entry],
    to: &Pointers,
) -> Vec<u8> {
    let mut page = vec![0; BOOT_PARAMS_LEN];
    let header = kernel.setup_header();
    page[header::SETUP_SECTS..header::SETUP_SECTS + header.len()].copy_from_slice(header);
    for kept in [
        at::SCREEN_INFO,
        at::ACPI_RSDP..at::ACPI_RSDP + 8,
        at::EDD_COUNTS,
        at::SECURE_BOOT,
        at::SUBARCH,
        at::EDD_MBR_SIGNATURES,
        at::EDD,
    ] {
        page[kept.clone()].copy_from_slice(&machine.boot_params[kept]);
    }
    page[at::TYPE_OF_LOADER] = LOADER_KEXEC;
    put_u32(&mut page, at::CODE32_START, to.kernel);
    put_split(&mut page, at::CMDLINE, at::EXT_CMDLINE, to.command_line);
    if !to.initrd.is_empty() {
        put_split(&mut page, at::INITRD, at::EXT_INITRD, to.initrd.start);
        let len = to.initrd.end - to.initrd.start;
        put_split(&mut page, at::INITRD_LEN, at::EXT_INITRD_LEN, len);
    }
    page[at::SETUP_DATA..at::SETUP_DATA + 8].copy_from_slice(&to.setup_data.to_le_bytes());

    let in_page = &memory_map[..memory_map.len().min(E820_MAX)];
    page[at::E820_ENTRIES] = in_page.len() as u8;
    for (number, entry) in in_page.iter().enumerate() {
        let start = at::E820_TABLE + number * ENTRY_LEN;
        page[start..start + ENTRY_LEN].copy_from_slice(&entry.encode());
    }
    if let Some(facts) = &machine.efi {
        page[at::EFI_SIGNATURE..at::EFI_SIGNATURE + 4].copy_from_slice(&efi::SIGNATURE);
        for kept in [at::EFI_SYSTAB, at::EFI_SYSTAB_HI] {
            page[kept.clone()].copy_from_slice(&machine.boot_params[kept]);
        }
        put_u32(
            &mut page,
            at::EFI_DESCRIPTOR_LEN,
            u64::from(efi::DESCRIPTOR_LEN),
        );
        put_u32(
            &mut page,
            at::EFI_DESCRIPTOR_VERSION,
            u64::from(efi::DESCRIPTOR_VERSION),
        );
        put_split(&mut page, at::EFI_MAP, at::EFI_MAP_HI, to.efi_map.start);
        put_u32(
            &mut page,
            at::EFI_MAP_LEN,
            to.efi_map.end - to.efi_map.start,
        );
        if page[at::ACPI_RSDP..at::ACPI_RSDP + 8] == [0; 8] {
            page[at::ACPI_RSDP..at::ACPI_RSDP + 8].copy_from_slice(&facts.acpi_rsdp.to_le_bytes());
        }
    }
    page
}

fn put_u32(page: &mut [u8], at: usize, value: u64) {
    page[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// A 64-bit value whose upper half lies elsewhere.
fn put_split(page: &mut [u8], low_at: usize, high_at: usize, value: u64) {
    put_u32(page, low_at, value);
    put_u32(page, high_at, value >> 32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bzimage::tests::sample as kernel;
    use crate::e820::Kind;
    use crate::efi::Efi;
    use crate::machine::tests::sample as machine;

    fn to() -> Pointers {
        Pointers {
            kernel: 0x100_0000,
            command_line: 0x1_2345_6000,
            initrd: 0x2_0000_0000..0x2_0000_1234,
            setup_data: 0x7000,
            efi_map: 0x9000..0x9050,
        }
    }

    #[test]
    fn fields_lie_where_the_kernel_reads_them() {
        let mut machine = machine();
        machine.boot_params[0x06] = 3;
        machine.boot_params[0x10..0x14].copy_from_slice(&[9; 4]);
        machine.boot_params[0x1e8] = 77;
        let kernel = BzImage::parse(kernel()).unwrap();
        let page = build(&machine, &kernel, &machine.memory_map, &to());
        let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!(page[0x06], 3);
        assert_eq!((page[0x1e8], page[0x1ef], page[0x210]), (6, 0, 0xd0));
        assert_eq!((u32_at(0x228), u32_at(0xc8)), (0x2345_6000, 1));
        assert_eq!((u32_at(0x218), u32_at(0xc0), u32_at(0x21c)), (0, 2, 0x1234));
        assert_eq!(u32_at(0x250), 0x7000);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[0x2d0..0x2d0 + 20], machine.memory_map[0].encode());
        assert_eq!(u32_at(0x1c0), 0);
    }

    #[test]
    fn efi_is_passed_on() {
        let mut machine = machine();
        machine.boot_params[0x1c4..0x1c8].copy_from_slice(&[1, 2, 3, 4]);
        machine.efi = Some(Efi {
            acpi_rsdp: 0x77,
            ..Efi::default()
        });
        let kernel = BzImage::parse(kernel()).unwrap();
        let page = build(&machine, &kernel, &machine.memory_map, &to());
        assert_eq!(&page[0x1c0..0x1c8], b"EL64\x01\x02\x03\x04");
        assert_eq!(
            (page[0x1c8], page[0x1cc], page[0x1d1], page[0x1d4]),
            (40, 1, 0x90, 0x50)
        );
        assert_eq!(page[0x70], 0x77);
    }

    #[test]
    fn a_long_map_fills_the_table_and_no_more() {
        let machine = machine();
        let kernel = BzImage::parse(kernel()).unwrap();
        let map: Vec<Entry> = (0..300u64)
            .map(|n| Entry {
                range: n * 0x2000..n * 0x2000 + 0x1000,
                kind: Kind::Ram,
            })
            .collect();
        let page = build(&machine, &kernel, &map, &to());
        assert_eq!(page[0x1e8], 128);
        assert_eq!(page[0x2d0 + 127 * 20..0x2d0 + 128 * 20], map[127].encode());
        assert_eq!(page[0x2d0 + 128 * 20..0xd00], [0; 0xd00 - 0x2d0 - 128 * 20]);
    }
}
